// score_pages over codes for AVX-512: see avx512_codes.h for the arithmetic.
//
//   score = sum * unit + bias        unit: of the integers; bias: what zero points, or the offset of bytes, add
#pragma once

#include "avx512_codes.h"

namespace kvrt {
namespace {

struct alignas(64) Query {                     // of up to kHeads heads
  int8_t q[KV_MAX_HEAD_DIM / 16][kHeads][32];  // 16 channels an entry
  float unit[KV_MAX_HEAD_DIM / 16][kHeads], bias[KV_MAX_HEAD_DIM / 16][kHeads];  // of each group of channels
  float sum[KV_MAX_HEAD_DIM / 16][kHeads];
};

inline void sizes(const float *q, int c0, int c1, float *most, float *size) {
  __m512 top = _mm512_setzero_ps(), sum = top;
  for (int c = c0; c < c1; c += 16) {
    const __m512 a = _mm512_abs_ps(_mm512_loadu_ps(q + c));
    top = _mm512_max_ps(top, a);
    sum = _mm512_add_ps(sum, a);
  }
  *most = _mm512_reduce_max_ps(top);
  *size = _mm512_reduce_add_ps(sum);
}

// The query in integers, for the whole run: on the token axis the scales come in afterwards.
template <int Bits, int G>
void quantize_query(const Section &s, const float *query, int width, const Levels &levels, Query *out) {
  for (int i = 0; i < s.head_dim / width; ++i)
    for (int g = 0; g < G; ++g) {
      const float *q = query + (int64_t)g * s.head_dim;
      float most, size;
      sizes(q, i * width, (i + 1) * width, &most, &size);
      const float factor = operand_factor(most, size, levels.top);
      __m512 sum = _mm512_setzero_ps();
      __m512i total = _mm512_setzero_si512();
      for (int c = i * width; c < (i + 1) * width; c += 16) {
        const __m512 x = _mm512_loadu_ps(q + c);
        const __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(factor)));
        sum = _mm512_add_ps(sum, x);
        total = _mm512_add_epi32(total, n);
        store_operand<Bits>(n, out->q[c / 16][g]);
      }
      out->unit[i][g] = levels.unit / factor;
      out->sum[i][g] = s.format->symmetric ? 0 : _mm512_reduce_add_ps(sum);
      out->bias[i][g] = 0;
      if (Bits == 8 && s.format->symmetric)
        out->bias[i][g] = -127.5f * (float)_mm512_reduce_add_epi32(total) / factor;
    }
}

// On the channel axis the scales are folded in, anew for every group of tokens. Bounds on query and scales, not on their
// products, keep that to three operations for 16 channels; the products use a few of the 16 bits less.
struct alignas(64) ChannelQuery {
  float q[kHeads][KV_MAX_HEAD_DIM];  // times the factor
  float factor[kHeads];
};

template <int G>
void prepare_channels(const Section &s, const float *query, const Levels &levels, ChannelQuery *out) {
  for (int g = 0; g < G; ++g) {
    const float *q = query + (int64_t)g * s.head_dim;
    float most, size;
    sizes(q, 0, s.head_dim, &most, &size);
    out->factor[g] = operand_factor(most, size, levels.top);
    for (int c = 0; c < s.head_dim; c += 16)
      _mm512_store_ps(out->q[g] + c, _mm512_mul_ps(_mm512_loadu_ps(q + c), _mm512_set1_ps(out->factor[g])));
  }
}

template <int Bits, int G>
void fold_channels(const Section &s, const float *query, const uint8_t *slice, int run, const ChannelQuery &prepared,
                   const Levels &levels, Query *out) {
  const kv_format &f = *s.format;
  alignas(64) float scale[KV_MAX_HEAD_DIM], zero[KV_MAX_HEAD_DIM];
  float top = load_channels(slice + s.scales, f.scale_dtype, run, s.head_dim, scale);
  if (top < 1e-30f) top = 1e-30f;
  if (!f.symmetric) load_channels(slice + s.zeros, KV_SCALE_F16, run, s.head_dim, zero);
  const __m512 inverse = _mm512_set1_ps(1 / top);
  __m512i total[G];
  for (int g = 0; g < G; ++g) total[g] = _mm512_setzero_si512();
  for (int c = 0; c < s.head_dim; c += 16) {
    const __m512 x = _mm512_mul_ps(_mm512_load_ps(scale + c), inverse);
    for (int g = 0; g < G; ++g) {
      const __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_load_ps(prepared.q[g] + c)));
      if (Bits == 8) total[g] = _mm512_add_epi32(total[g], n);
      store_operand<Bits>(n, out->q[c / 16][g]);
    }
  }
  for (int g = 0; g < G; ++g) {
    const float unit = top / prepared.factor[g];
    out->unit[0][g] = unit * levels.unit;
    out->bias[0][g] = 0;
    if (!f.symmetric) {
      __m512 sum = _mm512_setzero_ps();
      for (int c = 0; c < s.head_dim; c += 16)
        sum = _mm512_fmadd_ps(_mm512_loadu_ps(query + (int64_t)g * s.head_dim + c), _mm512_load_ps(zero + c), sum);
      out->bias[0][g] = _mm512_reduce_add_ps(sum);
    } else if (Bits == 8) {
      out->bias[0][g] = -127.5f * (float)_mm512_reduce_add_epi32(total[g]) * unit;
    }
  }
}

inline __m512i query_part(const int8_t *q, int part) {
  return _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)q + part));
}

// Lane (token, part) of four quads of tokens to lane (token of the tile), parts added.
inline __m512i add_parts(__m512i a0, __m512i a1, __m512i a2, __m512i a3) {
  const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(a0, a1), _mm512_unpackhi_epi32(a0, a1));
  const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(a2, a3), _mm512_unpackhi_epi32(a2, a3));
  const __m512i c = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, c);
}

// Integer sums over channels c0 ... c1-1 of 16 rows: lane t of out[g] is that of row t. The query is loaded once for all
// rows, which leaves registers for one sum of four tokens and one head each.
template <int Bits, bool Dense, int G>
inline void score_tile(const uint8_t *rows, int64_t row_bytes, int c0, int c1, const Query &query, __m512i levels,
                       __m512i (&out)[G]) {
  if constexpr (Bits < 8) {
    __m512i sums[4][G];
    for (int i = 0; i < 4; ++i)
      for (int g = 0; g < G; ++g) sums[i][g] = _mm512_setzero_si512();
    for (int c = c0; c < c1; c += 64) {
      const int steps = Dense || c + 64 <= c1 ? 4 : (c1 - c) / 16;
      Unpack<Bits, Dense> codes[4];
      for (int i = 0; i < 4; ++i) codes[i].load(rows + 4 * i * row_bytes + c * Bits / 8, row_bytes, 2 * Bits * steps);
      const auto step = [&](int j) __attribute__((always_inline)) {
        const auto &q = query.q[c / 16 + j];
#pragma GCC unroll 2
        for (int part = 0; part < 2; ++part) {
          __m512i y[G];
          for (int g = 0; g < G; ++g) y[g] = query_part(q[g], part);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            const __m512i x = codes[i].score_words(2 * j + part, levels);
            for (int g = 0; g < G; ++g) sums[i][g] = _mm512_dpwssd_epi32(sums[i][g], x, y[g]);
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
    for (int g = 0; g < G; ++g) out[g] = add_parts(sums[0][g], sums[1][g], sums[2][g], sums[3][g]);
  } else {
    __m512i sums[4][G];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      __m512i high[G], low[G];
      for (int g = 0; g < G; ++g) high[g] = low[g] = _mm512_setzero_si512();
      Unpack<8, Dense> codes;
      codes.load(rows + 4 * i * row_bytes, row_bytes, 0);
      for (int c = c0; c < c1; c += 16) {
        const __m512i x = codes.score_bytes(c / 16);
        for (int g = 0; g < G; ++g) {
          high[g] = _mm512_dpbusd_epi32(high[g], x, query_part(query.q[c / 16][g], 0));
          low[g] = _mm512_dpbusd_epi32(low[g], x, query_part(query.q[c / 16][g], 1));
        }
      }
      for (int g = 0; g < G; ++g) sums[i][g] = _mm512_add_epi32(_mm512_slli_epi32(high[g], 8), low[g]);
    }
    for (int g = 0; g < G; ++g) out[g] = add_parts(sums[0][g], sums[1][g], sums[2][g], sums[3][g]);
  }
}

inline __mmask16 tile_mask(int tile, int first, int last) {
  __mmask16 mask = 0xFFFF;
  if (tile < first) mask = __mmask16(mask << (first - tile));
  if (tile + kTile > last) mask = __mmask16(mask & ((1u << (last - tile)) - 1));
  return mask;
}

template <int Bits, bool Dense, int G>
void score_heads(const Section &s, const float *query, int first, int last, float *scores, int stride) {
  const kv_format &f = *s.format;
  const bool by_token = f.axis == KV_TOKEN;
  const int width = by_token ? f.group : s.head_dim, groups = s.head_dim / width;
  const Levels levels = levels_of<Bits>(f, width);
  Query q;
  ChannelQuery channels;
  if (by_token) {
    quantize_query<Bits, G>(s, query, width, levels, &q);
  } else {
    prepare_channels<G>(s, query, levels, &channels);
  }
  int run = -1;
  for (int tile = first / kTile * kTile; tile < last; tile += kTile) {
    const uint8_t *slice = s.slice(tile);
    const int token = tile % s.block_size;
    s.fetch(tile);
    if (!by_token && tile / f.group != run) {  // a group divides a page
      run = tile / f.group;
      fold_channels<Bits, G>(s, query, slice, token / f.group, channels, levels, &q);
    }
    __m512 total[G];
    for (int i = 0; i < groups; ++i) {
      __m512i sums[G];
      score_tile<Bits, Dense>(s.rows(tile), s.row_bytes, i * width, (i + 1) * width, q, levels.words, sums);
      __m512 scale = _mm512_setzero_ps(), zero = scale;
      if (by_token) scale = load_column(slice + s.scales, f.scale_dtype, token, groups, i);
      if (by_token && !f.symmetric) zero = load_column(slice + s.zeros, KV_SCALE_F16, token, groups, i);
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

}  // namespace
}  // namespace kvrt
