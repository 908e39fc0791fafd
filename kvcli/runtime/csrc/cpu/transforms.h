// Between exact keys and values and what pages store: RoPE, mean and Hadamard, in the operations and the order of
// kvcli.runtime.codec.Codec and kvcli.models.architectures.Rope, so that both round alike.
#pragma once

#include "cache_view.h"

namespace kvrt {

// x turned to a position: row is that of the rotary table
static inline void rope_rotate(const float *x, const float *row, int head_dim, float *out) {
  const int half = head_dim / 2;
  for (int i = 0; i < half; i++) {
    const float first = x[i], second = x[i + half], cos = row[i], sin = row[i + half];
    out[i] = first * cos - second * sin;
    out[i + half] = second * cos + first * sin;
  }
}

static inline void rope_unrotate(float *x, const float *row, int head_dim) {
  const int half = head_dim / 2;
  for (int i = 0; i < half; i++) {
    const float first = x[i], second = x[i + half], cos = row[i], sin = row[i + half];
    const float norm = cos * cos + sin * sin;
    x[i] = (first * cos + second * sin) / norm;
    x[i + half] = (second * cos - first * sin) / norm;
  }
}

static inline const float *rope_row(const View &view, int64_t slot) {
  return view.layer.rope + view.position(slot) * view.layer.head_dim;
}

// What is taken off a head's keys, before RoPE, or values before they are coded: a mean, or a prediction a token.
struct Offset {
  const float *first;
  int64_t stride;  // from one token's to the next's
  const float *of(int t) const { return first ? first + t * stride : nullptr; }
};

// exact keys after RoPE of slots slot ... slot + count - 1 to what is coded, in place
static inline void keys_to_stored(const PageOps &ops, const View &view, int64_t slot, int count, Offset offset,
                                  float *x) {
  const kv_layer &l = view.layer;
  const int d = l.head_dim;
  float turned[KV_MAX_HEAD_DIM];
  for (int t = 0; t < count && (l.rope_before || offset.first); t++) {
    float *row = x + static_cast<int64_t>(t) * d;
    const float *off = offset.of(t);
    if (l.rope_before) {
      rope_unrotate(row, rope_row(view, slot + t), d);
    } else {
      rope_rotate(off, rope_row(view, slot + t), d, turned);
      off = turned;
    }
    if (off)
      for (int i = 0; i < d; i++) row[i] -= off[i];
  }
  if (rotated(l.k)) ops.hadamard(x, count, d);
}

static inline void values_to_stored(const PageOps &ops, const View &view, int count, Offset offset, float *x) {
  const int d = view.layer.head_dim;
  for (int t = 0; t < count && offset.first; t++)
    for (int i = 0; i < d; i++) x[static_cast<int64_t>(t) * d + i] -= offset.of(t)[i];
  if (rotated(view.layer.v)) ops.hadamard(x, count, d);
}

// keys of tokens first ... last - 1 of a page, decoded to float32 [last - first][head_dim] before or after RoPE
static inline void decode_keys(const PageOps &ops, const View &view, const kv_page_layout &at, int64_t page, int first,
                               int last, bool before_rope, float *out) {
  const kv_layer &l = view.layer;
  const int d = l.head_dim, count = last - first;
  const int64_t slot = page * l.block_size + first;
  const uint8_t *slice = view.slice(page, at);
  if (kv_is_exact(&l.k)) {
    load_row(slice + at.k_codes, exact_page_dtype(l, l.k), static_cast<int64_t>(first) * d, count * d, out);
  } else {
    ops.dequantize(l.k, slice + at.k_codes, slice + at.k_scales, slice + at.k_zeros, l.page_dtype, d, l.block_size,
                   first, last, out);
    if (rotated(l.k)) ops.hadamard(out, count, d);
  }
  const bool stored_before = coded_before_rope(l);
  const float *mean = k_mean(l, view.head);
  float turned[KV_MAX_HEAD_DIM];
  for (int t = 0; t < count; t++) {
    float *row = out + static_cast<int64_t>(t) * d;
    const float *add = mean;
    if (mean && !stored_before) {
      rope_rotate(mean, rope_row(view, slot + t), d, turned);
      add = turned;
    }
    if (add)
      for (int i = 0; i < d; i++) row[i] += add[i];
    if (stored_before && !before_rope) {
      rope_rotate(row, rope_row(view, slot + t), d, turned);
      std::memcpy(row, turned, sizeof(float) * static_cast<size_t>(d));
    } else if (before_rope && !stored_before) {
      rope_unrotate(row, rope_row(view, slot + t), d);
    }
  }
}

static inline void decode_values(const PageOps &ops, const View &view, const kv_page_layout &at, int64_t page,
                                 int first, int last, Offset offset, float *out) {
  const kv_layer &l = view.layer;
  const int d = l.head_dim, count = last - first;
  const uint8_t *slice = view.slice(page, at);
  if (kv_is_exact(&l.v)) {
    load_row(slice + at.v_codes, exact_page_dtype(l, l.v), static_cast<int64_t>(first) * d, count * d, out);
    return;
  }
  ops.dequantize(l.v, slice + at.v_codes, slice + at.v_scales, slice + at.v_zeros, l.page_dtype, d, l.block_size,
                 first, last, out);
  if (rotated(l.v)) ops.hadamard(out, count, d);
  for (int t = 0; t < count && offset.first; t++)
    for (int i = 0; i < d; i++) out[static_cast<int64_t>(t) * d + i] += offset.of(t)[i];
}

}  // namespace kvrt
