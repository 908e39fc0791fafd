// A kernel whose every barrier and wait is needed; test_emulator.py removes them one by one.
#include "launch.cuh"
#include "ptx.cuh"

namespace ptx = kvrt::ptx;

namespace {

// Copies tiles of 4·64 floats through two buffers and writes them back, reversed, and the sum of each warp's share of
// each tile. n is a multiple of 4; what lies past it counts as 0.
__global__ void pipeline(const float* x, float* y, float* sums, int n) {
  KVRT_DYNAMIC_SHARED(bytes);
  __shared__ float lanes[2][32];
  float* buffers[2] = {reinterpret_cast<float*>(bytes), reinterpret_cast<float*>(bytes) + 256};
  const int tiles = (n + 255) / 256, i = threadIdx.x;
  const auto fetch = [&](int tile) {
    const int at = tile * 256 + 4 * i;
    if (tile < tiles) ptx::cp_async16_zfill(buffers[tile % 2] + 4 * i, at < n ? x + at : x, at < n);
    ptx::cp_async_commit();
  };
  fetch(0);
  for (int tile = 0; tile < tiles; tile++) {
    fetch(tile + 1);
    ptx::cp_async_wait<1>();
    __syncthreads();
    const float* buffer = buffers[tile % 2];
    float sum = 0;
    for (int k = 0; k < 4; k++) {
      const float value = buffer[255 - 4 * i - k];
      y[tile * 256 + 4 * i + k] = value;
      sum += value;
    }
    lanes[i / 32][i % 32] = sum;
    __syncwarp();
    if (i % 32 == 0) {
      for (int lane = 1; lane < 32; lane++) sum += lanes[i / 32][lane];
      sums[tile * 2 + i / 32] = sum;
    }
    __syncthreads();  // the next round's copies go where others may still read
  }
}

}  // namespace

extern "C" void run_pipeline(const float* x, float* y, float* sums, int n) {
  KVRT_LAUNCH(pipeline, 1, 64, 2048, nullptr, x, y, sums, n);
}
