// Merge the partials of one query head: fold the splits from the last to the first, undo the values' rotation, add
// their mean, then the exact tokens, and what keys tell of values: o = W (sum p K^) + m b + sum p R^ + what is exact, m
// being the mass on packed tokens, whose b comes as the mean.
#include "combine.h"

#include "partial.cuh"
#include "vector.cuh"

namespace kvrt {

namespace {

constexpr int THREADS = 128;
constexpr int PREDICT_THREADS = KV_MAX_HEAD_DIM;

__device__ __forceinline__ void store_out(const kvrt_attend_args& args, int sequence, int head, int channel, float x) {
  store_value(args.out, sequence * args.out_row_stride + head * args.out_head_stride + channel, args.dtype, x);
}

// Where a head's output lies until its prediction is added: in the place of the exact tokens' values.
__device__ __forceinline__ float* left_of(const kv_layer& layer, const kvrt_attend_args& args, int sequence, int head) {
  return partial_of(layer, args, sequence, head, args.splits) + 2;
}

// Grid: (query heads, sequences).
__global__ void __launch_bounds__(THREADS)
combine_kernel(const __grid_constant__ kv_layer layer, const __grid_constant__ kvrt_attend_args args) {
  __shared__ float values[KV_MAX_HEAD_DIM];
  const int head = blockIdx.x, sequence = blockIdx.y, dim = layer.head_dim;
  const int kv_head = head / (layer.num_heads / layer.num_kv_heads);
  float maximum = -INFINITY, sum = 0, lse = -INFINITY;
  if (args.parts & KVRT_PACKED) {
    for (int channel = threadIdx.x; channel < dim; channel += THREADS) {
      maximum = -INFINITY, sum = 0;  // every thread computes them anew, alike
      float value = 0;
      for (int split = args.splits - 1; split >= 0; split--) {
        const float* partial = partial_of(layer, args, sequence, head, split);
        const Weights weights = weigh(partial[0], maximum);
        value = merged(weights, partial[2 + channel], value);
        sum = merged(weights, partial[1], sum);
        maximum = weights.maximum;
      }
      values[channel] = value;
    }
    if (layer.v.hadamard) hadamard_rows(BlockTeam(), values, 1, dim, dim);
  }
  // heads narrower than the block leave threads that took no channel: none of them goes on
  const bool with_mean = layer.v_mean && !kv_is_exact(&layer.v);
  const int64_t row = static_cast<int64_t>(sequence) * layer.num_heads + head;
  for (int channel = threadIdx.x; channel < dim; channel += THREADS) {
    float value = args.parts & KVRT_PACKED ? values[channel] : 0;
    if (with_mean) value += sum * layer.v_mean[kv_head * dim + channel];
    Weights weights = weigh(maximum, -INFINITY);
    float total = sum;
    if (args.parts & KVRT_EXACT) {
      const float* exact = partial_of(layer, args, sequence, head, args.splits);
      weights = weigh(maximum, exact[0]);
      value = merged(weights, value, exact[2 + channel]);
      total = merged(weights, sum, exact[1]);
    }
    const float inverse = total > 0 ? 1 / total : 0;
    if (layer.v_weight)
      left_of(layer, args, sequence, head)[channel] = value * inverse;  // this thread has read what is there
    else
      store_out(args, sequence, head, channel, value * inverse);
    if (channel) continue;
    lse = total > 0 ? weights.maximum + logf(total) : -INFINITY;
    if (args.lse) args.lse[row] = lse;
    if (args.packed_mass) args.packed_mass[row] = sum * weights.first * inverse;
  }
  if (!args.mass) return;
  __syncthreads();  // the exact partial has been read; its place is where expand.cu finds the sum of exponentials
  if (threadIdx.x == 0) partial_of(layer, args, sequence, head, args.splits)[0] = lse;
}

// Add what keys tell of values. Grid: (query heads, sequences).
__global__ void __launch_bounds__(PREDICT_THREADS)
predict_kernel(const __grid_constant__ kv_layer layer, const __grid_constant__ kvrt_attend_args args) {
  KVRT_DYNAMIC_SHARED(shared);
  __shared__ float parts[PREDICT_THREADS];
  float* keys = reinterpret_cast<float*>(shared);
  const int head = blockIdx.x, sequence = blockIdx.y, dim = layer.head_dim;
  const int kv_head = head / (layer.num_heads / layer.num_kv_heads), width = static_cast<int>(key_sum_floats(layer));
  const int64_t row = static_cast<int64_t>(sequence) * layer.num_heads + head;
  const float* sums = key_sums(layer, args) + row * args.splits * width;
  for (int i = threadIdx.x; i < width; i += PREDICT_THREADS) {
    float sum = 0;
    for (int split = args.splits - 1; split >= 0; split--)
      sum = __fadd_rn(sums[static_cast<int64_t>(split) * width + i], sum);
    keys[i] = sum;
    if (args.key_sum) args.key_sum[row * width + i] = sum;
  }
  __syncthreads();
  // threads side by side are channels; there are as many such teams as fit, and each takes some of the keys' channels
  const int teams = PREDICT_THREADS / dim, team = threadIdx.x / dim, channel = threadIdx.x % dim;
  const float* weight = layer.v_weight + kv_head * dim + channel;
  float sum = 0;
  if (team < teams)
#pragma unroll 4
    for (int i = team; i < width; i += teams) sum += keys[i] * weight[static_cast<int64_t>(i) * width];
  parts[threadIdx.x] = sum;
  __syncthreads();
  if (team) return;
  float value = left_of(layer, args, sequence, head)[channel];
  for (int i = 0; i < teams; i++) value += parts[i * dim + channel];
  store_out(args, sequence, head, channel, value);
}

}  // namespace

cudaError_t launch_combine(const kv_layer& layer, const kvrt_attend_args& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(layer.num_heads), static_cast<unsigned>(args.cache.num_seqs));
  const size_t shared = 0;
  cudaError_t status = KVRT_LAUNCH(combine_kernel, grid, dim3(THREADS), shared, stream, layer, args);
  if (status == cudaSuccess && args.mass) status = launch_mass(layer, args, stream);
  if (status != cudaSuccess || !layer.v_weight) return status;
  const size_t keys = sizeof(float) * static_cast<size_t>(key_sum_floats(layer));
  return KVRT_LAUNCH(predict_kernel, grid, dim3(PREDICT_THREADS), keys, stream, layer, args);
}

}  // namespace kvrt
