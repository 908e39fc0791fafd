// What one instruction set provides: the inner loops over a run of pages of one kv head, over rows of exact values, and
// over tiles of int4 weights.
//
// The driver (attend.cpp, append.cpp, expand.cpp) is the same for all instruction sets; it calls these through a table.
// Everything is float32 inside. A "slice" is the head's part of a page (kv_layout.h). A run is consecutive pages of at
// most kRunTokens tokens: token t lies in slices[t / block_size], first <= t < last, and scores and weights are
// [group][stride] with token t at column t. Slices before first and from last on are not looked at, but for fetching
// ahead: slices[p + kRunTokens / block_size] is the same of the next run, or null.
#pragma once

#include "kv_layout.h"

namespace kvrt {

constexpr int kRunTokens = 128;  // at least a page
constexpr int kHeads = 4;        // query heads taken at once
constexpr int64_t kPrepared = 13312;  // bytes that a prepared query takes
static inline int64_t prepared_bytes(int group) { return (group + kHeads - 1) / kHeads * kPrepared; }

// A slice is too short for the processor to see where the next one will be, so it is asked for a run ahead, while this
// one is worked on. All at once would be more than a core can wait for.
static inline void fetch_ahead(const uint8_t *const *slices, int page, int block_size, int64_t from, int64_t to) {
  const uint8_t *next = slices[page + kRunTokens / block_size];
  for (int64_t b = from; next && b < to; b += 64) __builtin_prefetch(next + b);
}

struct Int4Job;

struct PageOps {
  const char *name;

  // scores[g][t] = sum_c query[g][c] * stored_key[t][c], stored keys being what the codes say: rotated if the format is,
  // without the mean. query [group][head_dim] is rotated alike and carries the softmax scale; prepared is what
  // prepare_query made of it, once for all runs: kPrepared bytes for every kHeads heads, aligned to 64.
  void (*prepare_query)(const kv_layer &layer, const float *query, int group, uint8_t *prepared);
  void (*score_pages)(const kv_layer &layer, const kv_page_layout &at, const uint8_t *const *slices, const float *query,
                      const uint8_t *prepared, int group, int first, int last, float *scores, int stride);

  // sums[g][c] += sum_t weights[g][t] * stored_value[t][c]
  void (*accumulate_pages)(const kv_layer &layer, const kv_page_layout &at, const uint8_t *const *slices,
                           const float *weights, int stride, int group, int first, int last, float *sums);

  // scores[g][t] += query[g] . RoPE_t(mean) for a run whose first token has the rotary table's row `row`. Around the
  // middle of a run cosines are even and sines odd: with x = t - (kRunTokens - 1) / 2 and m = |x| - 1/2,
  //   score = sum_i A_i cos((m + 1/2) theta_i) +- B_i sin((m + 1/2) theta_i)      (minus where x is negative)
  // where A and B are a and b, [group][half], what cosine and sine of pair i weigh in the middle of a run that begins at
  // position 0, turned by row. steps: what pack_mean_steps made of [half][cos, sin][kRunTokens / 2].
  void (*add_mean_scores)(const float *a, const float *b, const float *row, const float *steps, int half, int group,
                          int first, int last, float *scores, int stride);
  void (*pack_mean_steps)(float *steps, int half);  // in place

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

  // All rows of the outputs of tiles first ... last-1 (int4.h).
  void (*int4_tiles)(const Int4Job &job, int64_t first, int64_t last);
};

const PageOps &portable_ops();
const PageOps *avx2_ops();    // null where not compiled in (another architecture)
const PageOps *avx512_ops();  // likewise; needs F, BW, DQ, VL, VBMI
const PageOps &current_ops();

}  // namespace kvrt
