// score_page and accumulate_page over codes for AVX-512, in integers.
//
// The query (or the weights) is quantised to 16 bits with its own scale and multiplied by the codes exactly. A uniform
// grid needs its codes only, as unsigned bytes: two vpdpbusd take the query's upper and lower byte. Levels of a table
// are 14-bit (keys) or 15-bit (values) integers, and one vpdpwssd takes pairs of them. Sixteen tokens are a tile.
//
//   x = sum * unit + bias        unit: of the integers; bias: what the codes' offset (top / 2) or zero points add
#pragma once

#include "avx512_unpack.h"
#include "kv_layout.h"

namespace kvrt {
namespace {

constexpr int kTile = 16;          // tokens
constexpr int kHeads = 4;          // query heads taken at once
constexpr float kScoreLevelTop = 8191, kValueLevelTop = 16383;  // of values: 8 tokens * 0.995 * 2^14 * 16383 < 2^31

__m512 load_scales(const uint8_t *scales, int scale_dtype, int64_t at) {
  if (scale_dtype == KV_SCALE_F16) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(scales + 2 * at)));
  const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(scales + at)));
  return _mm512_cvtph_ps(_mm256_slli_epi16(bytes, 7));
}

// Scales or zeros of a tile's tokens on the token axis: [tokens][groups], column `group`.
__m512 load_column(const uint8_t *scales, int scale_dtype, int64_t token, int groups, int group) {
  if (groups == 1) return load_scales(scales, scale_dtype, token);
  float buffer[kTile * KV_MAX_HEAD_DIM / 16];
  for (int i = 0; i < groups; ++i)
    _mm512_storeu_ps(buffer + 16 * i, load_scales(scales, scale_dtype, token * groups + 16 * i));
  const __m512i steps = _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(groups));
  return _mm512_i32gather_ps(steps, buffer + group, 4);
}

struct Section {
  const uint8_t *codes, *scales, *zeros;
  const kv_format *format;
  int head_dim, block_size;
  int64_t row_bytes;
};

__m512i word_levels(const kv_format &f, float level_top, float *unit) {  // 32 words; a code may have bits of its neighbour above it
  const int count = 1 << f.bits;
  const float top = f.levels[count - 1] > -f.levels[0] ? f.levels[count - 1] : -f.levels[0];  // they rise
  *unit = top / level_top;
  const __m512 scale = _mm512_set1_ps(top > 0 ? level_top / top : 0);
  const __m512i index = _mm512_and_si512(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(count - 1));
  const __m512 levels = _mm512_permutexvar_ps(index, _mm512_loadu_ps(f.levels));
  const __m256i words = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(levels, scale)));
  return _mm512_inserti64x4(_mm512_castsi256_si512(words), words, 1);
}

// A power of two that takes `most` to at most 2^bits, short of it by a two-hundredth so that bytes hold it; its inverse.
inline float integer_factor(float most, float bits, float *unit) {
  const __m128 x = _mm_set_ss(most > 1e-30f ? most : 1e-30f), exponent = _mm_getexp_ss(x, x);
  const __m128 power = _mm_sub_ss(_mm_set_ss(bits - 1), exponent);
  *unit = _mm_cvtss_f32(_mm_scalef_ss(_mm_set_ss(1 / 0.995f), _mm_sub_ss(_mm_setzero_ps(), power)));
  return _mm_cvtss_f32(_mm_scalef_ss(_mm_set_ss(0.995f), power));
}

// 16 integers as the upper bytes, then the (signed) lower bytes.
inline void store_bytes(__m512i x, int8_t *out) {
  const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
  _mm_store_si128((__m128i *)out, _mm512_cvtepi32_epi8(upper));
  _mm_store_si128((__m128i *)(out + 16), _mm512_cvtepi32_epi8(x));
}

// ---- scores

struct alignas(64) Query {               // of up to kHeads heads
  int8_t q[KV_MAX_HEAD_DIM / 16][kHeads][32];  // 16 channels: upper and lower bytes, or 16 words
  float unit[KV_MAX_HEAD_DIM / 16][kHeads], bias[KV_MAX_HEAD_DIM / 16][kHeads];  // of each group of channels
  float sum[KV_MAX_HEAD_DIM / 16][kHeads];
};

// Quantise channels c0 ... c1-1 of `heads` query heads as group `group`; scale, zero: of each channel, or null.
template <int Bits, bool Words>
void quantize_query(const Section &s, const float *query, int heads, int c0, int c1, int group, const float *scale,
                    const float *zero, float level_unit, Query *out) {
  const bool symmetric = s.format->symmetric;
  for (int g = 0; g < heads; ++g) {
    const float *q = query + (int64_t)g * s.head_dim;
    __m512 top = _mm512_setzero_ps(), sum = top, zeros = top, size = top;
    __m512 x[KV_MAX_HEAD_DIM / 16];
    for (int c = c0; c < c1; c += 16) {
      __m512 v = _mm512_loadu_ps(q + c);
      if (!symmetric) {
        sum = _mm512_add_ps(sum, v);
        if (zero) zeros = _mm512_fmadd_ps(v, _mm512_loadu_ps(zero + c), zeros);
      }
      if (scale) v = _mm512_mul_ps(v, _mm512_loadu_ps(scale + c));
      x[(c - c0) / 16] = v;
      const __m512 a = _mm512_abs_ps(v);
      top = _mm512_max_ps(top, a);
      if (Words) size = _mm512_add_ps(size, a);
    }
    const float most = _mm512_reduce_max_ps(top);
    float unit, factor = integer_factor(most, 15, &unit);
    if (Words) {  // the sum of all products stays below 2^31
      const float total = _mm512_reduce_add_ps(size) * factor * kScoreLevelTop;
      if (total > 2.1e9f) factor *= 2.1e9f / total, unit = 1 / factor;
    }
    const __m512 f = _mm512_set1_ps(factor);
    __m512i total = _mm512_setzero_si512();
    for (int c = c0; c < c1; c += 16) {
      const __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(x[(c - c0) / 16], f));
      int8_t *to = out->q[c / 16][g];
      if (Words) {
        _mm256_store_si256((__m256i *)to, _mm512_cvtepi32_epi16(n));
      } else {
        total = _mm512_add_epi32(total, n);
        store_bytes(n, to);
      }
    }
    out->unit[group][g] = Words ? unit * level_unit : unit;
    out->bias[group][g] = 0;
    if (!symmetric) {
      out->sum[group][g] = _mm512_reduce_add_ps(sum);
      if (zero) out->bias[group][g] = _mm512_reduce_add_ps(zeros);
    } else if (!Words) {
      out->bias[group][g] = -0.5f * ((1 << Bits) - 1) * (float)_mm512_reduce_add_epi32(total) * unit;
    }
  }
}

// The last query of this thread on the token axis, quantised: the pages of a head come one after another, and comparing
// it whole is several times faster than quantising it for each.
struct alignas(64) QueryCache {
  float query[kHeads * KV_MAX_HEAD_DIM];
  Query quantized;
  int64_t format;  // 0: none
  float level_unit;
};
thread_local QueryCache last_query;

template <int Bits, bool Words, int G>
const Query &quantized_query(const Section &s, const float *query, int width, float level_unit) {
  QueryCache &cache = last_query;
  const int count = G * s.head_dim;
  const int64_t kind = (((int64_t)Bits * 2 + Words) * 2 + !!s.format->symmetric) * 8 + G;
  const int64_t format = kind << 32 | s.head_dim << 16 | width;
  __m512i differ = _mm512_setzero_si512();
  for (int i = 0; i < count; i += 16)  // differ | (a ^ b)
    differ = _mm512_ternarylogic_epi32(differ, _mm512_loadu_si512(query + i), _mm512_load_si512(cache.query + i), 0xF6);
  if (cache.format == format && cache.level_unit == level_unit && !_mm512_test_epi32_mask(differ, differ))
    return cache.quantized;
  for (int i = 0; i < count; i += 16) _mm512_store_ps(cache.query + i, _mm512_loadu_ps(query + i));
  for (int i = 0; i < s.head_dim / width; ++i)
    quantize_query<Bits, Words>(s, query, G, i * width, (i + 1) * width, i, nullptr, nullptr, level_unit,
                                &cache.quantized);
  cache.format = format, cache.level_unit = level_unit;
  return cache.quantized;
}

// Integer sums over channels c0 ... c1-1 of 16 rows: lane t of out[g] is that of row t.
template <int Bits, bool Words, bool Dense, int G>
inline void score_tile(const uint8_t *rows, int64_t row_bytes, int c0, int c1, const Query &query, __m512i levels,
                       __m512i (&out)[G]) {
  __m512i sums[4][G];
#pragma GCC unroll 4
  for (int quad = 0; quad < 4; ++quad) {
    __m512i high[G], low[G];
    for (int g = 0; g < G; ++g) high[g] = low[g] = _mm512_setzero_si512();
    const uint8_t *row = rows + 4 * quad * row_bytes;
    for (int c = c0; c < c1; c += 64) {
      const int steps = Dense || c + 64 <= c1 ? 4 : (c1 - c) / 16;
      Unpack<Bits, Dense> codes;
      codes.load(row + c * Bits / 8, row_bytes, 2 * Bits * steps);
      const auto step = [&](int j) __attribute__((always_inline)) {
        const auto &q = query.q[c / 16 + j];
        if constexpr (Words) {
          const __m512i x = codes.score_words(2 * j, levels), y = codes.score_words(2 * j + 1, levels);
          for (int g = 0; g < G; ++g) {
            high[g] = _mm512_dpwssd_epi32(high[g], x, _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)q[g])));
            low[g] = _mm512_dpwssd_epi32(low[g], y, _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)q[g] + 1)));
          }
        } else {
          const __m512i x = codes.score_bytes(j);
          for (int g = 0; g < G; ++g) {
            high[g] = _mm512_dpbusd_epi32(high[g], x, _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)q[g])));
            low[g] = _mm512_dpbusd_epi32(low[g], x, _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)q[g] + 1)));
          }
        }
      };
      if (steps == 4) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) step(j);
      } else {
        for (int j = 0; j < steps; ++j) step(j);
      }
    }
    for (int g = 0; g < G; ++g)
      sums[quad][g] = _mm512_add_epi32(Words ? high[g] : _mm512_slli_epi32(high[g], 8), low[g]);
  }
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int g = 0; g < G; ++g) {  // lane (token, part) of four quads to lane (token, quad), parts added
    const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(sums[0][g], sums[1][g]),
                                       _mm512_unpackhi_epi32(sums[0][g], sums[1][g]));
    const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(sums[2][g], sums[3][g]),
                                       _mm512_unpackhi_epi32(sums[2][g], sums[3][g]));
    const __m512i c = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    out[g] = _mm512_permutexvar_epi32(order, c);
  }
}

inline __mmask16 tile_mask(int tile, int first, int last) {
  __mmask16 mask = 0xFFFF;
  if (tile < first) mask = __mmask16(mask << (first - tile));
  if (tile + kTile > last) mask = __mmask16(mask & ((1u << (last - tile)) - 1));
  return mask;
}

template <int Bits, bool Words, bool Dense, int G>
void score_heads(const Section &s, const float *query, int first, int last, float *scores, int stride) {
  const kv_format &f = *s.format;
  const bool by_token = f.axis == KV_TOKEN;
  const int width = by_token ? f.group : s.head_dim, groups = s.head_dim / width;
  float level_unit = 1;
  const __m512i levels = Words ? word_levels(f, kScoreLevelTop, &level_unit) : _mm512_setzero_si512();
  Query folded;  // with the scales of the channels
  const Query &q = by_token ? quantized_query<Bits, Words, G>(s, query, width, level_unit) : folded;
  int run = -1;
  for (int tile = first / kTile * kTile; tile < last; tile += kTile) {
    if (!by_token && tile / f.group != run) {
      run = tile / f.group;
      alignas(64) float scale[KV_MAX_HEAD_DIM], zero[KV_MAX_HEAD_DIM];
      for (int c = 0; c < s.head_dim; c += 16) {
        _mm512_store_ps(scale + c, load_scales(s.scales, f.scale_dtype, (int64_t)run * s.head_dim + c));
        if (!f.symmetric)
          _mm512_store_ps(zero + c, load_scales(s.zeros, KV_SCALE_F16, (int64_t)run * s.head_dim + c));
      }
      quantize_query<Bits, Words>(s, query, G, 0, s.head_dim, 0, scale, f.symmetric ? nullptr : zero, level_unit,
                                  &folded);
    }
    __m512 total[G];
    for (int i = 0; i < groups; ++i) {
      __m512i sums[G];
      score_tile<Bits, Words, Dense>(s.codes + tile * s.row_bytes, s.row_bytes, i * width, (i + 1) * width, q, levels,
                                     sums);
      __m512 scale = _mm512_setzero_ps(), zero = scale;
      if (by_token) scale = load_column(s.scales, f.scale_dtype, tile, groups, i);
      if (by_token && !f.symmetric) zero = load_column(s.zeros, KV_SCALE_F16, tile, groups, i);
      for (int g = 0; g < G; ++g) {
        __m512 x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[g]), _mm512_set1_ps(q.unit[i][g]),
                                   _mm512_set1_ps(q.bias[i][g]));
        if (by_token) x = _mm512_mul_ps(x, scale);
        if (by_token && !f.symmetric) x = _mm512_fmadd_ps(_mm512_set1_ps(q.sum[i][g]), zero, x);
        total[g] = i ? _mm512_add_ps(total[g], x) : x;
      }
    }
    const __mmask16 mask = tile_mask(tile, first, last);
    for (int g = 0; g < G; ++g) _mm512_mask_storeu_ps(scores + (int64_t)g * stride + tile, mask, total[g]);
  }
}

// ---- values

template <int G>
struct alignas(64) Weights {  // of a tile, for one group of channels
  int8_t w[G][32];            // 16 tokens: upper and lower bytes, or 16 words
  float unit[G], bias[G], sum[G];
};

template <int Bits, bool Words, int G>
inline void quantize_weights(const float *weights, int stride, __mmask16 mask, const __m512 *scale, const __m512 *zero,
                             bool symmetric, float level_unit, Weights<G> *out) {
  for (int g = 0; g < G; ++g) {
    const __m512 w = _mm512_maskz_loadu_ps(mask, weights + (int64_t)g * stride);
    const __m512 x = scale ? _mm512_maskz_mul_ps(mask, w, *scale) : w;
    const float most = _mm512_reduce_max_ps(_mm512_abs_ps(x));
    float unit;
    const float factor = integer_factor(most, Words ? 14 : 15, &unit);
    const __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(factor)));
    if (Words) {
      _mm256_store_si256((__m256i *)out->w[g], _mm512_cvtepi32_epi16(n));
    } else {
      store_bytes(n, out->w[g]);
    }
    out->unit[g] = Words ? unit * level_unit : unit;
    out->bias[g] = out->sum[g] = 0;
    if (!symmetric) {
      out->sum[g] = _mm512_reduce_add_ps(w);
      if (zero) out->bias[g] = _mm512_reduce_add_ps(_mm512_maskz_mul_ps(mask, w, *zero));
    } else if (!Words) {
      out->bias[g] = -0.5f * ((1 << Bits) - 1) * (float)_mm512_reduce_add_epi32(n) * unit;
    }
  }
}

// sums[g][c] += what a tile adds; scale, zero: of the run's channels, or null.
template <int Bits, bool Words, bool Dense, int G>
inline void accumulate_tile(const uint8_t *rows, int64_t row_bytes, int c0, int c1, const Weights<G> &w,
                            __m512i levels, const float *scale, const float *zero, float *sums, int head_dim) {
  for (int c = c0; c < c1; c += 64) {
    const int steps = Dense || c + 64 <= c1 ? 4 : (c1 - c) / 16;
    Unpack<Bits, Dense> codes[4];
    for (int i = 0; i < 4; ++i) codes[i].load(rows + 4 * i * row_bytes + c * Bits / 8, row_bytes, 2 * Bits * steps);
    for (int j = 0; j < steps; ++j) {
      __m512i high[G], low[G];
      for (int g = 0; g < G; ++g) high[g] = low[g] = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if constexpr (Words) {
          const __m512i x = Unpack<Bits, Dense>::value_words(j, codes[i].low, levels);
          const __m512i y = Unpack<Bits, Dense>::value_words(j, codes[i].high, levels);
          for (int g = 0; g < G; ++g) {
            high[g] = _mm512_dpwssd_epi32(high[g], x, _mm512_set1_epi32(((const int32_t *)w.w[g])[2 * i]));
            low[g] = _mm512_dpwssd_epi32(low[g], y, _mm512_set1_epi32(((const int32_t *)w.w[g])[2 * i + 1]));
          }
        } else {
          const __m512i x = codes[i].value_bytes(j);
          for (int g = 0; g < G; ++g) {
            high[g] = _mm512_dpbusd_epi32(high[g], x, _mm512_set1_epi32(((const int32_t *)w.w[g])[i]));
            low[g] = _mm512_dpbusd_epi32(low[g], x, _mm512_set1_epi32(((const int32_t *)w.w[g])[4 + i]));
          }
        }
      }
      for (int g = 0; g < G; ++g) {
        const __m512 n = Words ? _mm512_add_ps(_mm512_cvtepi32_ps(high[g]), _mm512_cvtepi32_ps(low[g]))
                               : _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[g], 8), low[g]));
        float *to = sums + (int64_t)g * head_dim + c + 16 * j;
        const __m512 x = _mm512_fmadd_ps(n, _mm512_set1_ps(w.unit[g]), _mm512_set1_ps(w.bias[g]));
        __m512 y = _mm512_loadu_ps(to);
        y = scale ? _mm512_fmadd_ps(x, _mm512_load_ps(scale + c + 16 * j), y) : _mm512_add_ps(x, y);
        if (zero) y = _mm512_fmadd_ps(_mm512_set1_ps(w.sum[g]), _mm512_load_ps(zero + c + 16 * j), y);
        _mm512_storeu_ps(to, y);
      }
    }
  }
}

template <int Bits, bool Words, bool Dense, int G>
void accumulate_heads(const Section &s, const float *weights, int stride, int first, int last, float *sums) {
  const kv_format &f = *s.format;
  const bool by_token = f.axis == KV_TOKEN;
  const int width = by_token ? f.group : s.head_dim, groups = s.head_dim / width;
  float level_unit = 1;
  const __m512i levels = Words ? word_levels(f, kValueLevelTop, &level_unit) : _mm512_setzero_si512();
  alignas(64) float scale[KV_MAX_HEAD_DIM], zero[KV_MAX_HEAD_DIM];
  int run = -1;
  for (int tile = first / kTile * kTile; tile < last; tile += kTile) {
    const __mmask16 mask = tile_mask(tile, first, last);
    const uint8_t *rows = s.codes + tile * s.row_bytes;
    Weights<G> w;
    if (by_token) {
      for (int i = 0; i < groups; ++i) {
        const __m512 a = load_column(s.scales, f.scale_dtype, tile, groups, i);
        __m512 b = a;
        if (!f.symmetric) b = load_column(s.zeros, KV_SCALE_F16, tile, groups, i);
        quantize_weights<Bits, Words>(weights + tile, stride, mask, &a, f.symmetric ? nullptr : &b, f.symmetric,
                                      level_unit, &w);
        accumulate_tile<Bits, Words, Dense>(rows, s.row_bytes, i * width, (i + 1) * width, w, levels, nullptr, nullptr,
                                            sums, s.head_dim);
      }
      continue;
    }
    if (tile / f.group != run) {
      run = tile / f.group;
      for (int c = 0; c < s.head_dim; c += 16) {
        _mm512_store_ps(scale + c, load_scales(s.scales, f.scale_dtype, (int64_t)run * s.head_dim + c));
        if (!f.symmetric)
          _mm512_store_ps(zero + c, load_scales(s.zeros, KV_SCALE_F16, (int64_t)run * s.head_dim + c));
      }
    }
    quantize_weights<Bits, Words>(weights + tile, stride, mask, nullptr, nullptr, f.symmetric, level_unit, &w);
    accumulate_tile<Bits, Words, Dense>(rows, s.row_bytes, 0, s.head_dim, w, levels, scale,
                                        f.symmetric ? nullptr : zero, sums, s.head_dim);
  }
}

}  // namespace
}  // namespace kvrt
