// The AVX-512 loops that know nothing of codes: rows of exact values, the keys' mean, softmax, Hadamard.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#include "kv_layout.h"
#include "page_ops.h"

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

// Cosines and sines as words, for vpdpwssd: [half / 2][cos, sin][kRunTokens / 2], two pairs an entry.
constexpr float kStepTop = 8191;  // the finer, the fewer bits are left to A and B
constexpr int kSteps = kRunTokens / 2, kStepVectors = kSteps / 16;

void pack_mean_steps(float *steps, int half) {
  for (int i = 0; i < half; i += 2)
    for (int c = 0; c < 2 * kSteps; c += 16) {
      const auto words = [&](int k) {
        const __m512 x = i + k < half ? _mm512_loadu_ps(steps + 2 * kSteps * (i + k) + c) : _mm512_setzero_ps();
        return _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(kStepTop)));
      };
      const __m512i both = _mm512_mask_blend_epi16(0xAAAAAAAA, words(0), _mm512_slli_epi32(words(1), 16));
      _mm512_storeu_si512(steps + kSteps * i + c, both);  // what lies there has been read
    }
}

// A and B of G heads as words, two pairs an entry, and what one step of their products is worth.
template <int G>
struct alignas(64) Turned {
  int32_t a[G][KV_MAX_HEAD_DIM / 4 + 8], b[G][KV_MAX_HEAD_DIM / 4 + 8];
  float unit[G];
};

template <int G>
void turn_mean(const float *a, const float *b, const float *row, int half, Turned<G> *out) {
  alignas(64) float p[KV_MAX_HEAD_DIM / 2], q[KV_MAX_HEAD_DIM / 2];
  for (int g = 0; g < G; ++g) {
    __m512 top = _mm512_setzero_ps(), sum = top;
    for (int i = 0; i < half; i += 16) {
      const __mmask16 some = columns(half - i);
      const __m512 cos = _mm512_maskz_loadu_ps(some, row + i), sin = _mm512_maskz_loadu_ps(some, row + half + i);
      const __m512 x = _mm512_maskz_loadu_ps(some, a + g * half + i), y = _mm512_maskz_loadu_ps(some, b + g * half + i);
      const __m512 u = _mm512_fmadd_ps(x, cos, _mm512_mul_ps(y, sin)), v = _mm512_fmsub_ps(y, cos, _mm512_mul_ps(x, sin));
      _mm512_store_ps(p + i, u);
      _mm512_store_ps(q + i, v);
      top = _mm512_max_ps(top, _mm512_max_ps(_mm512_abs_ps(u), _mm512_abs_ps(v)));
      sum = _mm512_add_ps(sum, _mm512_add_ps(_mm512_abs_ps(u), _mm512_abs_ps(v)));
    }
    const float most = _mm512_reduce_max_ps(top), size = _mm512_reduce_add_ps(sum);  // even and odd sums are added up
    const float factor = fminf(32000 / fmaxf(most, 1e-30f), 2.1e9f / kStepTop / fmaxf(size, 1e-30f));
    out->unit[g] = 1 / (factor * kStepTop);
    for (int i = 0; i < half; i += 16) {
      const auto words = [&](const float *x, int32_t *to) {
        const __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(x + i), _mm512_set1_ps(factor)));
        _mm256_storeu_si256((__m256i *)(to + i / 2), _mm512_cvtepi32_epi16(n));
      };
      words(p, out->a[g]);
      words(q, out->b[g]);
    }
  }
}

// The mean's scores of tokens 16 i ... 16 i + 15, those of the mask.
inline void add_sixteen(__m512i sum, float unit, int i, int first, int last, float *scores) {
  __mmask16 mask = columns(last - 16 * i);
  if (16 * i < first) mask = __mmask16(mask & (0xFFFFu << (first - 16 * i)));
  const __m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(unit));
  _mm512_mask_storeu_ps(scores + 16 * i, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, scores + 16 * i), x));
}

template <int G>
void add_mean_heads(const float *a, const float *b, const float *row, const float *steps, int half, int first, int last,
                    float *scores, int stride) {
  Turned<G> t;
  turn_mean<G>(a, b, row, half, &t);
  const __m512i back = _mm512_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  constexpr int kAtOnce = G < 4 ? 2 : 1;
  const auto seen = [&](int i) { return i >= 0 && 16 * i < last && 16 * i + 16 > first; };
  for (int v0 = 0; v0 < kStepVectors; v0 += kAtOnce) {
    bool any = false;
    for (int v = v0; v < v0 + kAtOnce; ++v) any |= seen(kStepVectors - 1 - v) || seen(kStepVectors + v);
    if (!any) continue;
    __m512i even[kAtOnce][G], odd[kAtOnce][G];
    for (int v = 0; v < kAtOnce; ++v)
      for (int g = 0; g < G; ++g) even[v][g] = odd[v][g] = _mm512_setzero_si512();
    for (int k = 0; 2 * k < half; ++k) {
      const float *at = steps + 2 * kSteps * k + 16 * v0;
      __m512i c[kAtOnce], s[kAtOnce];
      for (int v = 0; v < kAtOnce; ++v) {
        c[v] = _mm512_loadu_si512(at + 16 * v);
        s[v] = _mm512_loadu_si512(at + kSteps + 16 * v);
        __asm__("" : "+v"(c[v]), "+v"(s[v]));  // or GCC loads them anew for every head
      }
      for (int g = 0; g < G; ++g) {
        const __m512i x = _mm512_set1_epi32(t.a[g][k]), y = _mm512_set1_epi32(t.b[g][k]);
        for (int v = 0; v < kAtOnce; ++v) {
          even[v][g] = _mm512_dpwssd_epi32(even[v][g], c[v], x);
          odd[v][g] = _mm512_dpwssd_epi32(odd[v][g], s[v], y);
        }
      }
    }
    for (int v = 0; v < kAtOnce; ++v) {
      const int before = kStepVectors - 1 - v0 - v, after = kStepVectors + v0 + v;
      for (int g = 0; g < G; ++g) {
        float *to = scores + (int64_t)g * stride;
        const __m512i back_sum = _mm512_permutexvar_epi32(back, _mm512_sub_epi32(even[v][g], odd[v][g]));
        if (seen(before)) add_sixteen(back_sum, t.unit[g], before, first, last, to);
        if (seen(after)) add_sixteen(_mm512_add_epi32(even[v][g], odd[v][g]), t.unit[g], after, first, last, to);
      }
    }
  }
}

void add_mean_scores(const float *a, const float *b, const float *row, const float *steps, int half, int group,
                     int first, int last, float *scores, int stride) {
  constexpr decltype(&add_mean_heads<1>) kHeads[4] = {add_mean_heads<1>, add_mean_heads<2>, add_mean_heads<3>,
                                                      add_mean_heads<4>};
  for (int g = 0; g < group; g += 4)
    kHeads[(group - g < 4 ? group - g : 4) - 1](a + (int64_t)g * half, b + (int64_t)g * half, row, steps, half, first,
                                                last, scores + (int64_t)g * stride, stride);
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

// Blocks of 16 * Vectors values, or, for smaller ones, several to a vector; unrolled, so that they stay in registers.
template <int Vectors>
void hadamard_blocks(float *x, int64_t count, int block) {
  const __m512 norm = _mm512_set1_ps((float)pow((double)block, -0.5));
  for (int64_t at = 0; at < count; at += 16 * Vectors) {
    __m512 v[Vectors];
    const __mmask16 mask = count - at >= 16 ? 0xFFFF : 0xFF;
#pragma GCC unroll 16
    for (int i = 0; i < Vectors; ++i) {
      __m512 y = _mm512_maskz_loadu_ps(mask, x + at + 16 * i);
      y = butterfly(y, _mm512_permute_ps(y, 0xB1), 0xAAAA);
      y = butterfly(y, _mm512_permute_ps(y, 0x4E), 0xCCCC);
      y = butterfly(y, _mm512_shuffle_f32x4(y, y, 0xB1), 0xF0F0);
      if (block >= 16) y = butterfly(y, _mm512_shuffle_f32x4(y, y, 0x4E), 0xFF00);
      v[i] = y;
    }
#pragma GCC unroll 4
    for (int step = 1; step < Vectors; step *= 2)
#pragma GCC unroll 16
      for (int i = 0; i < Vectors; ++i)
        if (!(i & step)) {
          const __m512 a = v[i], b = v[i + step];
          v[i] = _mm512_add_ps(a, b);
          v[i + step] = _mm512_sub_ps(a, b);
        }
#pragma GCC unroll 16
    for (int i = 0; i < Vectors; ++i) _mm512_mask_storeu_ps(x + at + 16 * i, mask, _mm512_mul_ps(v[i], norm));
  }
}

void hadamard(float *x, int64_t rows, int head_dim) {
  const int block = head_dim & -head_dim;
  const int64_t count = rows * head_dim;
  (block <= 16   ? hadamard_blocks<1>
   : block == 32 ? hadamard_blocks<2>
   : block == 64 ? hadamard_blocks<4>
   : block == 128 ? hadamard_blocks<8>
                  : hadamard_blocks<16>)(x, count, block);
}

}  // namespace
}  // namespace kvrt
