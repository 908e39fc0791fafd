// What one instruction set provides: the inner loops over one page of one kv head, and over rows of exact values.
//
// The driver (attend.cpp, append.cpp, expand.cpp) is the same for all instruction sets; it calls these through a table.
// Everything is float32 inside. A "page slice" is the head's part of a page (kv_layout.h); tokens are those of the page,
// first <= t < last, and scores and weights are [group][stride] with token t at column t.
#pragma once

#include "kv_layout.h"

namespace kvrt {

struct PageOps {
  const char *name;

  // scores[g][t] = sum_c query[g][c] * stored_key[t][c], stored keys being what the codes say: rotated if the format is,
  // without the mean. query [group][head_dim] is rotated alike and carries the softmax scale.
  void (*score_page)(const kv_layer &layer, const kv_page_layout &at, const uint8_t *slice, const float *query,
                     int group, int first, int last, float *scores, int stride);

  // sums[g][c] += sum_t weights[g][t] * stored_value[t][c]
  void (*accumulate_page)(const kv_layer &layer, const kv_page_layout &at, const uint8_t *slice, const float *weights,
                          int stride, int group, int first, int last, float *sums);

  // scores[g][t] += sum_i a[g][i] * step_cos[i][t] + b[g][i] * step_sin[i][t], for i < half: the keys' mean turned from
  // the page's first position to token t. step_* are [half][block_size].
  void (*add_mean_scores)(const float *a, const float *b, const float *step_cos, const float *step_sin, int half,
                          int block_size, int group, int first, int last, float *scores, int stride);

  // The same two products over rows of exact values of dtype (kv_dtype), row_stride values apart, columns 0 ... count-1.
  void (*score_rows)(const void *rows, int dtype, int64_t row_stride, int count, int head_dim, const float *query,
                     int group, float *scores, int stride);
  void (*accumulate_rows)(const void *rows, int dtype, int64_t row_stride, int count, int head_dim,
                          const float *weights, int stride, int group, float *sums);

  // x[t] = exp(x[t] - max) for t < n; returns their sum. -infinity gives 0. Relative error below 1e-6.
  float (*exp_sum)(float *x, int n, float max);
  float (*max_of)(const float *x, int n);  // -infinity for n = 0

  // Decode tokens first ... last-1 of a section into rows [last - first][head_dim] float32: as stored (still rotated).
  // codes, scales, zeros point at the section's beginning.
  void (*dequantize)(const kv_format &format, const uint8_t *codes, const uint8_t *scales, const uint8_t *zeros,
                     int page_dtype, int head_dim, int block_size, int first, int last, float *out);

  // Orthonormal Hadamard transform of each row in place: blocks of the largest power of two dividing head_dim,
  // butterflies with the smallest stride first, then one multiplication by float(block)^-0.5.
  void (*hadamard)(float *x, int64_t rows, int head_dim);
};

const PageOps &portable_ops();
const PageOps *avx2_ops();    // null where not compiled in (another architecture)
const PageOps *avx512_ops();  // likewise; needs F, BW, DQ, VL, VBMI
const PageOps &current_ops();

}  // namespace kvrt
