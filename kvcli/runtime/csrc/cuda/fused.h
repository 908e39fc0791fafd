// What api.cu launches of the small fused operations; kvrt.h says what each does.
#pragma once

#include <cstdint>

#include "launch.cuh"

namespace kvrt {

struct RopeArgs {
  void* qkv;
  const int32_t* positions;
  const float* table;
  const void *q_norm, *k_norm;
  float eps;
  int64_t rows;
  int32_t num_heads, num_kv_heads, head_dim, dtype;
};

cudaError_t launch_hadamard(float* out, const float* x, int64_t rows, int head_dim, cudaStream_t stream);
cudaError_t launch_rms_norm(void* y, const void* x, void* residual, const void* weight, int64_t rows, int width,
                            float eps, int dtype, cudaStream_t stream);
cudaError_t launch_rope(const RopeArgs& args, cudaStream_t stream);
cudaError_t launch_silu_mul(void* y, const void* x, int64_t rows, int width, int dtype, cudaStream_t stream);

}  // namespace kvrt
