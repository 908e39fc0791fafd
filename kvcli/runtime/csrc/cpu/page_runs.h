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

template <auto AddPage>
void add_mean_each(const float *a, const float *b, const float *const *rows, const float *step_cos,
                   const float *step_sin, int half, int block, int group, int first, int last, float *scores,
                   int stride) {
  float turned_a[KV_MAX_HEAD_DIM / 2], turned_b[KV_MAX_HEAD_DIM / 2];
  for (int p = first / block, begin = p * block; begin < last; p++, begin += block)
    for (int g = 0; g < group; g++) {
      const float *cos = rows[p], *sin = cos + half;
      for (int i = 0; i < half; i++) {
        turned_a[i] = a[g * half + i] * cos[i] + b[g * half + i] * sin[i];
        turned_b[i] = b[g * half + i] * cos[i] - a[g * half + i] * sin[i];
      }
      AddPage(turned_a, turned_b, step_cos, step_sin, half, block, 1, std::max(first - begin, 0),
              std::min(last - begin, block), scores + g * stride + begin, stride);
    }
}

}  // namespace
}  // namespace kvrt
