// Runs for instruction sets whose loops take one page at a time.
#pragma once

#include <algorithm>

#include "page_ops.h"

namespace kvrt {
namespace {

template <auto ScorePage>
void score_each(const kv_layer &layer, const kv_page_layout &at, const uint8_t *const *slices, const float *query,
                int group, int first, int last, float *scores, int stride) {
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

inline void add_mean_plain(const float *a, const float *b, const float *const *rows, const float *steps, int half,
                           int group, int first, int last, float *scores, int stride) {
  for (int begin = first / 16 * 16; begin < last; begin += 16) {
    const float *cos = rows[begin / 16], *sin = cos + half;
    for (int g = 0; g < group; g++) {
      float even[8] = {}, odd[8] = {};
      for (int i = 0; i < half; i++) {
        const float p = a[g * half + i], q = b[g * half + i];
        const float turned_a = p * cos[i] + q * sin[i], turned_b = q * cos[i] - p * sin[i];
        for (int m = 0; m < 8; m++) {
          even[m] += turned_a * steps[16 * i + 2 * m];
          odd[m] += turned_b * steps[16 * i + 2 * m + 1];
        }
      }
      for (int t = std::max(first, begin); t < std::min(last, begin + 16); t++) {
        const int x = t - begin, m = x < 8 ? 7 - x : x - 8;
        scores[g * stride + t] += x < 8 ? even[m] - odd[m] : even[m] + odd[m];
      }
    }
  }
}

}  // namespace
}  // namespace kvrt
