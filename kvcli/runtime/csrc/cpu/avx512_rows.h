// The AVX-512 loops that know nothing of codes: rows of exact values, the keys' mean, softmax, Hadamard.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#include "kv_layout.h"

namespace kvrt {
namespace {

// Values c ... c+15 of a row, those of the mask.
inline __m512 load_row(const void *row, int dtype, int c, __mmask16 mask) {
  if (dtype == KV_F32) return _mm512_maskz_loadu_ps(mask, (const float *)row + c);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)row + c);
  if (dtype == KV_F16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __mmask16 columns(int left) { return left >= 16 ? 0xFFFF : __mmask16((1u << left) - 1); }

// Sums of the lanes of four vectors.
inline __m128 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 x = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                                 _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
  const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  return _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
}

template <int Dtype, int G>
void score_row_heads(const uint8_t *rows, int64_t row_bytes, int count, int head_dim, const float *query, float *scores,
                     int stride) {
  for (int t = 0; t < count; t += 4) {
    const uint8_t *row[4];
    for (int i = 0; i < 4; ++i) row[i] = rows + (t + i < count ? t + i : count - 1) * row_bytes;
    __m512 sum[G][4];
    for (int g = 0; g < G; ++g)
      for (int i = 0; i < 4; ++i) sum[g][i] = _mm512_setzero_ps();
    for (int c = 0; c < head_dim; c += 16) {
      const __mmask16 mask = columns(head_dim - c);
      __m512 k[4];
      for (int i = 0; i < 4; ++i) k[i] = load_row(row[i], Dtype, c, mask);
      for (int g = 0; g < G; ++g) {
        const __m512 q = _mm512_maskz_loadu_ps(mask, query + (int64_t)g * head_dim + c);
        for (int i = 0; i < 4; ++i) sum[g][i] = _mm512_fmadd_ps(q, k[i], sum[g][i]);
      }
    }
    const __mmask8 mask = count - t >= 4 ? 0xF : __mmask8((1u << (count - t)) - 1);
    for (int g = 0; g < G; ++g)
      _mm_mask_storeu_ps(scores + (int64_t)g * stride + t, mask,
                         sum_lanes(sum[g][0], sum[g][1], sum[g][2], sum[g][3]));
  }
}

template <int Dtype, int G>
void accumulate_row_heads(const uint8_t *rows, int64_t row_bytes, int count, int head_dim, const float *weights,
                          int stride, float *sums) {
  for (int c = 0; c < head_dim; c += 64) {
    __m512 sum[G][4];
    __mmask16 mask[4];
    for (int i = 0; i < 4; ++i) {
      const int left = head_dim - c - 16 * i;
      mask[i] = left > 0 ? columns(left) : 0;
      for (int g = 0; g < G; ++g) sum[g][i] = _mm512_maskz_loadu_ps(mask[i], sums + (int64_t)g * head_dim + c + 16 * i);
    }
    for (int t = 0; t < count; ++t) {
      __m512 v[4];
      for (int i = 0; i < 4; ++i) v[i] = load_row(rows + t * row_bytes, Dtype, c + 16 * i, mask[i]);
      for (int g = 0; g < G; ++g) {
        const __m512 w = _mm512_set1_ps(weights[(int64_t)g * stride + t]);
        for (int i = 0; i < 4; ++i) sum[g][i] = _mm512_fmadd_ps(w, v[i], sum[g][i]);
      }
    }
    for (int g = 0; g < G; ++g)
      for (int i = 0; i < 4; ++i)
        _mm512_mask_storeu_ps(sums + (int64_t)g * head_dim + c + 16 * i, mask[i], sum[g][i]);
  }
}

using ScoreRows = void (*)(const uint8_t *, int64_t, int, int, const float *, float *, int);
using AccumulateRows = void (*)(const uint8_t *, int64_t, int, int, const float *, int, float *);

#define KVRT_ROW_LOOPS(name, dtype) {name<dtype, 1>, name<dtype, 2>, name<dtype, 3>, name<dtype, 4>}
constexpr ScoreRows kScoreRows[3][4] = {KVRT_ROW_LOOPS(score_row_heads, KV_F32), KVRT_ROW_LOOPS(score_row_heads, KV_F16),
                                        KVRT_ROW_LOOPS(score_row_heads, KV_BF16)};
constexpr AccumulateRows kAccumulateRows[3][4] = {KVRT_ROW_LOOPS(accumulate_row_heads, KV_F32),
                                                  KVRT_ROW_LOOPS(accumulate_row_heads, KV_F16),
                                                  KVRT_ROW_LOOPS(accumulate_row_heads, KV_BF16)};
#undef KVRT_ROW_LOOPS

void score_rows(const void *rows, int dtype, int64_t row_stride, int count, int head_dim, const float *query, int group,
                float *scores, int stride) {
  const int64_t row_bytes = row_stride * (dtype == KV_F32 ? 4 : 2);
  for (int g = 0; g < group; g += 4)
    kScoreRows[dtype][(group - g < 4 ? group - g : 4) - 1]((const uint8_t *)rows, row_bytes, count, head_dim,
                                                           query + (int64_t)g * head_dim, scores + (int64_t)g * stride,
                                                           stride);
}

void accumulate_rows(const void *rows, int dtype, int64_t row_stride, int count, int head_dim, const float *weights,
                     int stride, int group, float *sums) {
  const int64_t row_bytes = row_stride * (dtype == KV_F32 ? 4 : 2);
  for (int g = 0; g < group; g += 4)
    kAccumulateRows[dtype][(group - g < 4 ? group - g : 4) - 1]((const uint8_t *)rows, row_bytes, count, head_dim,
                                                                weights + (int64_t)g * stride, stride,
                                                                sums + (int64_t)g * head_dim);
}

// Sixteen tokens, G heads: even lanes sum cosines, odd lanes sines, so that one product serves both.
template <int G>
void add_mean_tile(const float *a, const float *b, const float *row, const float *steps, int half, __mmask16 mask,
                   float *scores, int stride) {
  alignas(64) float turned[G][KV_MAX_HEAD_DIM];  // pairs (A_i, B_i)
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int i = 0; i < half; i += 16) {
    const __mmask16 some = columns(half - i);
    const __m512 cos = _mm512_maskz_loadu_ps(some, row + i), sin = _mm512_maskz_loadu_ps(some, row + half + i);
    for (int g = 0; g < G; ++g) {
      const __m512 x = _mm512_maskz_loadu_ps(some, a + g * half + i), y = _mm512_maskz_loadu_ps(some, b + g * half + i);
      const __m512 p = _mm512_fmadd_ps(x, cos, _mm512_mul_ps(y, sin)), q = _mm512_fmsub_ps(y, cos, _mm512_mul_ps(x, sin));
      _mm512_store_ps(turned[g] + 2 * i, _mm512_permutex2var_ps(p, low, q));
      if (2 * i + 16 < KV_MAX_HEAD_DIM) _mm512_store_ps(turned[g] + 2 * i + 16, _mm512_permutex2var_ps(p, high, q));
    }
  }
  __m512 sum[G], other[G];
  for (int g = 0; g < G; ++g) sum[g] = other[g] = _mm512_setzero_ps();
  const auto pair = [&](int g, int i) __attribute__((always_inline)) {
    double both;
    __builtin_memcpy(&both, turned[g] + 2 * i, sizeof both);
    return _mm512_castpd_ps(_mm512_set1_pd(both));
  };
  int i = 0;
  for (; i + 1 < half; i += 2) {
    const __m512 x = _mm512_loadu_ps(steps + 16 * i), y = _mm512_loadu_ps(steps + 16 * i + 16);
    for (int g = 0; g < G; ++g) {
      sum[g] = _mm512_fmadd_ps(pair(g, i), x, sum[g]);
      other[g] = _mm512_fmadd_ps(pair(g, i + 1), y, other[g]);
    }
  }
  for (; i < half; ++i)
    for (int g = 0; g < G; ++g) sum[g] = _mm512_fmadd_ps(pair(g, i), _mm512_loadu_ps(steps + 16 * i), sum[g]);
  // lanes 2 m + 1 become token 7 - m, lanes 2 m token 8 + m
  const __m512i order = _mm512_setr_epi32(15, 13, 11, 9, 7, 5, 3, 1, 0, 2, 4, 6, 8, 10, 12, 14);
  for (int g = 0; g < G; ++g) {
    const __m512 x = _mm512_add_ps(sum[g], other[g]), y = _mm512_permute_ps(x, 0xB1);
    const __m512 all = _mm512_permutexvar_ps(order, _mm512_mask_sub_ps(_mm512_add_ps(x, y), 0xAAAA, y, x));
    float *to = scores + (int64_t)g * stride;
    _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), all));
  }
}

void add_mean_scores(const float *a, const float *b, const float *const *rows, const float *steps, int half, int group,
                     int first, int last, float *scores, int stride) {
  constexpr decltype(&add_mean_tile<1>) kTiles[4] = {add_mean_tile<1>, add_mean_tile<2>, add_mean_tile<3>,
                                                     add_mean_tile<4>};
  for (int begin = first / 16 * 16; begin < last; begin += 16) {
    __mmask16 mask = columns(last - begin);
    if (begin < first) mask = __mmask16(mask & (0xFFFF << (first - begin)));
    for (int g = 0; g < group; g += 4)
      kTiles[(group - g < 4 ? group - g : 4) - 1](a + (int64_t)g * half, b + (int64_t)g * half, rows[begin / 16], steps,
                                                  half, mask, scores + (int64_t)g * stride + begin, stride);
  }
}

float exp_sum(float *x, int n, float max) {
  __m512 sum = _mm512_setzero_ps();
  for (int t = 0; t < n; t += 16) {
    const __mmask16 mask = columns(n - t);
    const __m512 in = _mm512_maskz_loadu_ps(mask, x + t);
    const __mmask16 keep = _mm512_cmp_ps_mask(in, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
    const __m512 v = _mm512_max_ps(_mm512_set1_ps(-110), _mm512_sub_ps(in, _mm512_set1_ps(max)));
    const __m512 power = _mm512_roundscale_ps(_mm512_mul_ps(v, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    const __m512 r = _mm512_fnmadd_ps(power, _mm512_set1_ps(-2.12194440e-4f),
                                      _mm512_fnmadd_ps(power, _mm512_set1_ps(0.693359375f), v));
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
    const __m512 y = _mm512_maskz_scalef_ps(keep & mask, p, power);
    _mm512_mask_storeu_ps(x + t, mask, y);
    sum = _mm512_add_ps(sum, y);
  }
  return _mm512_reduce_add_ps(sum);
}

float max_of(const float *x, int n) {
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int t = 0; t < n; t += 16) {
    const __mmask16 mask = columns(n - t);
    most = _mm512_mask_max_ps(most, mask, most, _mm512_maskz_loadu_ps(mask, x + t));
  }
  return _mm512_reduce_max_ps(most);
}

inline __m512 butterfly(__m512 x, __m512 partner, __mmask16 second) {
  return _mm512_mask_sub_ps(_mm512_add_ps(x, partner), second, partner, x);
}

void hadamard(float *x, int64_t rows, int head_dim) {
  const int block = head_dim & -head_dim;
  const __m512 norm = _mm512_set1_ps((float)pow((double)block, -0.5));
  const int64_t count = rows * head_dim;
  const int width = block < 16 ? 16 : block;
  for (int64_t at = 0; at < count; at += width) {
    __m512 v[KV_MAX_HEAD_DIM / 16];
    const int vectors = width / 16;
    const __mmask16 mask = count - at >= 16 ? 0xFFFF : 0xFF;
    for (int i = 0; i < vectors; ++i) {
      __m512 y = _mm512_maskz_loadu_ps(mask, x + at + 16 * i);
      y = butterfly(y, _mm512_permute_ps(y, 0xB1), 0xAAAA);
      y = butterfly(y, _mm512_permute_ps(y, 0x4E), 0xCCCC);
      y = butterfly(y, _mm512_shuffle_f32x4(y, y, 0xB1), 0xF0F0);
      if (block >= 16) y = butterfly(y, _mm512_shuffle_f32x4(y, y, 0x4E), 0xFF00);
      v[i] = y;
    }
    for (int step = 1; step < vectors; step *= 2)
      for (int i = 0; i < vectors; ++i)
        if (!(i & step)) {
          const __m512 a = v[i], b = v[i + step];
          v[i] = _mm512_add_ps(a, b);
          v[i + step] = _mm512_sub_ps(a, b);
        }
    for (int i = 0; i < vectors; ++i) _mm512_mask_storeu_ps(x + at + 16 * i, mask, _mm512_mul_ps(v[i], norm));
  }
}

}  // namespace
}  // namespace kvrt
