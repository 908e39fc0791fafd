// int4.h with AVX-512 and VNNI: a register is a tile.
#pragma once

#include <immintrin.h>

#include "int4_byte.h"

namespace kvrt {

struct Avx512Lanes {
  static constexpr int kRows = 8;
  using Int = __m512i;
  using Float = __m512;
  struct Codes {
    __m512i half[2];
  };
  static Int zero() { return _mm512_setzero_si512(); }
  static Float load(const float *x) { return _mm512_loadu_ps(x); }
  static void store(float *y, Float x) { _mm512_storeu_ps(y, x); }
  static Float all(float x) { return _mm512_set1_ps(x); }
  static Float half(const uint8_t *x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(x)));
  }
  static Codes codes(const uint8_t *w) {
    const __m512i low = _mm512_set1_epi8(15), both = _mm512_loadu_si512(w);
    return {{_mm512_and_si512(both, low), _mm512_and_si512(_mm512_srli_epi16(both, 4), low)}};
  }
  static Codes look(const Codes &codes, const uint8_t *table) {
    const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(table)));
    return {{_mm512_shuffle_epi8(all, codes.half[0]), _mm512_shuffle_epi8(all, codes.half[1])}};
  }
  static Int dot(Int sum, __m512i codes, const int8_t *x) {
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(four));
  }
  static Float total(Int high, Int high2, Int low, Int low2) {
    const __m512i h = _mm512_slli_epi32(_mm512_add_epi32(high, high2), 7), l = _mm512_add_epi32(low, low2);
    return _mm512_cvtepi32_ps(_mm512_add_epi32(h, l));
  }
  static Int plus(Int x, Int y) { return _mm512_add_epi32(x, y); }
  static Int high(Int x) { return _mm512_slli_epi32(x, 7); }
  static Float number(Int x) { return _mm512_cvtepi32_ps(x); }
  static Float product(Float x, Float y) { return _mm512_mul_ps(x, y); }
  static Float times(Float x, float y) { return _mm512_mul_ps(x, _mm512_set1_ps(y)); }
  static Float add_product(Float sum, Float x, Float y) { return _mm512_add_ps(sum, _mm512_mul_ps(x, y)); }
};

}  // namespace kvrt
