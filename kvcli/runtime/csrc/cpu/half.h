// float16 and bfloat16 to float32 and back, round to nearest even, in plain integer arithmetic that vectorises.
//
// Everything is `static`: this header is compiled with several instruction sets, and an inline function shared by the
// linker could bring one set's code to a machine that lacks it.
#pragma once

#include <cstdint>
#include <cstring>

#include "kv_layout.h"

namespace kvrt {

static inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

static inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

static inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = h & 0x7fffu;
  // subnormals are a small integer times 2^-24; written so, nothing depends on denormal float32 inputs
  const uint32_t small = bits_of(static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f);
  const uint32_t normal = (rest << 13) + (112u << 23);
  const uint32_t special = (rest << 13) | 0x7f800000u;
  return float_of(sign | (rest < 0x0400u ? small : rest < 0x7c00u ? normal : special));
}

static inline uint16_t float_to_half(float x) {
  const uint32_t u = bits_of(x), sign = u & 0x80000000u, f = u ^ sign;
  const uint32_t magic = 126u << 23;  // 0.5: its last bit weighs 2^-24, as float16's subnormals do
  const uint32_t small = bits_of(float_of(f < (113u << 23) ? f : 0u) + float_of(magic)) - magic;
  const uint32_t normal = (f - (112u << 23) + 0xfffu + ((f >> 13) & 1u)) >> 13;
  const uint32_t special = f > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return static_cast<uint16_t>((sign >> 16) | (f < (113u << 23) ? small : f < (143u << 23) ? normal : special));
}

static inline float bfloat_to_float(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

static inline uint16_t float_to_bfloat(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

static inline int64_t dtype_bytes(int dtype) { return dtype == KV_F32 ? 4 : 2; }

// values `at` ... `at + n - 1` of an array of dtype, as float32
static inline void load_row(const void *from, int dtype, int64_t at, int n, float *to) {
  if (dtype == KV_F32) {
    std::memcpy(to, static_cast<const float *>(from) + at, sizeof(float) * static_cast<size_t>(n));
    return;
  }
  const uint16_t *x = static_cast<const uint16_t *>(from) + at;
  if (dtype == KV_F16) {
    for (int i = 0; i < n; i++) to[i] = half_to_float(x[i]);
  } else {
    for (int i = 0; i < n; i++) to[i] = bfloat_to_float(x[i]);
  }
}

static inline void store_row(const float *from, void *to, int dtype, int64_t at, int n) {
  if (dtype == KV_F32) {
    std::memcpy(static_cast<float *>(to) + at, from, sizeof(float) * static_cast<size_t>(n));
    return;
  }
  uint16_t *y = static_cast<uint16_t *>(to) + at;
  if (dtype == KV_F16) {
    for (int i = 0; i < n; i++) y[i] = float_to_half(from[i]);
  } else {
    for (int i = 0; i < n; i++) y[i] = float_to_bfloat(from[i]);
  }
}

// what is left of values after a trip through dtype
static inline void round_row(float *x, int dtype, int n) {
  if (dtype == KV_F16) {
    for (int i = 0; i < n; i++) x[i] = half_to_float(float_to_half(x[i]));
  } else if (dtype == KV_BF16) {
    for (int i = 0; i < n; i++) x[i] = bfloat_to_float(float_to_bfloat(x[i]));
  }
}

static inline float decode_scale(const kv_format &f, const uint8_t *scales, int64_t i) {
  if (f.scale_dtype == KV_SCALE_E5M3) return half_to_float(static_cast<uint16_t>(scales[i] << 7));
  uint16_t h;
  std::memcpy(&h, scales + 2 * i, sizeof h);
  return half_to_float(h);
}

static inline float decode_zero(const uint8_t *zeros, int64_t i) {
  uint16_t h;
  std::memcpy(&h, zeros + 2 * i, sizeof h);
  return half_to_float(h);
}

}  // namespace kvrt
