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

// Behind the partials, where values are predicted from keys: weights of all slots that can be, [sequences][heads][slots],
// which are used if the caller wants none, and sums of keys, [sequences][heads][splits][kv heads][head_dim].
__host__ __device__ __forceinline__ int64_t own_mass_at(const kv_layer& layer, const kvrt_attend_args& args) {
  return static_cast<int64_t>(args.cache.num_seqs) * layer.num_heads * (args.splits + 1) * partial_floats(layer.head_dim);
}
__host__ __device__ __forceinline__ int64_t key_sums_at(const kv_layer& layer, const kvrt_attend_args& args) {
  const int64_t slots = layer.v_weight ? layer.rope_positions : 0;
  return own_mass_at(layer, args) + static_cast<int64_t>(args.cache.num_seqs) * layer.num_heads * slots;
}
__host__ __device__ __forceinline__ int64_t key_sum_floats(const kv_layer& layer) {
  return static_cast<int64_t>(layer.num_kv_heads) * layer.head_dim;
}
__host__ __device__ __forceinline__ float* own_mass(const kv_layer& layer, const kvrt_attend_args& args) {
  return static_cast<float*>(args.workspace) + own_mass_at(layer, args);
}
__host__ __device__ __forceinline__ float* key_sums(const kv_layer& layer, const kvrt_attend_args& args) {
  return static_cast<float*>(args.workspace) + key_sums_at(layer, args);
}

// Pages of split `split`: first <= page < last, in chunks of `chunk` pages that begin at multiples of it from `base`.
struct PageRange {
  int64_t base, first, last, chunk;
};

__device__ __forceinline__ PageRange pages_of_split(const HeadView& view, const Visible& visible,
                                                    const kvrt_attend_args& args, int split) {
  const int64_t block = view.layer.block_size;
  const int64_t begin = visible.first_packed(view) / block;
  const int64_t end = (visible.boundary + block - 1) / block;
  PageRange range;
  if (args.split_pages > 0) {
    range.base = 0, range.chunk = args.split_pages;
    range.first = static_cast<int64_t>(split) * args.split_pages;
    range.last = split + 1 == args.splits ? end : range.first + args.split_pages;
    if (range.first < begin) range.first = begin;
    if (range.last > end) range.last = end;
  } else {
    const int64_t pages = end > begin ? end - begin : 0;
    range.chunk = (pages + args.splits - 1) / args.splits;
    range.base = begin;
    range.first = begin + split * range.chunk;
    range.last = range.first + range.chunk < end ? range.first + range.chunk : end;
  }
  return range;
}

}  // namespace kvrt
