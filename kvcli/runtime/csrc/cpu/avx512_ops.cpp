// The inner loops for AVX-512 (F, BW, DQ, VL, VBMI, VNNI). Compile with -ffp-contract=off: fused operations are written
// out where they are wanted, and dequantize and hadamard must round like the reference.
#include "page_ops.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512VBMI__) && defined(__AVX512VNNI__)

#include <math.h>
#include <string.h>

#include "avx512_int4.h"
#include "avx512_rows.h"
#include "avx512_values.h"
#include "f16c_scales.h"
#include "page_runs.h"

namespace kvrt {
namespace {

// ---- any format, one row at a time

struct RowSpread {
  Bytes64 index, shift;
};

constexpr RowSpread row_spread(int bits) {
  RowSpread s{};
  for (int i = 0; i < 64; ++i) {
    s.index.at[i] = uint8_t(i / 8 * bits + (i % 8 < bits ? i % 8 : 0));
    s.shift.at[i] = uint8_t(i % 8 * bits);
  }
  return s;
}
constexpr RowSpread kRow[5] = {row_spread(0), row_spread(1), row_spread(2), row_spread(3), row_spread(4)};

// Up to 64 codes as bytes.
inline __m512i unpack_row(const uint8_t *from, int count, int bits) {
  const int bytes = count * bits / 8;
  const __m512i packed = _mm512_maskz_loadu_epi8(bytes >= 64 ? ~0ull : (1ull << bytes) - 1, from);
  if (bits == 8) return packed;
  const __m512i spread = _mm512_permutexvar_epi8(kRow[bits].index, packed);
  return _mm512_and_si512(_mm512_multishift_epi64_epi8(kRow[bits].shift, spread), _mm512_set1_epi8((1 << bits) - 1));
}

void dequantize(const kv_format &f, const uint8_t *codes, const uint8_t *scales, const uint8_t *zeros, int page_dtype,
                int head_dim, int, int first, int last, float *out) {
  const int64_t row_bytes = kv_row_bytes(&f, head_dim);
  if (kv_is_exact(&f)) {
    const int dtype = f.bits == 32 ? KV_F32 : page_dtype;
    for (int t = first; t < last; ++t)
      for (int c = 0; c < head_dim; c += 16) {
        const __mmask16 mask = head_dim - c >= 16 ? 0xFFFF : 0xFF;
        _mm512_mask_storeu_ps(out + (int64_t)(t - first) * head_dim + c, mask,
                              load_row(codes + t * row_bytes, dtype, c, mask));
      }
    return;
  }
  const bool e5m3 = f.scale_dtype == KV_SCALE_E5M3, one = f.axis == KV_TOKEN && f.group == head_dim;
  alignas(64) float scale[KV_MAX_HEAD_DIM + 8], zero[KV_MAX_HEAD_DIM + 8];
  const __m512 offset = _mm512_set1_ps(0.5f * ((1 << f.bits) - 1)), levels = _mm512_loadu_ps(f.levels);
  for (int t = first; t < last; ++t) {
    __m512 s = offset, z = offset;
    if (one) {
      s = _mm512_set1_ps(half_at(scales, t, e5m3));
      if (!f.symmetric) z = _mm512_set1_ps(half_at(zeros, t, false));
    } else if (f.axis == KV_TOKEN || t == first || t % f.group == 0) {
      row_scales(f, scales, e5m3, head_dim, t, scale);
      if (!f.symmetric) row_scales(f, zeros, false, head_dim, t, zero);
    }
    float *to = out + (int64_t)(t - first) * head_dim;
    for (int c0 = 0; c0 < head_dim; c0 += 64) {
      const int count = head_dim - c0 < 64 ? head_dim - c0 : 64;
      alignas(64) uint8_t bytes[64];
      _mm512_store_si512(bytes, unpack_row(codes + t * row_bytes + c0 * f.bits / 8, count, f.bits));
      for (int i = 0; i < count; i += 16) {
        const __m512i code = _mm512_cvtepu8_epi32(_mm_load_si128((const __m128i *)(bytes + i)));
        if (!one) s = _mm512_load_ps(scale + c0 + i);
        __m512 x;
        if (f.table) {
          x = _mm512_mul_ps(_mm512_permutexvar_ps(code, levels), s);
        } else if (f.symmetric) {
          x = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(code), offset), s);
        } else {
          if (!one) z = _mm512_load_ps(zero + c0 + i);
          x = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(code), s), z);
        }
        _mm512_mask_storeu_ps(to + c0 + i, count - i >= 16 ? 0xFFFF : 0xFF, x);
      }
    }
  }
}

// ---- pages

using PrepareHeads = void (*)(const kv_format &, const float *, int, uint8_t *);
using ScoreHeads = void (*)(const Section &, const float *, const uint8_t *, int, int, float *, int);
using AccumulateHeads = void (*)(const Section &, const float *, int, int, int, float *);
struct Heads {
  PrepareHeads prepare[kHeads];
  ScoreHeads score[kHeads];
  AccumulateHeads accumulate[kHeads];
};

template <int Bits, bool Dense>
constexpr Heads heads() {
  return {{prepare_heads<Bits, Dense, 1>, prepare_heads<Bits, Dense, 2>, prepare_heads<Bits, Dense, 3>,
           prepare_heads<Bits, Dense, 4>},
          {score_heads<Bits, Dense, 1>, score_heads<Bits, Dense, 2>, score_heads<Bits, Dense, 3>,
           score_heads<Bits, Dense, 4>},
          {accumulate_heads<Bits, Dense, 1>, accumulate_heads<Bits, Dense, 2>, accumulate_heads<Bits, Dense, 3>,
           accumulate_heads<Bits, Dense, 4>}};
}

constexpr Heads kHeadLoops[3][2] = {
    {heads<2, false>(), heads<2, true>()}, {heads<3, false>(), heads<3, true>()}, {heads<4, false>(), heads<4, true>()}};
constexpr Heads kHeadLoops8 = heads<8, false>();

// Null where a tile of 16 tokens or a step of 16 channels would straddle groups, and for tables whose levels are no bytes.
const Heads *loops_for(const kv_format &f, int head_dim) {
  if (kv_is_exact(&f) || head_dim % 16 || f.group % 16 || (f.table && !f.level_steps)) return nullptr;
  if (f.bits == 8) return &kHeadLoops8;
  return &kHeadLoops[f.bits - 2][head_dim == 64 && (f.axis == KV_CHANNEL || f.group == 64)];
}

constexpr int kRows = 8;  // decoded at once where there is no loop for a format

void score_page(const kv_layer &l, const kv_page_layout &at, const uint8_t *slice, const float *query, int group,
                int first, int last, float *scores, int stride) {
  const int d = l.head_dim;
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
  float rows[kRows * KV_MAX_HEAD_DIM];
  for (int t = first; t < last; t += kRows) {
    const int count = last - t < kRows ? last - t : kRows;
    dequantize(l.v, slice + at.v_codes, slice + at.v_scales, slice + at.v_zeros, l.page_dtype, d, l.block_size, t,
               t + count, rows);
    accumulate_rows(rows, KV_F32, d, count, d, weights + t, stride, group, sums);
  }
}

int at_once(int heads) { return heads < kHeads ? heads : kHeads; }

void prepare_query(const kv_layer &l, const float *query, int group, uint8_t *prepared) {
  const Heads *loops = loops_for(l.k, l.head_dim);
  for (int g = 0; loops && g < group; g += kHeads)
    loops->prepare[at_once(group - g) - 1](l.k, query + (int64_t)g * l.head_dim, l.head_dim,
                                           prepared + g / kHeads * kPrepared);
}

void score_pages(const kv_layer &l, const kv_page_layout &at, const uint8_t *const *slices, const float *query,
                 const uint8_t *prepared, int group, int first, int last, float *scores, int stride) {
  const Heads *loops = loops_for(l.k, l.head_dim);
  if (!loops) return score_each<score_page>(l, at, slices, query, prepared, group, first, last, scores, stride);
  const Section s(l, l.k, slices, at.k_codes, at.k_scales, at.k_zeros, at.v_codes, first, last);
  for (int g = 0; g < group && first < last; g += kHeads)
    loops->score[at_once(group - g) - 1](s, query + (int64_t)g * l.head_dim, prepared + g / kHeads * kPrepared, first,
                                         last, scores + (int64_t)g * stride, stride);
}

void accumulate_pages(const kv_layer &l, const kv_page_layout &at, const uint8_t *const *slices, const float *weights,
                      int stride, int group, int first, int last, float *sums) {
  const Heads *loops = loops_for(l.v, l.head_dim);
  if (!loops) return accumulate_each<accumulate_page>(l, at, slices, weights, stride, group, first, last, sums);
  const Section s(l, l.v, slices, at.v_codes, at.v_scales, at.v_zeros, at.head_bytes, first, last);
  for (int g = 0; g < group && first < last; g += kHeads)
    loops->accumulate[at_once(group - g) - 1](s, weights + (int64_t)g * stride, stride, first,
                                                                     last, sums + (int64_t)g * l.head_dim);
}

const PageOps kOps = {"avx512",  prepare_query, score_pages, accumulate_pages,
                      add_mean_scores, pack_mean_steps, score_rows, accumulate_rows,
                      exp_sum,   max_of,      dequantize,       hadamard, int4_tiles<Avx512Lanes>};

}  // namespace

const PageOps *avx512_ops() { return &kOps; }

}  // namespace kvrt

#else

namespace kvrt {
const PageOps *avx512_ops() { return nullptr; }
}  // namespace kvrt

#endif
