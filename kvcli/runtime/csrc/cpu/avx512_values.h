// accumulate_pages over codes for AVX-512: see avx512_codes.h for the arithmetic.
//
// The weights of a whole run share one scale a head, so that sums stay integers from page to page; they become floats
// at the run's end, or where the channels' scales change.
#pragma once

#include "avx512_scores.h"

namespace kvrt {
namespace {

constexpr int kTiles = kRunTokens / kTile;

template <int G>
struct alignas(64) Weights {
  int8_t w[kTiles][G][32];  // 16 tokens an entry
  float unit[G];            // of a weight's integer
  float zeros[G];           // on the token axis: what the zero points add to every channel
};

template <int Bits, int G>
void quantize_weights(const Section &s, const float *weights, int stride, int first, int last, int groups, int group,
                      const Levels &levels, Weights<G> *out) {
  const kv_format &f = *s.format;
  const bool by_token = f.axis == KV_TOKEN;
  __m512 scale[kTiles], zero[kTiles];
  const int from = first / kTile, to = (last + kTile - 1) / kTile;
  for (int i = from; i < to && by_token; ++i) {
    const int token = i * kTile % s.block_size;
    scale[i] = load_column(s.slice(i * kTile) + s.scales, f.scale_dtype, token, groups, group);
    if (!f.symmetric) zero[i] = load_column(s.slice(i * kTile) + s.zeros, KV_SCALE_F16, token, groups, group);
  }
  for (int g = 0; g < G; ++g) {
    const float *w = weights + (int64_t)g * stride;
    __m512 x[kTiles], top = _mm512_setzero_ps(), size = top, added = top;
    for (int i = from; i < to; ++i) {
      const __mmask16 mask = tile_mask(i * kTile, first, last);
      x[i] = _mm512_maskz_loadu_ps(mask, w + i * kTile);
      if (by_token && !f.symmetric) added = _mm512_mask3_fmadd_ps(x[i], zero[i], added, mask);
      if (by_token) x[i] = _mm512_maskz_mul_ps(mask, x[i], scale[i]);
      const __m512 a = _mm512_abs_ps(x[i]);
      top = _mm512_max_ps(top, a);
      size = _mm512_add_ps(size, a);
    }
    const float factor = operand_factor(_mm512_reduce_max_ps(top), _mm512_reduce_add_ps(size), levels.top);
    out->unit[g] = 1 / factor;
    for (int i = from; i < to; ++i)
      store_operand<Bits>(_mm512_cvtps_epi32(_mm512_mul_ps(x[i], _mm512_set1_ps(factor))), out->w[i][g]);
    out->zeros[g] = by_token && !f.symmetric ? _mm512_reduce_add_ps(added) : 0;
  }
}

inline __m512i weight_pair(const int8_t *w, int i) { return _mm512_set1_epi32(((const int32_t *)w)[i]); }

// Integer sums of tiles from ... to-1 over 16 channels an entry, c ... c+63 at most.
template <int Bits, bool Dense, int G>
inline void sum_tiles(const Section &s, const Weights<G> &w, int from, int to, int c, int steps, __m512i levels,
                      __m512i (&sums)[4][G]) {
  for (int j = 0; j < 4; ++j)
    for (int g = 0; g < G; ++g) sums[j][g] = _mm512_setzero_si512();
  if constexpr (Bits < 8) {
    for (int tile = from; tile < to; ++tile) {
      const uint8_t *rows = s.rows(tile * kTile) + c * Bits / 8;
      if (c == 0) s.fetch(tile * kTile);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        Unpack<Bits, Dense> codes;
        codes.load(rows + 4 * i * s.row_bytes, s.row_bytes, 2 * Bits * steps);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          if (!Dense && j >= steps) break;
          const __m512i x = Unpack<Bits, Dense>::value_words(j, codes.low, levels);
          const __m512i y = Unpack<Bits, Dense>::value_words(j, codes.high, levels);
          for (int g = 0; g < G; ++g) sums[j][g] = _mm512_dpwssd_epi32(sums[j][g], x, weight_pair(w.w[tile][g], 2 * i));
          for (int g = 0; g < G; ++g)
            sums[j][g] = _mm512_dpwssd_epi32(sums[j][g], y, weight_pair(w.w[tile][g], 2 * i + 1));
        }
      }
    }
  } else {
    for (int j = 0; j < steps; ++j) {
      __m512i high[G];
      for (int g = 0; g < G; ++g) high[g] = _mm512_setzero_si512();
      for (int tile = from; tile < to; ++tile)
        for (int i = 0; i < 4; ++i) {
          Unpack<8, Dense> codes;
          if (i == 0 && j + c == 0) s.fetch(tile * kTile);
          codes.load(s.rows(tile * kTile) + 4 * i * s.row_bytes, s.row_bytes, 0);
          const __m512i x = codes.value_bytes(c / 16 + j);
          for (int g = 0; g < G; ++g) {
            high[g] = _mm512_dpbusd_epi32(high[g], x, weight_pair(w.w[tile][g], i));
            sums[j][g] = _mm512_dpbusd_epi32(sums[j][g], x, weight_pair(w.w[tile][g], 4 + i));
          }
        }
      for (int g = 0; g < G; ++g) sums[j][g] = _mm512_add_epi32(_mm512_slli_epi32(high[g], 8), sums[j][g]);
    }
  }
}

// Of the integers in tiles from ... to-1: bytes carry the offset 255 / 2, which comes off again.
template <int Bits, int G>
inline float offset_of(const Weights<G> &w, int g, int from, int to, bool symmetric) {
  if (Bits < 8 || !symmetric) return 0;
  __m512i total = _mm512_setzero_si512();
  for (int i = from; i < to; ++i) {
    const __m512i high = _mm512_cvtepi8_epi32(_mm_load_si128((const __m128i *)w.w[i][g]));
    const __m512i low = _mm512_cvtepi8_epi32(_mm_load_si128((const __m128i *)w.w[i][g] + 1));
    total = _mm512_add_epi32(total, _mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
  }
  return -127.5f * (float)_mm512_reduce_add_epi32(total);
}

// sums[g][c] += what tiles from ... to-1 add to channels c0 ... c1-1; scale: of the channels, or null.
template <int Bits, bool Dense, int G>
inline void add_tiles(const Section &s, const Weights<G> &w, int from, int to, int c0, int c1, const Levels &levels,
                      const float *scale, float *sums) {
  float offset[G];
  for (int g = 0; g < G; ++g) offset[g] = offset_of<Bits>(w, g, from, to, s.format->symmetric);
  for (int c = c0; c < c1; c += 64) {
    const int steps = Dense || c + 64 <= c1 ? 4 : (c1 - c) / 16;
    __m512i n[4][G];
    sum_tiles<Bits, Dense>(s, w, from, to, c, steps, levels.words, n);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      if (j >= steps) break;
      for (int g = 0; g < G; ++g) {
        float *to_sums = sums + (int64_t)g * s.head_dim + c + 16 * j;
        const __m512 unit = _mm512_set1_ps(w.unit[g] * levels.unit);
        const __m512 x = _mm512_mul_ps(_mm512_add_ps(_mm512_cvtepi32_ps(n[j][g]), _mm512_set1_ps(offset[g])), unit);
        const __m512 y = _mm512_loadu_ps(to_sums);
        _mm512_storeu_ps(to_sums, scale ? _mm512_fmadd_ps(x, _mm512_load_ps(scale + c + 16 * j), y)
                                        : _mm512_add_ps(_mm512_add_ps(x, _mm512_set1_ps(w.zeros[g])), y));
      }
    }
  }
}

template <int Bits, bool Dense, int G>
void accumulate_heads(const Section &s, const float *weights, int stride, int first, int last, float *sums) {
  const kv_format &f = *s.format;
  const Levels levels = levels_of<Bits>(f, 64);
  const int from = first / kTile, to = (last + kTile - 1) / kTile;
  Weights<G> w;
  if (f.axis == KV_TOKEN) {
    const int groups = s.head_dim / f.group;
    for (int i = 0; i < groups; ++i) {
      quantize_weights<Bits>(s, weights, stride, first, last, groups, i, levels, &w);
      add_tiles<Bits, Dense>(s, w, from, to, i * f.group, (i + 1) * f.group, levels, nullptr, sums);
    }
    return;
  }
  quantize_weights<Bits>(s, weights, stride, first, last, 1, 0, levels, &w);
  alignas(64) float scale[KV_MAX_HEAD_DIM], zero[KV_MAX_HEAD_DIM];
  const int together = f.group / kTile;
  for (int i = from; i < to;) {
    const int next = (i / together + 1) * together < to ? (i / together + 1) * together : to;
    const uint8_t *slice = s.slice(i * kTile);
    const int run = i * kTile % s.block_size / f.group;
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
