// The inner loops for AVX2 (with FMA and F16C), in float32: a few rows of a page are decoded, then multiplied. Compile
// with -ffp-contract=off: fused operations are written out, and dequantize and hadamard must round like the reference.
#include "page_runs.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "avx2_int4.h"
#include "f16c_scales.h"

namespace kvrt {
namespace {

// ---- rows of exact values; head_dim is a multiple of 8

template <int Dtype>
inline __m256 load_row(const uint8_t *row, int c) {
  if (Dtype == KV_F32) return _mm256_loadu_ps((const float *)row + c);
  const __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)row + c));
  if (Dtype == KV_F16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

inline __m256i lanes(int n) {  // a mask of the first n
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline __m128 sum_lanes(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
}

inline float sum_of(__m256 x) {
  alignas(32) float part[8];
  _mm256_store_ps(part, x);
  return ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
}

template <int Dtype, int G>
void score_row_heads(const uint8_t *rows, int64_t row_bytes, int count, int head_dim, const float *query, float *scores,
                     int stride) {
  for (int t = 0; t < count; t += 4) {
    const uint8_t *row[4];
    for (int i = 0; i < 4; ++i) row[i] = rows + (t + i < count ? t + i : count - 1) * row_bytes;
    __m256 sum[G][4];
    for (int g = 0; g < G; ++g)
      for (int i = 0; i < 4; ++i) sum[g][i] = _mm256_setzero_ps();
    for (int c = 0; c < head_dim; c += 8) {
      __m256 k[4];
      for (int i = 0; i < 4; ++i) k[i] = load_row<Dtype>(row[i], c);
      for (int g = 0; g < G; ++g) {
        const __m256 q = _mm256_loadu_ps(query + (int64_t)g * head_dim + c);
        for (int i = 0; i < 4; ++i) sum[g][i] = _mm256_fmadd_ps(q, k[i], sum[g][i]);
      }
    }
    for (int g = 0; g < G; ++g) {
      const __m128 x = sum_lanes(sum[g][0], sum[g][1], sum[g][2], sum[g][3]);
      _mm_maskstore_ps(scores + (int64_t)g * stride + t, _mm256_castsi256_si128(lanes(count - t)), x);
    }
  }
}

template <int Dtype, int G, int Vectors>
inline void accumulate_columns(const uint8_t *rows, int64_t row_bytes, int count, int head_dim, const float *weights,
                               int stride, float *sums, int c) {
  __m256 sum[G][Vectors];
  for (int g = 0; g < G; ++g)
    for (int i = 0; i < Vectors; ++i) sum[g][i] = _mm256_loadu_ps(sums + (int64_t)g * head_dim + c + 8 * i);
  for (int t = 0; t < count; ++t) {
    __m256 v[Vectors];
    for (int i = 0; i < Vectors; ++i) v[i] = load_row<Dtype>(rows + t * row_bytes, c + 8 * i);
    for (int g = 0; g < G; ++g) {
      const __m256 w = _mm256_set1_ps(weights[(int64_t)g * stride + t]);
      for (int i = 0; i < Vectors; ++i) sum[g][i] = _mm256_fmadd_ps(w, v[i], sum[g][i]);
    }
  }
  for (int g = 0; g < G; ++g)
    for (int i = 0; i < Vectors; ++i) _mm256_storeu_ps(sums + (int64_t)g * head_dim + c + 8 * i, sum[g][i]);
}

template <int Dtype, int G>
void accumulate_row_heads(const uint8_t *rows, int64_t row_bytes, int count, int head_dim, const float *weights,
                          int stride, float *sums) {
  int c = 0;
  for (; c + 32 <= head_dim; c += 32)
    accumulate_columns<Dtype, G, 4>(rows, row_bytes, count, head_dim, weights, stride, sums, c);
  for (; c < head_dim; c += 8)
    accumulate_columns<Dtype, G, 1>(rows, row_bytes, count, head_dim, weights, stride, sums, c);
}

using ScoreRows = void (*)(const uint8_t *, int64_t, int, int, const float *, float *, int);
using AccumulateRows = void (*)(const uint8_t *, int64_t, int, int, const float *, int, float *);
constexpr ScoreRows kScoreRows[3][2] = {{score_row_heads<KV_F32, 1>, score_row_heads<KV_F32, 2>},
                                        {score_row_heads<KV_F16, 1>, score_row_heads<KV_F16, 2>},
                                        {score_row_heads<KV_BF16, 1>, score_row_heads<KV_BF16, 2>}};
constexpr AccumulateRows kAccumulateRows[3][2] = {{accumulate_row_heads<KV_F32, 1>, accumulate_row_heads<KV_F32, 2>},
                                                  {accumulate_row_heads<KV_F16, 1>, accumulate_row_heads<KV_F16, 2>},
                                                  {accumulate_row_heads<KV_BF16, 1>, accumulate_row_heads<KV_BF16, 2>}};

void score_rows(const void *rows, int dtype, int64_t row_stride, int count, int head_dim, const float *query, int group,
                float *scores, int stride) {
  const int64_t row_bytes = row_stride * (dtype == KV_F32 ? 4 : 2);
  for (int g = 0; g < group; g += 2)
    kScoreRows[dtype][group - g > 1]((const uint8_t *)rows, row_bytes, count, head_dim, query + (int64_t)g * head_dim,
                                     scores + (int64_t)g * stride, stride);
}

void accumulate_rows(const void *rows, int dtype, int64_t row_stride, int count, int head_dim, const float *weights,
                     int stride, int group, float *sums) {
  const int64_t row_bytes = row_stride * (dtype == KV_F32 ? 4 : 2);
  for (int g = 0; g < group; g += 2)
    kAccumulateRows[dtype][group - g > 1]((const uint8_t *)rows, row_bytes, count, head_dim,
                                          weights + (int64_t)g * stride, stride, sums + (int64_t)g * head_dim);
}

// ---- decoding

// Codes i ... i+7 of a row, each in a lane. Reads what they occupy and, before that, bytes of the same row.
template <int Bits>
inline __m256i unpack8(const uint8_t *row, int i) {
  const uint8_t *from = row + i * Bits / 8;
  if (Bits == 8) return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
  uint32_t word = 0;
  if (Bits == 3 && i) {
    memcpy(&word, from - 1, 4);
    word >>= 8;
  } else {
    memcpy(&word, from, Bits < 4 ? Bits : 4);
  }
  const __m256i shifts = _mm256_setr_epi32(0, Bits, 2 * Bits, 3 * Bits, 4 * Bits, 5 * Bits, 6 * Bits, 7 * Bits);
  return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32((int)word), shifts), _mm256_set1_epi32((1 << Bits) - 1));
}

template <int Bits>
void dequantize_codes(const kv_format &f, const uint8_t *codes, const uint8_t *scales, const uint8_t *zeros,
                      int head_dim, int first, int last, float *out) {
  const bool e5m3 = f.scale_dtype == KV_SCALE_E5M3, one = f.axis == KV_TOKEN && f.group == head_dim;
  const int64_t row_bytes = kv_row_bytes(&f, head_dim);
  const __m256 offset = _mm256_set1_ps(0.5f * ((1 << Bits) - 1));
  const __m256 low = _mm256_loadu_ps(f.levels), high = _mm256_loadu_ps(f.levels + 8);
  float scale[KV_MAX_HEAD_DIM], zero[KV_MAX_HEAD_DIM];
  for (int t = first; t < last; ++t) {
    const uint8_t *row = codes + t * row_bytes;
    float *to = out + (int64_t)(t - first) * head_dim;
    __m256 s = offset, z = offset;
    if (one) {
      s = _mm256_set1_ps(half_at(scales, t, e5m3));
      if (!f.symmetric) z = _mm256_set1_ps(half_at(zeros, t, false));
    } else if (f.axis == KV_TOKEN || t == first || t % f.group == 0) {
      row_scales(f, scales, e5m3, head_dim, t, scale);
      if (!f.symmetric) row_scales(f, zeros, false, head_dim, t, zero);
    }
    for (int c = 0; c < head_dim; c += 8) {
      const __m256i code = unpack8<Bits>(row, c);
      if (!one) s = _mm256_loadu_ps(scale + c);
      __m256 x;
      if (f.table) {
        x = _mm256_permutevar8x32_ps(low, code);
        if (Bits == 4)
          x = _mm256_blendv_ps(x, _mm256_permutevar8x32_ps(high, code), _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
        x = _mm256_mul_ps(x, s);
      } else if (f.symmetric) {
        x = _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(code), offset), s);
      } else {
        if (!one) z = _mm256_loadu_ps(zero + c);
        x = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(code), s), z);
      }
      _mm256_storeu_ps(to + c, x);
    }
  }
}

template <int Dtype>
void widen(const uint8_t *rows, int64_t count, float *out) {
  for (int64_t i = 0; i < count; i += 8) _mm256_storeu_ps(out + i, load_row<Dtype>(rows + i * (Dtype == KV_F32 ? 4 : 2), 0));
}

void dequantize(const kv_format &f, const uint8_t *codes, const uint8_t *scales, const uint8_t *zeros, int page_dtype,
                int head_dim, int, int first, int last, float *out) {
  if (kv_is_exact(&f)) {
    const int dtype = f.bits == 32 ? KV_F32 : page_dtype;
    const uint8_t *rows = codes + first * kv_row_bytes(&f, head_dim);
    (dtype == KV_F32 ? widen<KV_F32> : dtype == KV_F16 ? widen<KV_F16> : widen<KV_BF16>)(
        rows, (int64_t)(last - first) * head_dim, out);
    return;
  }
  (f.bits == 2   ? dequantize_codes<2>
   : f.bits == 3 ? dequantize_codes<3>
   : f.bits == 4 ? dequantize_codes<4>
                 : dequantize_codes<8>)(f, codes, scales, zeros, head_dim, first, last, out);
}

// ---- pages

constexpr int kRows = 16;  // decoded at once

void score_page(const kv_layer &l, const kv_page_layout &at, const uint8_t *slice, const float *query, int group,
                int first, int last, float *scores, int stride) {
  const int d = l.head_dim;
  if (kv_is_exact(&l.k)) {
    score_rows(slice + at.k_codes + first * kv_row_bytes(&l.k, d), l.k.bits == 32 ? KV_F32 : l.page_dtype, d,
               last - first, d, query, group, scores + first, stride);
    return;
  }
  float rows[kRows * KV_MAX_HEAD_DIM];
  for (int t = first; t < last; t += kRows) {
    const int count = last - t < kRows ? last - t : kRows;
    dequantize(l.k, slice + at.k_codes, slice + at.k_scales, slice + at.k_zeros, l.page_dtype, d, l.block_size, t,
               t + count, rows);
    score_rows(rows, KV_F32, d, count, d, query, group, scores + t, stride);
  }
}

void accumulate_page(const kv_layer &l, const kv_page_layout &at, const uint8_t *slice, const float *weights,
                     int stride, int group, int first, int last, float *sums) {
  const int d = l.head_dim;
  if (kv_is_exact(&l.v)) {
    accumulate_rows(slice + at.v_codes + first * kv_row_bytes(&l.v, d), l.v.bits == 32 ? KV_F32 : l.page_dtype, d,
                    last - first, d, weights + first, stride, group, sums);
    return;
  }
  float rows[kRows * KV_MAX_HEAD_DIM];
  for (int t = first; t < last; t += kRows) {
    const int count = last - t < kRows ? last - t : kRows;
    dequantize(l.v, slice + at.v_codes, slice + at.v_scales, slice + at.v_zeros, l.page_dtype, d, l.block_size, t,
               t + count, rows);
    accumulate_rows(rows, KV_F32, d, count, d, weights + t, stride, group, sums);
  }
}

// ---- the rest

float exp_sum(float *x, int n, float max) {
  const __m256 least = _mm256_set1_ps(-87);
  __m256 sum = _mm256_setzero_ps();
  for (int t = 0; t < n; t += 8) {
    const __m256i mask = lanes(n - t);
    const __m256 in = _mm256_maskload_ps(x + t, mask), d = _mm256_sub_ps(in, _mm256_set1_ps(max));
    const __m256 gone = _mm256_or_ps(_mm256_cmp_ps(d, least, _CMP_LT_OQ),
                                     _mm256_cmp_ps(in, _mm256_set1_ps(-INFINITY), _CMP_EQ_OQ));
    const __m256 v = _mm256_max_ps(least, d);
    const __m256 power =
        _mm256_round_ps(_mm256_mul_ps(v, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 r = _mm256_fnmadd_ps(power, _mm256_set1_ps(-2.12194440e-4f),
                                      _mm256_fnmadd_ps(power, _mm256_set1_ps(0.693359375f), v));
    __m256 p = _mm256_set1_ps(1.0f / 720);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1));
    const __m256i exponent =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127)), 23);
    const __m256 y = _mm256_andnot_ps(gone, _mm256_mul_ps(p, _mm256_castsi256_ps(exponent)));
    _mm256_maskstore_ps(x + t, mask, y);
    sum = _mm256_add_ps(sum, _mm256_and_ps(y, _mm256_castsi256_ps(mask)));
  }
  return sum_of(sum);
}

float max_of(const float *x, int n) {
  __m256 most = _mm256_set1_ps(-INFINITY);
  int t = 0;
  for (; t + 8 <= n; t += 8) most = _mm256_max_ps(most, _mm256_loadu_ps(x + t));
  alignas(32) float part[8];
  _mm256_store_ps(part, most);
  float out = part[0];
  for (int i = 1; i < 8; ++i) out = part[i] > out ? part[i] : out;
  for (; t < n; ++t) out = x[t] > out ? x[t] : out;
  return out;
}

template <int Second>
inline __m256 butterfly(__m256 x, __m256 partner) {
  return _mm256_blend_ps(_mm256_add_ps(x, partner), _mm256_sub_ps(partner, x), Second);
}

void hadamard(float *x, int64_t rows, int head_dim) {
  const int block = head_dim & -head_dim, vectors = block / 8;
  const __m256 norm = _mm256_set1_ps((float)pow((double)block, -0.5));
  for (int64_t at = 0; at < rows * head_dim; at += block) {
    __m256 v[KV_MAX_HEAD_DIM / 8];
    for (int i = 0; i < vectors; ++i) {
      __m256 y = _mm256_loadu_ps(x + at + 8 * i);
      y = butterfly<0xAA>(y, _mm256_permute_ps(y, 0xB1));
      y = butterfly<0xCC>(y, _mm256_permute_ps(y, 0x4E));
      v[i] = butterfly<0xF0>(y, _mm256_permute2f128_ps(y, y, 1));
    }
    for (int step = 1; step < vectors; step *= 2)
      for (int i = 0; i < vectors; ++i)
        if (!(i & step)) {
          const __m256 a = v[i], b = v[i + step];
          v[i] = _mm256_add_ps(a, b);
          v[i + step] = _mm256_sub_ps(a, b);
        }
    for (int i = 0; i < vectors; ++i) _mm256_storeu_ps(x + at + 8 * i, _mm256_mul_ps(v[i], norm));
  }
}

const PageOps kOps = {"avx2", keep_query, score_each<score_page>, accumulate_each<accumulate_page>,
                      add_mean_plain, keep_mean_steps, score_rows, accumulate_rows,
                      exp_sum, max_of,     dequantize,      hadamard, int4_tiles<Avx2Lanes>};

}  // namespace

const PageOps *avx2_ops() { return &kOps; }

}  // namespace kvrt

#else

namespace kvrt {
const PageOps *avx2_ops() { return nullptr; }
}  // namespace kvrt

#endif
