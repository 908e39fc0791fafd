// How kernels are launched and how they name their dynamic shared memory, on a GPU and in the tests' emulator.
//
//   template <int D> __global__ void kernel(const float* x) {
//     KVRT_DYNAMIC_SHARED(shared);  // unsigned char* shared, aligned to 128 bytes
//     float* rows = reinterpret_cast<float*>(shared);
//     ...
//   }
//   cudaError_t status = KVRT_LAUNCH(kernel<64>, grid, block, shared_bytes, stream, x);
#pragma once

#if !defined(__CUDACC__)

#include "emulator.h"  // on the include path that tests/cuda_on_cpu/build.py sets

#define KVRT_DYNAMIC_SHARED(name) unsigned char* const name = ::emulator::dynamic_shared()
#define KVRT_LAUNCH(...) ::emulator::launch(__VA_ARGS__)

#else

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

// The array behind the pointer has one name and one type in all kernels, as `extern __shared__` demands.
#define KVRT_DYNAMIC_SHARED(name)                                        \
  extern __shared__ __align__(128) unsigned char kvrt_dynamic_shared[]; \
  unsigned char* const name = kvrt_dynamic_shared

// KVRT_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...) gives the launch's cudaError_t.
#define KVRT_LAUNCH(...) ::kvrt::launch(__VA_ARGS__)

namespace kvrt {

// A kernel gets this much dynamic shared memory unasked.
constexpr std::size_t DEFAULT_SHARED_BYTES = 48 * 1024;

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  if (shared_bytes > DEFAULT_SHARED_BYTES) {
    const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(std::forward<Arguments>(arguments)...);
  return cudaGetLastError();
}

}  // namespace kvrt

#endif
