// Small kernels for test_emulator.py, right ones and wrong ones.
#include <cuda_fp8.h>

#include <cstdlib>
#include <cstring>

#include "launch.cuh"
#include "ptx.cuh"

namespace ptx = kvrt::ptx;

namespace cases {

constexpr uint32_t ALL = 0xFFFFFFFF;

// out[lane][i] is what the i-th operation gave that lane.
__global__ void warp_operations(int* out) {
  const int lane = threadIdx.x;
  int* mine = out + lane * 16;
  mine[0] = __shfl_sync(ALL, lane, 5);
  mine[1] = __shfl_sync(ALL, lane, lane + 3, 8);
  mine[2] = __shfl_xor_sync(ALL, lane, 16);
  mine[3] = __shfl_down_sync(ALL, lane, 5);
  mine[4] = __shfl_up_sync(ALL, lane, 3, 16);
  mine[5] = static_cast<int>(__ballot_sync(ALL, lane % 3 == 0));
  mine[6] = __any_sync(ALL, lane == 31);
  mine[7] = __all_sync(ALL, lane < 31);
  mine[8] = static_cast<int>(__match_any_sync(ALL, lane % 4));
  mine[9] = __reduce_add_sync(ALL, lane);
  mine[10] = __reduce_min_sync(ALL, lane - 7);
  mine[11] = static_cast<int>(__reduce_xor_sync(ALL, static_cast<unsigned>(lane) * 77));
  // two halves of the warp apart
  const uint32_t half = lane < 16 ? 0xFFFFu : 0xFFFF0000u;
  mine[12] = lane < 16 ? __shfl_xor_sync(half, lane, 1) : __shfl_xor_sync(half, lane, 2);
  const double wide = __shfl_xor_sync(ALL, lane + 0.25, 1);
  mine[13] = static_cast<int>(wide * 4);
  mine[14] = static_cast<int>(__half2float(__shfl_down_sync(ALL, __float2half(static_cast<float>(lane)), 1)));
  const __half2 pair = __shfl_xor_sync(ALL, __floats2half2_rn(static_cast<float>(lane), 0.5f), 3);
  mine[15] = static_cast<int>(__low2float(pair)) + static_cast<int>(2 * __high2float(pair)) * 100;
}

__global__ void block_votes(int* out) {
  const int i = threadIdx.x;
  out[4 * i] = __syncthreads_count(i % 3 == 0);
  out[4 * i + 1] = __syncthreads_or(i == 40);
  out[4 * i + 2] = __syncthreads_and(i < 96);
  out[4 * i + 3] = __syncthreads_and(i < 95);
}

// The sum of each block's inputs, of the blocks that are in the grid.
__global__ void block_sums(const float* x, float* sums, unsigned* done) {
  __shared__ float partial[8];
  float sum = x[(blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned i = 1; i < blockDim.x / 32; i++) sum += partial[i];
    sums[blockIdx.y * gridDim.x + blockIdx.x] = sum;
    __threadfence();
    atomicAdd(done, 1);
  }
}

__global__ void early_exit(int* out) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = __popc(__ballot_sync(ALL, 1));
}

template <int threads>
__global__ void reverse(const float* x, float* y) {
  KVRT_DYNAMIC_SHARED(bytes);
  float* shared = reinterpret_cast<float*>(bytes);
  shared[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = shared[threads - 1 - threadIdx.x];
}

// What shared memory holds at first.
__global__ void fresh_shared(uint32_t* out) {
  KVRT_DYNAMIC_SHARED(bytes);
  __shared__ uint32_t fixed[32];
  out[threadIdx.x] = fixed[threadIdx.x];
  out[32 + threadIdx.x] = reinterpret_cast<const uint32_t*>(bytes)[threadIdx.x];
  fixed[threadIdx.x] = 0;
  reinterpret_cast<uint32_t*>(bytes)[threadIdx.x] = 0;
}

// Wrong: nothing stands between a lane's write and another lane's read.
__global__ void lanes_race(int* out) {
  __shared__ int shared[32];
  shared[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = shared[31 - threadIdx.x];
}

// Wrong: a warp that is ahead overwrites what another still reads.
__global__ void warps_race(int* out) {
  __shared__ int shared[64];
  int sum = 0;
  for (int round = 0; round < 4; round++) {
    shared[threadIdx.x] = threadIdx.x + 100 * round;
    __syncthreads();
    sum += shared[63 - threadIdx.x];  // a barrier is missing after this
  }
  out[threadIdx.x] = sum;
}

// ---- matrix products ------------------------------------------------------------------------------------------------

// c = a · b with a 16×16 by rows and b 16×8 by rows, through shared memory and ldmatrix.
template <class T>
__global__ void product(const T* a, const T* b, float* c) {
  __shared__ __align__(16) T shared_a[16 * 16];
  __shared__ __align__(16) T shared_b[16 * 8];
  const int lane = threadIdx.x;
  ptx::cp_async16(shared_a + lane * 8, a + lane * 8);
  if (lane < 16) ptx::cp_async16(shared_b + lane * 8, b + lane * 8);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  uint32_t fragment_a[4], fragment_b[2];
  // matrices in the order of mma's registers: rows 0-7 and 8-15 of the left columns, then of the right ones
  ptx::ldmatrix_x4(fragment_a, shared_a + lane % 16 * 16 + lane / 16 * 8);
  ptx::ldmatrix_x2_trans(fragment_b, shared_b + lane % 16 * 8);
  float d[4] = {};
  ptx::mma_m16n8k16<T>(d, fragment_a, fragment_b);
  for (int i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// Every ldmatrix: four 8×8 matrices, one after the other, in x; out[variant][register][lane].
__global__ void load_matrices(const uint16_t* x, uint32_t* out) {
  __shared__ __align__(16) uint16_t shared[256];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) shared[i] = x[i];
  __syncwarp();
  const uint16_t* row = shared + lane * 8;
  uint32_t one[1], two[2], four[4];
  ptx::ldmatrix_x1(one, row);
  out[lane] = one[0];
  ptx::ldmatrix_x1_trans(one, row);
  out[128 + lane] = one[0];
  ptx::ldmatrix_x2(two, row);
  for (int i = 0; i < 2; i++) out[256 + 32 * i + lane] = two[i];
  ptx::ldmatrix_x2_trans(two, row);
  for (int i = 0; i < 2; i++) out[384 + 32 * i + lane] = two[i];
  ptx::ldmatrix_x4(four, row);
  for (int i = 0; i < 4; i++) out[512 + 32 * i + lane] = four[i];
  ptx::ldmatrix_x4_trans(four, row);
  for (int i = 0; i < 4; i++) out[640 + 32 * i + lane] = four[i];
}

// ---- asynchronous copies --------------------------------------------------------------------------------------------

// What a thread sees of its own copies: before and after the waits for two groups and an open third.
__global__ void visibility(const uint32_t* x, uint32_t* out) {
  __shared__ __align__(16) uint32_t shared[3][4];
  const volatile uint32_t* seen = shared[0];
  const auto look = [&](int row) {
    for (int i = 0; i < 12; i++) out[row * 12 + i] = seen[i];
  };
  ptx::cp_async16(shared[0], x);
  ptx::cp_async_commit();
  ptx::cp_async8(shared[1], x + 4);
  ptx::cp_async8_zfill(shared[1] + 2, x + 6, true);
  ptx::cp_async_commit();
  for (int i = 0; i < 3; i++) ptx::cp_async4_zfill(shared[2] + i, x + 8 + i, i != 1);
  ptx::cp_async4(shared[2] + 3, x + 11);
  look(0);
  ptx::cp_async_wait<1>();
  look(1);
  ptx::cp_async_wait<0>();
  look(2);
  ptx::cp_async_wait_all();
  look(3);
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------

__global__ void arithmetic(const uint32_t* x, uint32_t* out) {
  const uint32_t a = x[0], b = x[1], c = x[2];
  out[0] = ptx::lop3<(0xF0 & 0xCC) | 0xAA>(a, 0x000F000F, 0x64006400);
  out[1] = ptx::prmt(a, b, 0x7531);
  out[2] = ptx::lop3<0x96>(a, b, c);
  out[3] = __byte_perm(a, b, 0x3276);
  out[4] = __funnelshift_l(a, b, 9);
  out[5] = __funnelshift_r(a, b, 9);
  out[6] = __brev(a);
  out[7] = static_cast<uint32_t>(__dp4a(static_cast<int>(a), static_cast<int>(b), static_cast<int>(c)));
  out[8] = static_cast<uint32_t>(__clz(static_cast<int>(a >> 5)));
  out[9] = static_cast<uint32_t>(__ffs(static_cast<int>(a)));
  out[10] = __float_as_uint(ptx::exp2_approx(-3.0f));
  out[11] = __float_as_uint(rsqrtf(16.0f));
  const uint4 loaded = ptx::load_streaming16(x);
  out[12] = loaded.x ^ loaded.y ^ loaded.z ^ loaded.w;
  const __half2 sum = __hfma2(__floats2half2_rn(2, 3), __floats2half2_rn(5, 7), __floats2half2_rn(1, -1));
  out[13] = static_cast<uint32_t>(__low2float(sum));
  out[14] = static_cast<uint32_t>(__high2float(sum));
  out[15] = static_cast<uint32_t>(static_cast<float>(__nv_fp8_e4m3(17.0f)));
}

// ---- misuse ---------------------------------------------------------------------------------------------------------

__global__ void barrier_in_half_a_warp(int* out) {
  if (threadIdx.x < 16) __syncthreads();
  else __syncwarp();
  out[threadIdx.x] = 1;
}

__global__ void two_barriers(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

__global__ void not_in_mask(int* out) { out[threadIdx.x] = __shfl_xor_sync(0xFFFFu, 1, 1); }

__global__ void different_operations(int* out) {
  out[threadIdx.x] = threadIdx.x < 16 ? __any_sync(ALL, 1) : __all_sync(ALL, 1);
}

__global__ void different_products(float* out) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (threadIdx.x % 2) ptx::mma_m16n8k16<__half>(d, a, b);
  else ptx::mma_m16n8k16<__half>(d, a, b);
  out[threadIdx.x] = d[0];
}

__global__ void product_of_31_lanes(float* out) {
  if (threadIdx.x == 31) return;
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  ptx::mma_m16n8k16<__half>(d, a, b);
  out[threadIdx.x] = d[0];
}

// Each half of the warp waits for the other half's next step.
__global__ void deadlock(int* out) {
  if (threadIdx.x == 0) __syncwarp(0x3);
  if (threadIdx.x == 1) __syncwarp(0x6);
  if (threadIdx.x == 2) __syncwarp(0x5);
  out[threadIdx.x] = 1;
}

__global__ void copy_misaligned(const float* x) {
  __shared__ __align__(16) float shared[8];
  ptx::cp_async16(shared + 1, x);
  ptx::cp_async_wait_all();
}

__global__ void copy_from_misaligned(const float* x) {
  __shared__ __align__(16) float shared[8];
  ptx::cp_async16(shared, x + 1);
  ptx::cp_async_wait_all();
}

__global__ void copy_to_global(float* x) {
  ptx::cp_async4(x, x + 1);
  ptx::cp_async_wait_all();
}

__global__ void past_dynamic_shared(int floats) {
  KVRT_DYNAMIC_SHARED(bytes);
  reinterpret_cast<float*>(bytes)[floats + threadIdx.x] = 1;
}

__global__ void past_static_shared(int* out, int index) {
  __shared__ int shared[8];
  shared[index] = index;
  out[0] = shared[0];
}

__global__ void past_global(int* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i <= n) out[i] = i;
}

__global__ void copy_past_global(const int* x, int n) {
  __shared__ __align__(16) int shared[4];
  ptx::cp_async16_zfill(shared, x + n, false);  // not read
  ptx::cp_async16(shared, x + n);
  ptx::cp_async_wait_all();
}

__global__ void misaligned_vector(const float* x, float4* out) { out[0] = *reinterpret_cast<const float4*>(x + 1); }

__global__ void nothing() {}

}  // namespace cases

extern "C" {

void run_warp_operations(int* out) { KVRT_LAUNCH(cases::warp_operations, 1, 32, 0, nullptr, out); }
void run_block_votes(int* out) { KVRT_LAUNCH(cases::block_votes, 1, 96, 0, nullptr, out); }
void run_block_sums(const float* x, float* sums, unsigned* done) {
  KVRT_LAUNCH(cases::block_sums, dim3(5, 3), 128, 0, nullptr, x, sums, done);
}
void run_early_exit(int* out) { KVRT_LAUNCH(cases::early_exit, 1, 128, 0, nullptr, out); }
void run_reverse(const float* x, float* y) { KVRT_LAUNCH(cases::reverse<64>, 1, 64, 256, nullptr, x, y); }
void run_fresh_shared(uint32_t* out) { KVRT_LAUNCH(cases::fresh_shared, 2, 32, 128, nullptr, out); }
void run_lanes_race(int* out) { KVRT_LAUNCH(cases::lanes_race, 1, 32, 0, nullptr, out); }
void run_warps_race(int* out) { KVRT_LAUNCH(cases::warps_race, 1, 64, 0, nullptr, out); }
void run_product_f16(const __half* a, const __half* b, float* c) {
  KVRT_LAUNCH(cases::product<__half>, 1, 32, 0, nullptr, a, b, c);
}
void run_product_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  KVRT_LAUNCH(cases::product<__nv_bfloat16>, 1, 32, 0, nullptr, a, b, c);
}
void run_load_matrices(const uint16_t* x, uint32_t* out) {
  KVRT_LAUNCH(cases::load_matrices, 1, 32, 0, nullptr, x, out);
}
void run_visibility(const uint32_t* x, uint32_t* out) { KVRT_LAUNCH(cases::visibility, 1, 1, 0, nullptr, x, out); }
void run_arithmetic(const uint32_t* x, uint32_t* out) { KVRT_LAUNCH(cases::arithmetic, 1, 1, 0, nullptr, x, out); }

// The rest are to stop the process; `which` names the case.
void run_misuse(const char* which) {
  alignas(16) static int ints[1024];
  alignas(16) static float floats[1024];
  int* on_heap = static_cast<int*>(malloc(100 * sizeof(int)));
  const auto is = [&](const char* name) { return !strcmp(which, name); };
  if (is("barrier_in_half_a_warp")) KVRT_LAUNCH(cases::barrier_in_half_a_warp, 1, 32, 0, nullptr, ints);
  if (is("two_barriers")) KVRT_LAUNCH(cases::two_barriers, 1, 64, 0, nullptr, ints);
  if (is("not_in_mask")) KVRT_LAUNCH(cases::not_in_mask, 1, 32, 0, nullptr, ints);
  if (is("different_operations")) KVRT_LAUNCH(cases::different_operations, 1, 32, 0, nullptr, ints);
  if (is("different_products")) KVRT_LAUNCH(cases::different_products, 1, 32, 0, nullptr, floats);
  if (is("product_of_31_lanes")) KVRT_LAUNCH(cases::product_of_31_lanes, 1, 32, 0, nullptr, floats);
  if (is("deadlock")) KVRT_LAUNCH(cases::deadlock, 1, 32, 0, nullptr, ints);
  if (is("copy_misaligned")) KVRT_LAUNCH(cases::copy_misaligned, 1, 1, 0, nullptr, floats);
  if (is("copy_from_misaligned")) KVRT_LAUNCH(cases::copy_from_misaligned, 1, 1, 0, nullptr, floats);
  if (is("copy_to_global")) KVRT_LAUNCH(cases::copy_to_global, 1, 1, 0, nullptr, floats);
  if (is("past_dynamic_shared")) KVRT_LAUNCH(cases::past_dynamic_shared, 1, 1, 36, nullptr, 9);
  if (is("past_static_shared")) KVRT_LAUNCH(cases::past_static_shared, 1, 1, 0, nullptr, ints, 8);
  if (is("past_global")) KVRT_LAUNCH(cases::past_global, 4, 32, 0, nullptr, on_heap, 100);
  if (is("copy_past_global")) KVRT_LAUNCH(cases::copy_past_global, 1, 1, 0, nullptr, on_heap, 100);
  if (is("misaligned_vector"))
    KVRT_LAUNCH(cases::misaligned_vector, 1, 1, 0, nullptr, floats, reinterpret_cast<float4*>(floats + 16));
  if (is("too_many_threads")) KVRT_LAUNCH(cases::nothing, 1, 1025, 0, nullptr);
  if (is("too_much_shared")) KVRT_LAUNCH(cases::nothing, 1, 1, 227 * 1024 + 1, nullptr);
  free(on_heap);
}

}  // extern "C"
