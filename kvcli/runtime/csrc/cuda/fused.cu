// The small operations of a decoder layer, each in one pass over its data.
#include "fused.h"

#include "vector.cuh"

namespace kvrt {

namespace {

constexpr int THREADS = 256;

dim3 blocks(int64_t count) { return dim3(static_cast<unsigned>(count)); }

// The sum over the block, in every thread. Once a kernel: a second call would overwrite what other threads still read.
__device__ float block_sum(float x) {
  __shared__ float sums[THREADS / WARP];
  x = warp_sum(x);
  if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = x;
  __syncthreads();
  x = 0;
  for (int i = 0; i < THREADS / WARP; i++) x += sums[i];
  return x;
}

__global__ void __launch_bounds__(THREADS)
hadamard_kernel(float* out, const float* x, int64_t rows, int head_dim) {
  KVRT_DYNAMIC_SHARED(shared);
  float* row = reinterpret_cast<float*>(shared) + threadIdx.x / WARP * head_dim;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * (THREADS / WARP) + threadIdx.x / WARP;
  if (at >= rows) return;
  for (int i = threadIdx.x % WARP; i < head_dim; i += WARP) row[i] = x[at * head_dim + i];
  hadamard_rows(WarpTeam(), row, 1, head_dim, head_dim);
  for (int i = threadIdx.x % WARP; i < head_dim; i += WARP) out[at * head_dim + i] = row[i];
}

// A block per row.
__global__ void __launch_bounds__(THREADS)
rms_norm_kernel(void* y, const void* x, void* residual, const void* weight, int width, float eps, int dtype) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * width;
  float squares = 0;
  for (int i = threadIdx.x; i < width; i += THREADS) {
    float value = load_value(x, first + i, dtype);
    if (residual) {
      value = round_to(value + load_value(residual, first + i, dtype), dtype);
      store_value(residual, first + i, dtype, value);
    }
    squares += value * value;
  }
  const float factor = 1.0f / sqrtf(block_sum(squares) / static_cast<float>(width) + eps);
  const void* normed = residual ? residual : x;  // a thread reads again only what it wrote itself
  for (int i = threadIdx.x; i < width; i += THREADS)
    store_value(y, first + i, dtype, load_value(normed, first + i, dtype) * factor * load_value(weight, i, dtype));
}

// A warp per head of a row.
__global__ void __launch_bounds__(THREADS) rope_kernel(const __grid_constant__ RopeArgs args) {
  const int lane = threadIdx.x % WARP, half = args.head_dim / 2;
  const int turned = args.num_heads + args.num_kv_heads, all = turned + args.num_kv_heads;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * (THREADS / WARP) + threadIdx.x / WARP, row = at / turned;
  if (row >= args.rows) return;
  const int head = static_cast<int>(at % turned);
  const int64_t first = (row * all + head) * args.head_dim;
  const void* weight = head < args.num_heads ? args.q_norm : args.k_norm;
  float factor = 1;
  if (weight) {
    float squares = 0;
    for (int i = lane; i < args.head_dim; i += WARP) {
      const float x = load_value(args.qkv, first + i, args.dtype);
      squares += x * x;
    }
    factor = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(args.head_dim) + args.eps);
  }
  const float* table = args.table + static_cast<int64_t>(args.positions[row]) * args.head_dim;
  for (int i = lane; i < half; i += WARP) {
    float a = load_value(args.qkv, first + i, args.dtype), b = load_value(args.qkv, first + i + half, args.dtype);
    if (weight) a *= factor * load_value(weight, i, args.dtype), b *= factor * load_value(weight, i + half, args.dtype);
    store_value(args.qkv, first + i, args.dtype, a * table[i] - b * table[i + half]);
    store_value(args.qkv, first + i + half, args.dtype, b * table[i] + a * table[i + half]);
  }
}

// A block per row.
__global__ void __launch_bounds__(THREADS) silu_mul_kernel(void* y, const void* x, int width, int dtype) {
  const int64_t row = blockIdx.x;
  for (int i = threadIdx.x; i < width; i += THREADS) {
    const float gate = load_value(x, row * 2 * width + i, dtype);
    const float up = load_value(x, row * 2 * width + width + i, dtype);
    store_value(y, row * width + i, dtype, gate / (1.0f + __expf(-gate)) * up);
  }
}

}  // namespace

cudaError_t launch_hadamard(float* out, const float* x, int64_t rows, int head_dim, cudaStream_t stream) {
  if (!rows) return cudaSuccess;
  const size_t shared = sizeof(float) * (THREADS / WARP) * static_cast<size_t>(head_dim);
  const dim3 grid = blocks((rows + THREADS / WARP - 1) / (THREADS / WARP));
  return KVRT_LAUNCH(hadamard_kernel, grid, dim3(THREADS), shared, stream, out, x, rows, head_dim);
}

cudaError_t launch_rms_norm(void* y, const void* x, void* residual, const void* weight, int64_t rows, int width,
                            float eps, int dtype, cudaStream_t stream) {
  if (!rows) return cudaSuccess;
  const size_t shared = 0;
  return KVRT_LAUNCH(rms_norm_kernel, blocks(rows), dim3(THREADS), shared, stream, y, x, residual, weight, width, eps,
                     dtype);
}

cudaError_t launch_rope(const RopeArgs& args, cudaStream_t stream) {
  const int64_t heads = args.rows * (args.num_heads + args.num_kv_heads);
  if (!heads) return cudaSuccess;
  const dim3 grid = blocks((heads + THREADS / WARP - 1) / (THREADS / WARP));
  return KVRT_LAUNCH(rope_kernel, grid, dim3(THREADS), static_cast<size_t>(0), stream, args);
}

cudaError_t launch_silu_mul(void* y, const void* x, int64_t rows, int width, int dtype, cudaStream_t stream) {
  if (!rows) return cudaSuccess;
  return KVRT_LAUNCH(silu_mul_kernel, blocks(rows), dim3(THREADS), static_cast<size_t>(0), stream, y, x, width, dtype);
}

}  // namespace kvrt
