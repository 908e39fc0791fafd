// What the bytes of a page mean, one thread at a time, in float32. kv_layout.h is the definition.
//
// Sums and products that the reference rounds one by one are written with __fmul_rn and friends, which nvcc never
// contracts to an FMA; that is what keeps codes and decoded values equal to the last bit.
#pragma once

#include <cstdint>

#include "launch.cuh"
// the emulator's or CUDA's runtime comes first
#include "../kv_layout.h"
#include "../kvrt.h"
#include "ptx.cuh"

namespace kvrt {

// ---- values of the three float dtypes -------------------------------------------------------------------------------

__host__ __device__ __forceinline__ int dtype_bytes(int dtype) { return dtype == KV_F32 ? 4 : 2; }

__device__ __forceinline__ float half_bits_to_float(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ __forceinline__ float bfloat_bits_to_float(uint32_t bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ float load_value(const void* base, int64_t index, int dtype) {
  if (dtype == KV_F32) return static_cast<const float*>(base)[index];
  const uint32_t bits = static_cast<const uint16_t*>(base)[index];
  return dtype == KV_F16 ? half_bits_to_float(bits) : bfloat_bits_to_float(bits);
}

__device__ __forceinline__ void store_value(void* base, int64_t index, int dtype, float value) {
  if (dtype == KV_F32) static_cast<float*>(base)[index] = value;
  else if (dtype == KV_F16) static_cast<__half*>(base)[index] = __float2half_rn(value);
  else static_cast<__nv_bfloat16*>(base)[index] = __float2bfloat16_rn(value);
}

__device__ __forceinline__ float round_to(float value, int dtype) {
  if (dtype == KV_F32) return value;
  return dtype == KV_F16 ? __half2float(__float2half_rn(value)) : __bfloat162float(__float2bfloat16_rn(value));
}

// Eight values beginning at a multiple of eight, from memory aligned to 16 bytes.
__device__ __forceinline__ void load_eight(const void* base, int64_t index, int dtype, float (&out)[8]) {
  if (dtype == KV_F32) {
    const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(base) + index);
    const float4 low = from[0], high = from[1];
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
    return;
  }
  const uint4 words = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(base) + index);
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const uint32_t bits = word[i / 2] >> (16 * (i % 2)) & 0xFFFF;
    out[i] = dtype == KV_F16 ? half_bits_to_float(bits) : bfloat_bits_to_float(bits);
  }
}

// ---- scales ---------------------------------------------------------------------------------------------------------

constexpr int E5M3_SHIFT = 7;  // mantissa bits of float16 that e5m3 drops

__host__ __device__ __forceinline__ int scale_bytes(const kv_format& format) {
  return format.scale_dtype == KV_SCALE_E5M3 ? 1 : 2;
}

// A scale as the bits of a float16.
__device__ __forceinline__ uint32_t load_scale_bits(const uint8_t* scales, int64_t index, int scale_dtype) {
  return scale_dtype == KV_SCALE_E5M3 ? static_cast<uint32_t>(scales[index]) << E5M3_SHIFT
                                      : reinterpret_cast<const uint16_t*>(scales)[index];
}

__device__ __forceinline__ float load_scale(const uint8_t* scales, int64_t index, int scale_dtype) {
  return half_bits_to_float(load_scale_bits(scales, index, scale_dtype));
}

// kvcli.quant.scales.encode_scales: rounds a non-negative scale; a positive one never becomes zero.
__device__ __forceinline__ uint32_t encode_scale(float scale, int scale_dtype, bool up) {
  scale = __fadd_rn(scale, 0.0f);  // no negative zero
  if (scale_dtype == KV_SCALE_F16) {
    const float clamped = scale > 0 ? fminf(fmaxf(scale, 0x1p-24f), 65504.0f) : __fadd_rn(scale, 0.0f);
    return __half_as_ushort(__float2half_rn(clamped));
  }
  const uint32_t bits = __half_as_ushort(__float2half_rn(fminf(scale, 61440.0f)));
  constexpr uint32_t half_step = 1u << (E5M3_SHIFT - 1);
  const uint32_t odd = bits >> E5M3_SHIFT & 1;
  const uint32_t rounded = (bits + (up ? 2 * half_step - 1 : half_step - 1 + odd)) >> E5M3_SHIFT;
  return scale > 0 && rounded == 0 ? 1 : rounded;
}

// ---- codes ----------------------------------------------------------------------------------------------------------

// Eight codes of b <= 8 bits are b whole bytes.
__device__ __forceinline__ uint64_t load_eight_codes(const uint8_t* at, int bits) {
  switch (bits) {  // the same for a whole launch: no divergence
    case 2: return *reinterpret_cast<const uint16_t*>(at);
    case 3: return at[0] | static_cast<uint32_t>(at[1]) << 8 | static_cast<uint32_t>(at[2]) << 16;
    case 4: return *reinterpret_cast<const uint32_t*>(at);
    default: return *reinterpret_cast<const uint64_t*>(at);
  }
}

__device__ __forceinline__ void store_eight_codes(uint8_t* at, int bits, uint64_t codes) {
  switch (bits) {
    case 2: *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(codes); break;
    case 3:
      for (int i = 0; i < 3; i++) at[i] = static_cast<uint8_t>(codes >> (8 * i));
      break;
    case 4: *reinterpret_cast<uint32_t*>(at) = static_cast<uint32_t>(codes); break;
    default: *reinterpret_cast<uint64_t*>(at) = codes;
  }
}

// One tensor's sections, of a page in global memory or of some of its tokens in shared memory.
struct Sections {
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* zeros;
  int pitch;  // bytes from one token's codes to the next
};

// Decode eight channels of one token, as stored: rotated if the format is, without the mean.
//
// token counts from where the sections begin; on the channel axis that is a multiple of the group, or the group is as
// long as what the sections hold.
__device__ __forceinline__ void decode_eight(const kv_format& format, int page_dtype, int head_dim, const Sections& at,
                                             int token, int chunk, float (&out)[8]) {
  const uint8_t* row = at.codes + static_cast<int64_t>(token) * at.pitch;
  if (format.bits >= 16) {
    load_eight(row, chunk * 8, format.bits == 32 ? static_cast<int>(KV_F32) : page_dtype, out);
    return;
  }
  const uint64_t codes = load_eight_codes(row + chunk * format.bits, format.bits);
  const uint32_t mask = (1u << format.bits) - 1;
  const float middle = static_cast<float>(mask) * 0.5f;
  // where the scale of channel 8 * chunk + i lies: first + i / every
  const bool token_axis = format.axis == KV_TOKEN;
  const int64_t first = token_axis ? static_cast<int64_t>(token) * (head_dim / format.group)
                                   : static_cast<int64_t>(token / format.group) * head_dim + chunk * 8;
  const bool single = token_axis && format.group % 8 == 0;
  const uint16_t* zeros = reinterpret_cast<const uint16_t*>(at.zeros);
  float scale = 0, zero = 0;
  if (single) {
    const int64_t index = first + chunk * 8 / format.group;
    scale = load_scale(at.scales, index, format.scale_dtype);
    if (!format.symmetric) zero = half_bits_to_float(zeros[index]);
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const uint32_t code = static_cast<uint32_t>(codes >> (i * format.bits)) & mask;
    if (!single) {
      const int64_t index = token_axis ? first + (chunk * 8 + i) / format.group : first + i;
      scale = load_scale(at.scales, index, format.scale_dtype);
      if (!format.symmetric) zero = half_bits_to_float(zeros[index]);
    }
    if (format.table) out[i] = __fmul_rn(format.levels[code], scale);
    else if (format.symmetric) out[i] = __fmul_rn(static_cast<float>(code) - middle, scale);
    else out[i] = __fadd_rn(__fmul_rn(static_cast<float>(code), scale), zero);
  }
}

}  // namespace kvrt
