// Compiles CUDA C++ with g++ and runs it on the CPU. Include nothing else: the parts below come in order.
//
// Every CUDA thread of a block is a fiber, blocks run one at a time on each worker thread of the host. NVIDIA's own
// headers give the types and the half-precision arithmetic; what the compiler and the GPU would give is emulated here.
#pragma once

#if defined(__CUDACC__)
#error "the emulator is for host compilers; nvcc needs none"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

// The words of CUDA C++ that g++ does not know. One block runs on a host thread at a time, so what is thread-local is
// shared by the block's threads.
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __forceinline__
#undef __noinline__
#undef __align__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ thread_local
#define __constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__

#include "block.h"
#include "warp.h"
#include "intrinsics.h"

#define threadIdx (::emulator::current_thread().index)
#define blockIdx (::emulator::current_block().index)
#define blockDim (::emulator::current_block().shape)
#define gridDim (::emulator::current_block().grid)
#define warpSize 32
