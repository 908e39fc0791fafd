// Values that are predicted from their own layer's keys (kv_layer.v_weight): AQUA-KV's linear map, Shutova et al., 2025,
// arXiv:2501.19392, for which attention needs the weighted sum of keys and no token's prediction.
#pragma once

#include "transforms.h"

namespace kvrt {

static inline int kv_width(const kv_layer &l) { return l.num_kv_heads * l.head_dim; }

// out [count][width] = bias + keys [count][width] times weight [width][width]; summed in double and rounded once, so that
// a token's prediction is the same wherever it is made. bias may be null.
void predict_rows(const float *weight, const float *bias, const float *keys, int count, int width, float *out);

// out [n] += x [width] times columns first ... first + n - 1 of weight [width][width]
void add_product(const float *weight, const float *x, int width, int first, int n, float *out);

// Undo RoPE in rows of consecutive rows of the table, but for the factor by which the table is stretched.
void turn_back(float *x, const float *table, int count, int head_dim);

// Predictions of the values of tokens first ... last - 1 of a page, of all heads: [last - first][width]. keys is scratch
// of as much and a page of one head more.
static inline void predict_values(const PageOps &ops, const View &any, const kv_page_layout &at, int64_t page, int first,
                                  int last, float *keys, float *out) {
  const kv_layer &l = any.layer;
  const int d = l.head_dim, width = kv_width(l), count = last - first;
  float *one = keys + static_cast<int64_t>(l.block_size) * width;
  for (int h = 0; h < l.num_kv_heads; h++) {
    decode_keys(ops, View{l, any.cache, any.seq, h}, at, page, first, last, true, one);
    for (int t = 0; t < count; t++)
      std::memcpy(keys + static_cast<int64_t>(t) * width + h * d, one + t * d, sizeof(float) * static_cast<size_t>(d));
  }
  predict_rows(l.v_weight, l.v_mean, keys, count, width, out);
}

// floats that predict_values and its result take
static inline int64_t predict_floats(const kv_layer &l) {
  return l.v_weight ? static_cast<int64_t>(l.block_size) * (2 * kv_width(l) + l.head_dim) : 0;
}

}  // namespace kvrt
