// A page of random codes with what it decodes to, for ops_check.cpp.
#pragma once

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "page_ops.h"

namespace kvrt {
const PageOps &portable_ops() __attribute__((weak));
const PageOps *avx2_ops() __attribute__((weak));
const PageOps *avx512_ops() __attribute__((weak));
}  // namespace kvrt

using kvrt::PageOps;

namespace {

std::mt19937 rng(1);
float normal() { return std::normal_distribution<float>()(rng); }
int below(int n) { return int(rng() % unsigned(n)); }

float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float sign = h & 0x8000 ? -1.f : 1.f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? ldexpf(1 + mantissa / 1024.f, exponent - 15) : ldexpf(mantissa / 1024.f, -14));
}

struct Guarded {  // bytes that end where nothing may be read
  static constexpr size_t kSpace = 1 << 18;
  uint8_t *base;
  Guarded() {
    base = (uint8_t *)mmap(nullptr, kSpace + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(base + kSpace, 4096, PROT_NONE);
  }
  uint8_t *end_with(int64_t bytes) { return base + kSpace - bytes; }
};

struct Case {
  kv_layer layer{};
  kv_format f{};
  kv_page_layout at{};
  Guarded codes, scales, zeros;
  uint8_t *c, *s, *z;
  std::vector<double> value;  // [block][head_dim]
  std::vector<float> exact;   // the same, rounded as dequantize must

  std::string name() const {
    char text[200];
    snprintf(text, sizeof text, "bits %d axis %d group %d symmetric %d table %d scales %d head_dim %d block %d", f.bits,
             f.axis, f.group, f.symmetric, f.table, f.scale_dtype, layer.head_dim, layer.block_size);
    return text;
  }

  void put_scale(uint8_t *to, int64_t i, bool e5m3, bool poison, bool zero) {
    uint16_t h = uint16_t((11 + below(5)) << 10 | below(1024));  // 2^-4 ... 2
    if (below(20) == 0) h = uint16_t(below(4) << 7);            // zero, subnormal
    if (zero && below(2)) h |= 0x8000;
    if (poison) h = 0x7F80;
    if (e5m3) {
      to[i] = uint8_t(h >> 7);
    } else {
      memcpy(to + 2 * i, &h, 2);
    }
  }
  static float get_scale(const uint8_t *from, int64_t i, bool e5m3) {
    uint16_t h;
    if (e5m3) h = uint16_t(from[i] << 7);
    else memcpy(&h, from + 2 * i, 2);
    return half_to_float(h);
  }

  // Random codes; what tokens outside first ... last-1 alone own is poisoned.
  void fill(int first, int last) {
    const int d = layer.head_dim, b = layer.block_size;
    const int64_t row = kv_row_bytes(&f, d);
    c = codes.end_with(kv_align(row * b));
    s = scales.end_with(kv_align(kv_scale_bytes(&f, d, b)));
    z = zeros.end_with(kv_align(kv_zero_bytes(&f, d, b)));
    at.k_codes = at.v_codes = 0;
    at.k_scales = at.v_scales = s - c;
    at.k_zeros = at.v_zeros = z - c;
    value.assign(size_t(d) * b, 0);
    exact.assign(size_t(d) * b, 0);
    if (kv_is_exact(&f)) {
      for (int i = 0; i < d * b; ++i) {
        float x = normal();
        if (f.bits == 32) {
          memcpy(c + 4 * i, &x, 4);
        } else if (layer.page_dtype == KV_BF16) {
          uint32_t u;
          memcpy(&u, &x, 4);
          u &= 0xFFFF0000u;
          memcpy(&x, &u, 4);
          memcpy(c + 2 * i, (char *)&u + 2, 2);
        } else {
          const uint16_t h = uint16_t((10 + below(7)) << 10 | below(1024) | (below(2) << 15));
          memcpy(c + 2 * i, &h, 2);
          x = half_to_float(h);
        }
        value[i] = exact[i] = x;
      }
      return;
    }
    for (int64_t i = 0; i < row * b; ++i) c[i] = uint8_t(rng());
    const int64_t groups = kv_num_groups(&f, d, b);
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t token = i / (d / (f.axis == KV_TOKEN ? f.group : d));
      const bool poison = f.axis == KV_TOKEN && (token < first || token >= last);
      put_scale(s, i, f.scale_dtype, poison, false);
      if (!f.symmetric) put_scale(z, i, false, poison, true);
    }
    for (int t = 0; t < b; ++t)
      for (int i = 0; i < d; ++i) {
        int code = 0;
        for (int k = 0; k < f.bits; ++k) {
          const int bit = i * f.bits + k;
          code |= (c[t * row + bit / 8] >> (bit % 8) & 1) << k;
        }
        const int64_t g =
            f.axis == KV_TOKEN ? (int64_t)t * (d / f.group) + i / f.group : (int64_t)(t / f.group) * d + i;
        const float scale = get_scale(s, g, f.scale_dtype), zero = f.symmetric ? 0 : get_scale(z, g, false);
        volatile float product;  // no contraction
        if (f.table) product = f.levels[code] * scale;
        else if (f.symmetric) product = (float(code) - float((1 << f.bits) - 1) / 2) * scale;
        else product = float(code) * scale;
        value[t * d + i] = exact[t * d + i] = f.symmetric ? product : product + zero;
      }
  }
};

}  // namespace
