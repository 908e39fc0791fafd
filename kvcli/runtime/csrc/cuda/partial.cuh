// Softmax sums over some of the tokens, and how two of them become one.
//
// A partial is [maximum, sum of exp(score - maximum), weighted sum of values: head_dim]. The packed tokens' values are
// summed as they are stored; rotation and mean are undone once, at the end.
//
// With split_pages a sequence's pages form chunks of so many pages, and chunks are folded from the last to the first,
// c0 + (c1 + (c2 + ...)). The last split folds the chunks it has, the combining kernel goes on where it stopped: the
// same additions, however many splits there are.
#pragma once

#include "cache.cuh"

namespace kvrt {

constexpr float LOG2_E = 1.4426950408889634f;

// exp(x) for x <= 0, the same in all kernels; 1 for 0 and 0 for -infinity.
__device__ __forceinline__ float exp_of(float x) { return ptx::exp2_approx(__fmul_rn(x, LOG2_E)); }

struct Weights {
  float maximum, first, second;  // what each side's sums are multiplied by
};

__device__ __forceinline__ Weights weigh(float first_maximum, float second_maximum) {
  const float maximum = fmaxf(first_maximum, second_maximum);
  if (maximum == -INFINITY) return {maximum, 0.0f, 0.0f};
  return {maximum, exp_of(first_maximum - maximum), exp_of(second_maximum - maximum)};
}

__device__ __forceinline__ float merged(const Weights& weights, float first, float second) {
  return __fmaf_rn(first, weights.first, __fmul_rn(second, weights.second));
}

__host__ __device__ __forceinline__ int partial_floats(int head_dim) { return head_dim + 2; }

// Partials of one query head in the workspace: those of the splits, then that of the exact tokens.
__device__ __forceinline__ float* partial_of(const kv_layer& layer, const kvrt_attend_args& args, int sequence,
                                             int head, int split) {
  const int64_t index = (static_cast<int64_t>(sequence) * layer.num_heads + head) * (args.splits + 1) + split;
  return static_cast<float*>(args.workspace) + index * partial_floats(layer.head_dim);
}

}  // namespace kvrt
