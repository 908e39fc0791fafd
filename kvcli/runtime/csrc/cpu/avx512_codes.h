// What the AVX-512 loops over keys and over values share: where codes lie, scales, and levels as integers.
//
// Both quantise their float operand (the query, the weights) to 16 bits with a scale of its own and multiply it by the
// codes' levels in integers, exactly. Below 8 bits levels are 16-bit words out of a register: 2 * code - top for uniform
// symmetric grids, the code itself where there are zero points, and a table's levels rounded to at most kTableTop steps. Eight
// bits are bytes already: two vpdpbusd take the operand's upper and lower byte.
#pragma once

#include "avx512_unpack.h"
#include "kv_layout.h"
#include "page_ops.h"

namespace kvrt {
namespace {

constexpr int kTile = 16;         // tokens taken at once
constexpr int kHeads = 4;         // query heads taken at once
constexpr float kTableTop = 8191;  // of a table's largest level, for up to 64 products a sum
constexpr float kOperandTop = 32000, kSumTop = 2.1e9f;  // of the operand, and of any sum of products

struct Section {
  const kv_format *format;
  const uint8_t *const *slices;
  int64_t codes, scales, zeros, end;  // where they begin in a slice
  int head_dim, block_size;
  int64_t row_bytes;
  const uint8_t *slice(int tile) const { return slices[tile / block_size]; }
  const uint8_t *rows(int tile) const { return slice(tile) + codes + tile % block_size * row_bytes; }
  void fetch(int tile) const {
    if (tile % block_size == 0) fetch_ahead(slices, tile / block_size, block_size, codes, end);
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
  __m512i words;  // 32, the table repeated: a looked up code may have its neighbour's bits above it
  float unit;     // what one integer step is worth
  float top;      // the largest integer
};

// products: of one sum. The finer a table's levels, the fewer bits are left to the operand.
template <int Bits>
Levels levels_of(const kv_format &f, int products) {
  Levels out = {_mm512_setzero_si512(), 1, 255};
  if constexpr (Bits < 8) {
    constexpr int count = 1 << Bits;
    const __m512i code = _mm512_and_si512(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(count - 1));
    __m512i n = code;
    out.top = count - 1;
    if (f.table) {
      const float finest = products > 64 ? kTableTop * 64 / products : kTableTop;
      const float top = f.levels[count - 1] > -f.levels[0] ? f.levels[count - 1] : -f.levels[0];  // they rise
      const __m512 level = _mm512_permutexvar_ps(code, _mm512_loadu_ps(f.levels));
      n = _mm512_cvtps_epi32(_mm512_mul_ps(level, _mm512_set1_ps(top > 0 ? finest / top : 0)));
      out.unit = top / finest, out.top = finest;
    } else if (f.symmetric) {
      n = _mm512_sub_epi32(_mm512_slli_epi32(code, 1), _mm512_set1_epi32(count - 1));
      out.unit = 0.5f;
    }
    const __m256i words = _mm512_cvtepi32_epi16(n);
    out.words = _mm512_inserti64x4(_mm512_castsi256_si512(words), words, 1);
  }
  return out;
}

// The factor that takes values of at most `most` and of sum `sum` to integers whose products stay in range.
inline float operand_factor(float most, float sum, float level_top) {
  const float widest = kOperandTop / (most > 1e-30f ? most : 1e-30f);
  const float safest = kSumTop / level_top / (sum > 1e-30f ? sum : 1e-30f);
  return widest < safest ? widest : safest;
}

// 16 integers as words, or as their upper bytes and then their (signed) lower bytes.
template <int Bits>
inline void store_operand(__m512i x, int8_t *out) {
  if constexpr (Bits < 8) {
    _mm256_store_si256((__m256i *)out, _mm512_cvtepi32_epi16(x));
  } else {
    const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
    _mm_store_si128((__m128i *)out, _mm512_cvtepi32_epi8(upper));
    _mm_store_si128((__m128i *)(out + 16), _mm512_cvtepi32_epi8(x));
  }
}

}  // namespace
}  // namespace kvrt
