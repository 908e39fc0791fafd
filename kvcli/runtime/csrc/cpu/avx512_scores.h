// score_pages over codes for AVX-512: see avx512_codes.h for the arithmetic.
//
//   score = sum * unit + bias        unit: of the integers; bias: what zero points, or the levels' offset, add
#pragma once

#include "avx512_codes.h"

namespace kvrt {
namespace {

constexpr int kPieces = 24;  // groups of channels cut into 64s

// The query in integers of two bytes. One byte would save a tenth of the time and be wrong by 0.6 % of the query's length,
// a sixteenth of what codes of four bits lose.
template <int G>
struct alignas(64) Query {
  int8_t q[kPieces][2][G][4][16];  // in the order of the codes' parts
  float unit[KV_MAX_HEAD_DIM / 16][G], bias[KV_MAX_HEAD_DIM / 16][G];  // of each group of channels
  float sum[KV_MAX_HEAD_DIM / 16][G];
};

inline __mmask16 within(int c, int c0, int c1) {  // of channels c ... c+15, those of c0 ... c1-1: all or none
  return c >= c0 && c < c1 ? 0xFFFF : 0;
}

// Where the upper byte of each of the four score parts of 64 channels is in TwoTerms' words.
template <int Bits, bool Dense>
constexpr Bytes64 score_order() {
  using U = Spreads<Bits, Dense>;
  Bytes64 b{};
  for (int i = 0; i < 64; ++i)
    b.at[i] = upper_byte(U::score_channel(i / 16 / U::kParts, i / 16 % U::kParts, i % 16));
  return b;
}

// 64 integers to bytes in the order of the codes' parts; adds them to total.
template <int Bits, bool Dense>
inline void store_query(const __m512i (&n)[4], int8_t (*out)[16], int64_t next_term, __m512i *total) {
  static constexpr Bytes64 kOrder = score_order<Bits, Dense>();
  const TwoTerms terms(n);
  *total = terms.add_to(*total);
  _mm512_store_si512(out, terms.upper(kOrder));
  _mm512_store_si512(out + next_term, terms.lower(kOrder));
}

inline float largest(const float *q, int c0, int c1) {
  __m512 top = _mm512_setzero_ps();
  for (int c = c0; c < c1; c += 16) top = _mm512_max_ps(top, _mm512_abs_ps(_mm512_loadu_ps(q + c)));
  return _mm512_reduce_max_ps(top);
}

// The query in integers, for the whole run: on the token axis the scales come in afterwards.
template <int Bits, bool Dense, int G>
void quantize_query(const kv_format &f, const float *query, int head_dim, int width, const Levels &levels,
                    Query<G> *out) {
  const float offset = f.symmetric ? levels.offset : -0.5f * levels.top;  // the less there is to round, the better
  int piece = 0;
  for (int i = 0, c0 = 0; c0 < head_dim; ++i, c0 += width) {
    const int first = c0 / 64, last = (c0 + width + 63) / 64;
    for (int g = 0; g < G; ++g) {
      const float *q = query + (int64_t)g * head_dim;
      const float factor = operand_factor(largest(q, c0, c0 + width));
      __m512 sum = _mm512_setzero_ps();
      __m512i total = _mm512_setzero_si512();
      for (int chunk = first; chunk < last; ++chunk) {
        __m512i n[4];
        for (int j = 0; j < 4; ++j) {
          const int c = 64 * chunk + 16 * j;
          const __m512 x = _mm512_maskz_loadu_ps(within(c, c0, c0 + width), q + c);
          sum = _mm512_add_ps(sum, x);
          n[j] = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(factor)));
        }
        store_query<Bits, Dense>(n, out->q[piece + chunk - first][0][g], int64_t(G) * 4, &total);
      }
      out->unit[i][g] = levels.unit / factor;
      out->sum[i][g] = f.symmetric ? 0 : _mm512_reduce_add_ps(sum);
      out->bias[i][g] = offset * (float)_mm512_reduce_add_epi32(total) * out->unit[i][g];
    }
    piece += last - first;
  }
}

// On the channel axis the scales are folded in, anew for every group of tokens. Bounds on query and scales, not on their
// products, keep that to three operations for 16 channels; the products use a few of the 16 bits less.
template <int G>
struct alignas(64) ChannelQuery {
  float q[G][KV_MAX_HEAD_DIM];  // times the factor
  float factor[G];
};

template <int G>
void prepare_channels(const float *query, int head_dim, ChannelQuery<G> *out) {
  for (int g = 0; g < G; ++g) {
    const float *q = query + (int64_t)g * head_dim;
    out->factor[g] = operand_factor(largest(q, 0, head_dim));
    for (int c = 0; c < head_dim; c += 16)
      _mm512_store_ps(out->q[g] + c, _mm512_mul_ps(_mm512_loadu_ps(q + c), _mm512_set1_ps(out->factor[g])));
  }
}

template <int Bits, bool Dense, int G>
void fold_channels(const Section &s, const float *query, const uint8_t *slice, int run, const ChannelQuery<G> &prepared,
                   const Levels &levels, Query<G> *out) {
  const kv_format &f = *s.format;
  alignas(64) float scale[KV_MAX_HEAD_DIM], zero[KV_MAX_HEAD_DIM];
  float top = load_channels(slice + s.scales, f.scale_dtype, run, s.head_dim, scale);
  if (top < 1e-30f) top = 1e-30f;
  if (!f.symmetric) load_channels(slice + s.zeros, KV_SCALE_F16, run, s.head_dim, zero);
  const __m512 inverse = _mm512_set1_ps(1 / top);
  __m512i total[G];
  for (int g = 0; g < G; ++g) total[g] = _mm512_setzero_si512();
  for (int chunk = 0; 64 * chunk < s.head_dim; ++chunk) {
    __m512 x[4];
    for (int j = 0; j < 4; ++j) {
      const int c = 64 * chunk + 16 * j;
      x[j] = _mm512_mul_ps(_mm512_maskz_load_ps(within(c, 0, s.head_dim), scale + c), inverse);
    }
    for (int g = 0; g < G; ++g) {
      __m512i n[4];
      for (int j = 0; j < 4; ++j) {
        const int c = 64 * chunk + 16 * j;
        n[j] = _mm512_cvtps_epi32(
            _mm512_mul_ps(x[j], _mm512_maskz_load_ps(within(c, 0, s.head_dim), prepared.q[g] + c)));
      }
      store_query<Bits, Dense>(n, out->q[chunk][0][g], int64_t(G) * 4, &total[g]);
    }
  }
  for (int g = 0; g < G; ++g) {
    const float unit = top / prepared.factor[g] * levels.unit;
    out->unit[0][g] = unit;
    out->bias[0][g] = 0;
    if (!f.symmetric) {
      __m512 sum = _mm512_setzero_ps();
      for (int c = 0; c < s.head_dim; c += 16)
        sum = _mm512_fmadd_ps(_mm512_loadu_ps(query + (int64_t)g * s.head_dim + c), _mm512_load_ps(zero + c), sum);
      out->bias[0][g] = _mm512_reduce_add_ps(sum);
    } else {
      out->bias[0][g] = levels.offset * (float)_mm512_reduce_add_epi32(total[g]) * unit;
    }
  }
}

// Lane (token, part) of four quads of tokens to lane (token of the tile), parts added.
inline __m512i add_parts(__m512i a0, __m512i a1, __m512i a2, __m512i a3) {
  const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(a0, a1), _mm512_unpackhi_epi32(a0, a1));
  const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(a2, a3), _mm512_unpackhi_epi32(a2, a3));
  const __m512i c = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, c);
}

// Integer sums over channels c0 ... c1-1 of 16 rows: lane t of out[g] is that of row t. A part of the query is loaded once
// for as many rows as leave registers for a sum of four tokens, a head and a term each.
template <int Bits, bool Dense, int G>
inline void score_tile(const uint8_t *rows, int64_t row_bytes, int head_dim, int c0, int c1,
                       const int8_t (*query)[2][G][4][16], __m512i levels, __m512i (&out)[G]) {
  using U = Unpack<Bits, Dense>;
  constexpr int kQuads = 2;
  __m512i sums[4][G];
#pragma GCC unroll 4
  for (int i0 = 0; i0 < 4; i0 += kQuads) {
    __m512i n[kQuads][2][G];
    for (int i = 0; i < kQuads; ++i)
      for (int k = 0; k < 2; ++k)
        for (int g = 0; g < G; ++g) n[i][k][g] = _mm512_setzero_si512();
    const auto spread_of = [&](const U(&codes)[kQuads], const int8_t(&q)[2][G][4][16], int s)
                               __attribute__((always_inline)) {
      __m512i x[kQuads];
      for (int i = 0; i < kQuads; ++i) x[i] = codes[i].score_spread(s);
#pragma GCC unroll 4
      for (int p = 0; p < U::kParts; ++p) {
        __m512i y[2][G];
        for (int k = 0; k < 2; ++k)
          for (int g = 0; g < G; ++g)
            y[k][g] = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)q[k][g][s * U::kParts + p]));
#pragma GCC unroll 4
        for (int i = 0; i < kQuads; ++i) {
          const __m512i part = U::score_part(x[i], p, levels);
          for (int k = 0; k < 2; ++k)
            for (int g = 0; g < G; ++g) add_products(n[i][k][g], part, y[k][g]);
        }
      }
    };
    for (int chunk = c0 / 64; 64 * chunk < c1; ++chunk) {
      U codes[kQuads];
      const int channels = Dense || head_dim - 64 * chunk >= 64 ? 64 : head_dim - 64 * chunk;
      for (int i = 0; i < kQuads; ++i)
        codes[i].load(rows + 4 * (i0 + i) * row_bytes + 8 * chunk * Bits, row_bytes, channels);
      const auto &q = query[chunk - c0 / 64];
      if (Dense || (c0 <= 64 * chunk && c1 >= 64 * chunk + 64)) {
#pragma GCC unroll 4
        for (int s = 0; s < U::kSpreads; ++s) spread_of(codes, q, s);
      } else {
        const int from = c0 > 64 * chunk ? (c0 - 64 * chunk) / U::kWidth : 0;
        for (int s = from; s < U::kSpreads && 64 * chunk + s * U::kWidth < c1; ++s) spread_of(codes, q, s);
      }
    }
    for (int i = 0; i < kQuads; ++i)
      for (int g = 0; g < G; ++g)
        sums[i0 + i][g] = _mm512_add_epi32(_mm512_slli_epi32(n[i][0][g], 8), n[i][1][g]);
  }
  for (int g = 0; g < G; ++g) out[g] = add_parts(sums[0][g], sums[1][g], sums[2][g], sums[3][g]);
}

inline __mmask16 tile_mask(int tile, int first, int last) {
  __mmask16 mask = 0xFFFF;
  if (tile < first) mask = __mmask16(mask << (first - tile));
  if (tile + kTile > last) mask = __mmask16(mask & ((1u << (last - tile)) - 1));
  return mask;
}

template <bool Dense>
inline int width_of(const kv_format &f, int head_dim) {
  return f.axis == KV_TOKEN && !Dense ? f.group : head_dim;
}

template <int Bits, bool Dense, int G>
void prepare_heads(const kv_format &f, const float *query, int head_dim, uint8_t *prepared) {
  static_assert(sizeof(Query<G>) <= kPrepared && sizeof(ChannelQuery<G>) <= kPrepared, "kPrepared is too small");
  if (f.axis == KV_CHANNEL) return prepare_channels<G>(query, head_dim, (ChannelQuery<G> *)prepared);
  quantize_query<Bits, Dense>(f, query, head_dim, width_of<Dense>(f, head_dim), levels_of<Bits>(f),
                              (Query<G> *)prepared);
}

template <int Bits, bool Dense, bool ByToken, int G>
void score_tiles(const Section &s, const float *query, const uint8_t *prepared, int first, int last, float *scores,
                 int stride) {
  const kv_format &f = *s.format;
  const int width = width_of<Dense>(f, s.head_dim), groups = Dense ? 1 : s.head_dim / width;
  const Levels levels = levels_of<Bits>(f);
  Query<ByToken ? 1 : G> folded;
  const auto &q = *(const Query<G> *)(ByToken ? (const void *)prepared : &folded);
  int run = -1;
  for (int at = first / kTile; at * kTile < last; ++at) {
    const int tile = at * kTile, token = s.tiles[at].token;
    const uint8_t *slice = s.tiles[at].slice;
    s.fetch(at);
    if constexpr (!ByToken) {
      if (tile >= run) {  // a group divides a page
        run = tile - token % f.group + f.group;
        const auto &channels = *(const ChannelQuery<G> *)prepared;
        fold_channels<Bits, Dense>(s, query, slice, token / f.group, channels, levels, &folded);
      }
    }
    __m512 total[G];
    int piece = 0;
    for (int i = 0, c0 = 0; i < groups; ++i, c0 += width) {
      __m512i sums[G];
      score_tile<Bits, Dense>(s.tiles[at].rows, s.row_bytes, s.head_dim, c0, c0 + width, &q.q[piece], levels.bytes,
                                      sums);
      piece += (c0 + width + 63) / 64 - c0 / 64;
      __m512 scale = _mm512_setzero_ps(), zero = scale;
      if (ByToken) scale = load_column(slice + s.scales, f.scale_dtype, token, groups, i);
      if (ByToken && !f.symmetric)
        zero = _mm512_fmadd_ps(scale, _mm512_set1_ps(0.5f * levels.top),
                               load_column(slice + s.zeros, KV_SCALE_F16, token, groups, i));
      for (int g = 0; g < G; ++g) {
        __m512 x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[g]), _mm512_set1_ps(q.unit[i][g]),
                                   _mm512_set1_ps(q.bias[i][g]));
        if (ByToken) x = _mm512_mul_ps(x, scale);
        if (ByToken && !f.symmetric) x = _mm512_fmadd_ps(_mm512_set1_ps(q.sum[i][g]), zero, x);
        total[g] = i ? _mm512_add_ps(total[g], x) : x;
      }
    }
    const __mmask16 mask = tile_mask(tile, first, last);
    for (int g = 0; g < G; ++g) _mm512_mask_storeu_ps(scores + (int64_t)g * stride + tile, mask, total[g]);
  }
}

template <int Bits, bool Dense, int G>
void score_heads(const Section &s, const float *query, const uint8_t *prepared, int first, int last, float *scores,
                 int stride) {
  if (s.format->axis == KV_TOKEN)
    return score_tiles<Bits, Dense, true, G>(s, query, prepared, first, last, scores, stride);
  score_tiles<Bits, Dense, false, G>(s, query, prepared, first, last, scores, stride);
}

}  // namespace
}  // namespace kvrt
