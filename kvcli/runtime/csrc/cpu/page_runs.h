// Runs for instruction sets whose loops take one page at a time.
#pragma once

#include <algorithm>

#include "page_ops.h"

namespace kvrt {
namespace {

template <auto ScorePage>
void score_each(const kv_layer &layer, const kv_page_layout &at, const uint8_t *const *slices, const float *query,
                const uint8_t *, int group, int first, int last, float *scores, int stride) {
  const int block = layer.block_size;
  for (int p = first / block, begin = p * block; begin < last; p++, begin += block)
    ScorePage(layer, at, slices[p], query, group, std::max(first - begin, 0), std::min(last - begin, block),
              scores + begin, stride);
}

template <auto AccumulatePage>
void accumulate_each(const kv_layer &layer, const kv_page_layout &at, const uint8_t *const *slices,
                     const float *weights, int stride, int group, int first, int last, float *sums) {
  const int block = layer.block_size;
  for (int p = first / block, begin = p * block; begin < last; p++, begin += block)
    AccumulatePage(layer, at, slices[p], weights + begin, stride, group, std::max(first - begin, 0),
                   std::min(last - begin, block), sums);
}

inline void add_mean_plain(const float *a, const float *b, const float *row, const float *steps, int half, int group,
                           int first, int last, float *scores, int stride) {
  constexpr int kSteps = kRunTokens / 2;
  const float *cos = row, *sin = row + half;
  const int m0 = first < kSteps && last > kSteps ? 0 : first < kSteps ? kSteps - last : first - kSteps;
  const int m1 = std::max(last - kSteps, kSteps - first);  // first and last of m, and one past it
  for (int g = 0; g < group; g++) {
    float even[kSteps] = {}, odd[kSteps] = {};
    for (int i = 0; i < half; i++) {
      const float p = a[g * half + i], q = b[g * half + i];
      const float turned_a = p * cos[i] + q * sin[i], turned_b = q * cos[i] - p * sin[i];
      const float *c = steps + 2 * kSteps * i, *s = c + kSteps;
      for (int m = m0; m < m1; m++) {
        even[m] += turned_a * c[m];
        odd[m] += turned_b * s[m];
      }
    }
    for (int t = first; t < last; t++)
      scores[g * stride + t] += t < kSteps ? even[kSteps - 1 - t] - odd[kSteps - 1 - t] : even[t - kSteps] + odd[t - kSteps];
  }
}

inline void keep_mean_steps(float *, int) {}
inline void keep_query(const kv_layer &, const float *, int, uint8_t *) {}

}  // namespace
}  // namespace kvrt
