// Every inner loop in plain C++: what runs where there is nothing better, and the reference in C++ for what is better.
#include <cmath>
#include <limits>

#include "int4_byte.h"
#include "half.h"
#include "page_runs.h"

namespace kvrt {
namespace {

// Sums in eight lanes, in an order that vectorises and does not depend on whether it was.
float dot(const float *x, const float *y, int n) {
  float lane[8] = {0};
  int i = 0;
  for (; i + 8 <= n; i += 8)
    for (int k = 0; k < 8; k++) lane[k] += x[i + k] * y[i + k];
  float sum = ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
  for (; i < n; i++) sum += x[i] * y[i];
  return sum;
}

void add_scaled(float *sum, const float *x, float weight, int n) {
  for (int i = 0; i < n; i++) sum[i] += weight * x[i];
}

void unpack_row(const uint8_t *in, int n, int bits, uint8_t *codes) {
  if (bits == 8) {
    std::memcpy(codes, in, static_cast<size_t>(n));
  } else if (bits == 4) {
    for (int i = 0; i < n / 2; i++) {
      codes[2 * i] = in[i] & 15;
      codes[2 * i + 1] = in[i] >> 4;
    }
  } else if (bits == 2) {
    for (int i = 0; i < n / 4; i++)
      for (int k = 0; k < 4; k++) codes[4 * i + k] = in[i] >> (2 * k) & 3;
  } else {
    for (int i = 0; i < n / 8; i++) {
      uint32_t word = 0;
      for (int k = 0; k < 3; k++) word |= static_cast<uint32_t>(in[3 * i + k]) << (8 * k);
      for (int k = 0; k < 8; k++) codes[8 * i + k] = word >> (3 * k) & 7;
    }
  }
}

struct Section {
  const kv_format &f;
  const uint8_t *codes, *scales, *zeros;
  int page_dtype, head_dim;
};

float value(const kv_format &f, uint8_t code, float scale, float zero) {
  if (f.table) return f.levels[code & (KV_MAX_LEVELS - 1)] * scale;
  const float c = static_cast<float>(code);
  return f.symmetric ? (c - static_cast<float>((1 << f.bits) - 1) / 2) * scale : c * scale + zero;
}

// token t of a section as float32
void decode_row(const Section &s, int t, float *out) {
  const kv_format &f = s.f;
  const int d = s.head_dim;
  if (kv_is_exact(&f)) {
    load_row(s.codes, f.bits == 32 ? KV_F32 : s.page_dtype, static_cast<int64_t>(t) * d, d, out);
    return;
  }
  uint8_t codes[KV_MAX_HEAD_DIM];
  unpack_row(s.codes + t * kv_row_bytes(&f, d), d, f.bits, codes);
  if (f.axis == KV_CHANNEL) {
    const int64_t at = static_cast<int64_t>(t / f.group) * d;
    for (int c = 0; c < d; c++)
      out[c] = value(f, codes[c], decode_scale(f, s.scales, at + c), f.symmetric ? 0.0f : decode_zero(s.zeros, at + c));
    return;
  }
  const int groups = d / f.group;
  for (int g = 0; g < groups; g++) {
    const int64_t at = static_cast<int64_t>(t) * groups + g;
    const float scale = decode_scale(f, s.scales, at), zero = f.symmetric ? 0.0f : decode_zero(s.zeros, at);
    for (int c = g * f.group; c < (g + 1) * f.group; c++) out[c] = value(f, codes[c], scale, zero);
  }
}

void score_page(const kv_layer &layer, const kv_page_layout &at, const uint8_t *slice, const float *query, int group,
                int first, int last, float *scores, int stride) {
  const Section keys{layer.k, slice + at.k_codes, slice + at.k_scales, slice + at.k_zeros, layer.page_dtype,
                     layer.head_dim};
  float row[KV_MAX_HEAD_DIM];
  for (int t = first; t < last; t++) {
    decode_row(keys, t, row);
    for (int g = 0; g < group; g++) scores[g * stride + t] = dot(query + g * layer.head_dim, row, layer.head_dim);
  }
}

void accumulate_page(const kv_layer &layer, const kv_page_layout &at, const uint8_t *slice, const float *weights,
                     int stride, int group, int first, int last, float *sums) {
  const Section values{layer.v, slice + at.v_codes, slice + at.v_scales, slice + at.v_zeros, layer.page_dtype,
                       layer.head_dim};
  float row[KV_MAX_HEAD_DIM];
  for (int t = first; t < last; t++) {
    decode_row(values, t, row);
    for (int g = 0; g < group; g++) add_scaled(sums + g * layer.head_dim, row, weights[g * stride + t], layer.head_dim);
  }
}

void score_rows(const void *rows, int dtype, int64_t row_stride, int count, int head_dim, const float *query,
                int group, float *scores, int stride) {
  float row[KV_MAX_HEAD_DIM];
  for (int t = 0; t < count; t++) {
    load_row(rows, dtype, t * row_stride, head_dim, row);
    for (int g = 0; g < group; g++) scores[g * stride + t] = dot(query + g * head_dim, row, head_dim);
  }
}

void accumulate_rows(const void *rows, int dtype, int64_t row_stride, int count, int head_dim, const float *weights,
                     int stride, int group, float *sums) {
  float row[KV_MAX_HEAD_DIM];
  for (int t = 0; t < count; t++) {
    load_row(rows, dtype, t * row_stride, head_dim, row);
    for (int g = 0; g < group; g++) add_scaled(sums + g * head_dim, row, weights[g * stride + t], head_dim);
  }
}

float exp_sum(float *x, int n, float max) {
  float sum = 0.0f;
  for (int i = 0; i < n; i++) sum += x[i] = std::exp(x[i] - max);
  return sum;
}

float max_of(const float *x, int n) {
  float max = -std::numeric_limits<float>::infinity();
  for (int i = 0; i < n; i++) max = x[i] > max ? x[i] : max;
  return max;
}

void dequantize(const kv_format &format, const uint8_t *codes, const uint8_t *scales, const uint8_t *zeros,
                int page_dtype, int head_dim, int block_size, int first, int last, float *out) {
  (void)block_size;
  const Section section{format, codes, scales, zeros, page_dtype, head_dim};
  for (int t = first; t < last; t++) decode_row(section, t, out + static_cast<int64_t>(t - first) * head_dim);
}

void hadamard(float *x, int64_t rows, int head_dim) {
  const int block = head_dim & -head_dim;
  const float norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  for (int64_t r = 0; r < rows; r++, x += head_dim) {
    for (int stride = 1; stride < block; stride *= 2)
      for (int i = 0; i < head_dim; i += 2 * stride)
        for (int k = i; k < i + stride; k++) {
          const float a = x[k], b = x[k + stride];
          x[k] = a + b;
          x[k + stride] = a - b;
        }
    for (int c = 0; c < head_dim; c++) x[c] *= norm;
  }
}

}  // namespace

const PageOps &portable_ops() {
  static constexpr PageOps ops{"portable", keep_query, score_each<score_page>, accumulate_each<accumulate_page>,
                               add_mean_plain, keep_mean_steps, score_rows, accumulate_rows,
                               exp_sum,    max_of,     dequantize,      hadamard, int4_tiles<PortableLanes>};
  return ops;
}

}  // namespace kvrt
