// accumulate_pages over codes for AVX-512: see avx512_codes.h for the arithmetic.
//
// The weights of a whole run share one scale a head, so that sums stay integers from page to page; they become floats
// at the run's end, or where the channels' scales change.
#pragma once

#include "avx512_scores.h"

namespace kvrt {
namespace {

template <int G>
struct alignas(64) Weights {
  int8_t upper[G][kRunTokens], lower[G][kRunTokens];
  float unit[G];   // of a weight's integer
  float zeros[G];  // on the token axis: what the zero points add to every channel
};

constexpr Bytes64 weights_order() {
  Bytes64 b{};
  for (int i = 0; i < 64; ++i) b.at[i] = upper_byte(i);
  return b;
}

// Weights of tiles from ... to-1, times their scales on the token axis. Whole: of all tiles.
template <bool Whole, int G>
void quantize_weights(const Section &s, const float *weights, int stride, int first, int last, int groups, int group,
                      Weights<G> *out) {
  static constexpr Bytes64 kOrder = weights_order();
  const kv_format &f = *s.format;
  const bool by_token = f.axis == KV_TOKEN;
  const int from = Whole ? 0 : first / kTile, to = Whole ? kTiles : (last + kTile - 1) / kTile;
  __m512 scale[kTiles], zero[kTiles];
  for (int i = from; i < to && by_token; ++i) {
    const int token = s.tiles[i].token;
    scale[i] = load_column(s.tiles[i].slice + s.scales, f.scale_dtype, token, groups, group);
    if (!f.symmetric) zero[i] = load_column(s.tiles[i].slice + s.zeros, KV_SCALE_F16, token, groups, group);
  }
  for (int g = 0; g < G; ++g) {
    const float *w = weights + (int64_t)g * stride;
    __m512 x[kTiles], top = _mm512_setzero_ps(), added = top;
#pragma GCC unroll 8
    for (int i = 0; i < kTiles; ++i) {
      x[i] = _mm512_setzero_ps();
      if (!Whole && (i < from || i >= to)) continue;
      const __mmask16 mask = Whole ? __mmask16(0xFFFF) : tile_mask(i * kTile, first, last);
      x[i] = _mm512_maskz_loadu_ps(mask, w + i * kTile);
      if (by_token && !f.symmetric) added = _mm512_mask3_fmadd_ps(x[i], zero[i], added, mask);
      if (by_token) x[i] = _mm512_maskz_mul_ps(mask, x[i], scale[i]);
      top = _mm512_max_ps(top, _mm512_abs_ps(x[i]));
    }
    const float factor = operand_factor(_mm512_reduce_max_ps(top));
    out->unit[g] = 1 / factor;
    for (int i = 0; i < kTiles; i += 4) {
      __m512i n[4];
      for (int j = 0; j < 4; ++j) n[j] = _mm512_cvtps_epi32(_mm512_mul_ps(x[i + j], _mm512_set1_ps(factor)));
      const TwoTerms terms(n);
      _mm512_store_si512(out->upper[g] + i * kTile, terms.upper(kOrder));
      _mm512_store_si512(out->lower[g] + i * kTile, terms.lower(kOrder));
    }
    out->zeros[g] = by_token && !f.symmetric ? _mm512_reduce_add_ps(added) : 0;
  }
}

template <int G>
void quantize_weights(const Section &s, const float *weights, int stride, int first, int last, int groups, int group,
                      Weights<G> *out) {
  if (first == 0 && last == kRunTokens)
    return quantize_weights<true, G>(s, weights, stride, first, last, groups, group, out);
  quantize_weights<false, G>(s, weights, stride, first, last, groups, group, out);
}

inline __m512i four_weights(const int8_t *w, int i) { return _mm512_set1_epi32(((const int32_t *)w)[i]); }

// Integer sums of tiles from ... to-1 over spread s of the 64 channels from c on, 16 channels in order an entry.
template <int Bits, bool Dense, int G>
inline void sum_tiles(const Section &section, const Weights<G> &w, int from, int to, int c, int s, __m512i levels,
                      __m512i (&sums)[G][Unpack<Bits, Dense>::kParts]) {
  using U = Unpack<Bits, Dense>;
  __m512i high[U::kParts][G], low[U::kParts][G];
  for (int p = 0; p < U::kParts; ++p)
    for (int g = 0; g < G; ++g) high[p][g] = low[p][g] = _mm512_setzero_si512();
  const int channels = Dense || section.head_dim - c >= 64 ? 64 : section.head_dim - c;
  for (int tile = from; tile < to; ++tile) {
    const uint8_t *rows = section.tiles[tile].rows + c * Bits / 8;
    if (c + s == 0) section.fetch(tile);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      U codes;
      codes.load(rows + 4 * i * section.row_bytes, section.row_bytes, channels);
      const __m512i spread = codes.value_spread(s);
#pragma GCC unroll 4
      for (int p = 0; p < U::kParts; ++p) {
        const __m512i x = U::value_part(spread, p, levels);
        for (int g = 0; g < G; ++g) {
          add_products(high[p][g], x, four_weights(w.upper[g], 4 * tile + i));
          add_products(low[p][g], x, four_weights(w.lower[g], 4 * tile + i));
        }
      }
    }
  }
  for (int g = 0; g < G; ++g) {
    for (int p = 0; p < U::kParts; ++p) sums[g][p] = _mm512_add_epi32(_mm512_slli_epi32(high[p][g], 8), low[p][g]);
    U::order(sums[g]);
  }
}

// Of the integers in tiles from ... to-1: bytes carry an offset, which comes off again.
template <int G>
inline float offset_of(const Weights<G> &w, int g, int from, int to, float offset) {
  if (offset == 0) return 0;
  const __m128i ones = _mm_set1_epi8(1);
  __m128i high = _mm_setzero_si128(), low = high;
  for (int i = from; i < to; ++i) {
    high = _mm_dpbusd_epi32(high, ones, _mm_load_si128((const __m128i *)w.upper[g] + i));
    low = _mm_dpbusd_epi32(low, ones, _mm_load_si128((const __m128i *)w.lower[g] + i));
  }
  const __m128i x = _mm_add_epi32(_mm_slli_epi32(high, 8), low);
  const __m128i y = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4E));
  return offset * (float)_mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xB1)));
}

// sums[g][c] += what tiles from ... to-1 add to channels c0 ... c1-1; scale: of the channels, or null.
template <int Bits, bool Dense, int G>
inline void add_tiles(const Section &section, const Weights<G> &w, int from, int to, int c0, int c1,
                      const Levels &levels, const float *scale, float *sums) {
  using U = Unpack<Bits, Dense>;
  float offset[G];
  for (int g = 0; g < G; ++g) offset[g] = offset_of(w, g, from, to, levels.offset);
  for (int c = c0 / U::kWidth * U::kWidth; c < c1; c += U::kWidth) {
    __m512i n[G][U::kParts];
    sum_tiles<Bits, Dense>(section, w, from, to, c / 64 * 64, c % 64 / U::kWidth, levels.bytes, n);
#pragma GCC unroll 4
    for (int p = 0; p < U::kParts; ++p) {
      const int at = c + 16 * p;
      if (!Dense && (at < c0 || at >= c1)) continue;
      for (int g = 0; g < G; ++g) {
        float *to_sums = sums + (int64_t)g * section.head_dim + at;
        const __m512 unit = _mm512_set1_ps(w.unit[g] * levels.unit);
        const __m512 x = _mm512_mul_ps(_mm512_add_ps(_mm512_cvtepi32_ps(n[g][p]), _mm512_set1_ps(offset[g])), unit);
        const __m512 y = _mm512_loadu_ps(to_sums);
        _mm512_storeu_ps(to_sums, scale ? _mm512_fmadd_ps(x, _mm512_load_ps(scale + at), y)
                                        : _mm512_add_ps(_mm512_add_ps(x, _mm512_set1_ps(w.zeros[g])), y));
      }
    }
  }
}

template <int Bits, bool Dense, int G>
void accumulate_heads(const Section &s, const float *weights, int stride, int first, int last, float *sums) {
  const kv_format &f = *s.format;
  const Levels levels = levels_of<Bits>(f);
  const int from = first / kTile, to = (last + kTile - 1) / kTile;
  Weights<G> w;
  if (f.axis == KV_TOKEN) {
    const int groups = s.head_dim / f.group;
    for (int i = 0; i < groups; ++i) {
      quantize_weights(s, weights, stride, first, last, groups, i, &w);
      add_tiles<Bits, Dense>(s, w, from, to, i * f.group, (i + 1) * f.group, levels, nullptr, sums);
    }
    return;
  }
  quantize_weights(s, weights, stride, first, last, 1, 0, &w);
  alignas(64) float scale[KV_MAX_HEAD_DIM], zero[KV_MAX_HEAD_DIM];
  const int together = f.group / kTile;
  for (int i = from; i < to;) {
    const int next = (i / together + 1) * together < to ? (i / together + 1) * together : to;
    const uint8_t *slice = s.tiles[i].slice;
    const int run = s.tiles[i].token / f.group;
    load_channels(slice + s.scales, f.scale_dtype, run, s.head_dim, scale);
    add_tiles<Bits, Dense>(s, w, i, next, 0, s.head_dim, levels, scale, sums);
    if (!f.symmetric) {
      load_channels(slice + s.zeros, KV_SCALE_F16, run, s.head_dim, zero);
      for (int g = 0; g < G; ++g) {
        __m512 sum = _mm512_setzero_ps();
        for (int t = i; t < next; ++t)
          sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(tile_mask(t * kTile, first, last),
                                                         weights + (int64_t)g * stride + t * kTile));
        const __m512 weight = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
        for (int c = 0; c < s.head_dim; c += 16) {
          float *at = sums + (int64_t)g * s.head_dim + c;
          _mm512_storeu_ps(at, _mm512_fmadd_ps(weight, _mm512_load_ps(zero + c), _mm512_loadu_ps(at)));
        }
      }
    }
    i = next;
  }
}

}  // namespace
}  // namespace kvrt
