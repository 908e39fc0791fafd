// What the AVX-512 loops over keys and over values share: where codes lie, scales, and levels as bytes.
//
// Both quantise their float operand (the query, the weights) to integers with a scale of its own and multiply it by the
// codes' levels, unsigned bytes, exactly: the code itself on uniform grids, and 128 more than a table's whole number of
// steps. The operand has 16 bits: one vpdpbusd takes its upper byte and one its lower.
#pragma once

#include "avx512_unpack.h"
#include "kv_layout.h"
#include "page_ops.h"

namespace kvrt {
namespace {

constexpr int kTile = 16;  // tokens taken at once
constexpr float kOperandTop = 32000, kSumTop = 2.1e9f;  // of the operand, and of any sum of products

constexpr int kTiles = kRunTokens / kTile;

// Keys or values of a run of pages: where the codes of its tiles lie. Found once, for divisions take long.
struct Section {
  const kv_format *format;
  int head_dim, block_size;
  int64_t scales, zeros;  // where they begin in a slice
  int64_t row_bytes, next_bytes;
  struct {
    const uint8_t *slice, *rows, *next;  // next: what to fetch while this one is worked on, or null
    int token;                           // in its page
  } tiles[kTiles];

  Section(const kv_layer &l, const kv_format &f, const uint8_t *const *slices, int64_t codes, int64_t scales_,
          int64_t zeros_, int64_t end, int first, int last)
      : format(&f), head_dim(l.head_dim), block_size(l.block_size), scales(scales_), zeros(zeros_),
        row_bytes(kv_row_bytes(&f, l.head_dim)), next_bytes(end - codes) {
    const int run = kRunTokens / block_size;
    int page = first / block_size, token = first / kTile * kTile - page * block_size;
    for (int i = first / kTile; i * kTile < last; ++i) {
      const uint8_t *slice = slices[page], *next = token ? nullptr : slices[page + run];
      tiles[i] = {slice, slice + codes + token * row_bytes, next ? next + codes : nullptr, token};
      token += kTile;
      if (token == block_size) token = 0, ++page;
    }
  }
  void fetch(int i) const {
    for (int64_t b = 0; tiles[i].next && b < next_bytes; b += 64) __builtin_prefetch(tiles[i].next + b);
  }
};

inline __m512 load_scales(const uint8_t *scales, int scale_dtype, int64_t at) {
  if (scale_dtype == KV_SCALE_F16) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(scales + 2 * at)));
  const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(scales + at)));
  return _mm512_cvtph_ps(_mm256_slli_epi16(bytes, 7));
}

// Scales or zeros of a tile's tokens on the token axis: [tokens][groups], column `group`.
inline __m512 load_column(const uint8_t *scales, int scale_dtype, int64_t token, int groups, int group) {
  if (groups == 1) return load_scales(scales, scale_dtype, token);
  float buffer[kTile * KV_MAX_HEAD_DIM / 16];
  for (int i = 0; i < groups; ++i)
    _mm512_storeu_ps(buffer + 16 * i, load_scales(scales, scale_dtype, token * groups + 16 * i));
  const __m512i steps = _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(groups));
  return _mm512_i32gather_ps(steps, buffer + group, 4);
}

// Scales or zeros of all channels for the tokens of a tile on the channel axis; returns the largest.
inline float load_channels(const uint8_t *scales, int scale_dtype, int64_t run, int head_dim, float *out) {
  __m512 top = _mm512_setzero_ps();
  for (int c = 0; c < head_dim; c += 16) {
    const __m512 x = load_scales(scales, scale_dtype, run * head_dim + c);
    _mm512_store_ps(out + c, x);
    top = _mm512_max_ps(top, x);
  }
  return _mm512_reduce_max_ps(top);
}

struct Levels {
  __m512i bytes;  // 64, the table repeated: a looked up code may have its neighbour's bits above it
  float unit;     // what one integer step is worth
  float top;      // the largest integer
  float offset;   // what a byte is more than the level, negative
};

template <int Bits>
Levels levels_of(const kv_format &f) {
  constexpr int top = (1 << Bits) - 1;
  Levels out = {_mm512_setzero_si512(), 1, top, f.symmetric ? -0.5f * top : 0};
  if constexpr (Bits < 8) {
    __m512i n = _mm512_and_si512(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                 _mm512_set1_epi32(top));
    if (f.table) {
      const __m512 level = _mm512_permutexvar_ps(n, _mm512_loadu_ps(f.levels));
      n = _mm512_cvtps_epi32(_mm512_fmadd_ps(level, _mm512_set1_ps(float(f.level_steps)), _mm512_set1_ps(128)));
      out.unit = 1.0f / float(f.level_steps), out.top = 255, out.offset = -128;
    }
    out.bytes = _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(n));
  }
  return out;
}

// The factor that takes values of at most `most` to integers of at most 32000: 16 bits hold that with 128 to spare for
// rounding to upper bytes, and 256 products of that and a byte stay below 2^31.
inline float operand_factor(float most) { return 32000 / (most > 1e-30f ? most : 1e-30f); }

// Integers of at most 32000, 16 a vector, as their upper bytes and the signed lower bytes that go with them.
struct TwoTerms {
  __m512i words[2];
  TwoTerms(const __m512i (&n)[4]) : words{_mm512_packs_epi32(n[0], n[1]), _mm512_packs_epi32(n[2], n[3])} {}
  // order: of the upper bytes of words
  __m512i upper(__m512i order) const {
    const __m512i half = _mm512_set1_epi16(128);
    return _mm512_permutex2var_epi8(_mm512_add_epi16(words[0], half), order, _mm512_add_epi16(words[1], half));
  }
  __m512i lower(__m512i order) const {
    return _mm512_permutex2var_epi8(words[0], _mm512_xor_si512(order, _mm512_set1_epi8(1)), words[1]);
  }
  __m512i add_to(__m512i sum) const {
    const __m512i one = _mm512_set1_epi16(1);
    return _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(sum, words[0], one), words[1], one);
  }
};

// Where vpackssdw leaves the upper byte of integer c of 64 in TwoTerms' words.
constexpr uint8_t upper_byte(int c) { return uint8_t(c / 32 * 64 + c % 16 / 4 * 16 + c / 16 % 2 * 8 + c % 4 * 2 + 1); }

}  // namespace
}  // namespace kvrt
