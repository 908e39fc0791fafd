// int4.h with AVX2: a tile is two registers.
#pragma once

#include <immintrin.h>

#include "int4_byte.h"

namespace kvrt {

struct Avx2Lanes {
  static constexpr int kRows = 2;
  struct Int {
    __m256i at[2];
  };
  struct Float {
    __m256 at[2];
  };
  struct Codes {
    Int half[2];
  };
  static Int zero() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
  static Float load(const float *x) { return {{_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}}; }
  static void store(float *y, Float x) {
    for (int i = 0; i < 2; i++) _mm256_storeu_ps(y + 8 * i, x.at[i]);
  }
  static Float all(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
  static Float half(const uint8_t *x) {
    Float out;
    for (int i = 0; i < 2; i++)
      out.at[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x) + i));
    return out;
  }
  static Codes codes(const uint8_t *w) {
    const __m256i low = _mm256_set1_epi8(15);
    Codes out;
    for (int i = 0; i < 2; i++) {
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(w) + i);
      out.half[0].at[i] = _mm256_and_si256(both, low);
      out.half[1].at[i] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
    }
    return out;
  }
  static Codes look(const Codes &codes, const uint8_t *table) {
    const __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(table)));
    Codes out;
    for (int h = 0; h < 2; h++)
      for (int i = 0; i < 2; i++) out.half[h].at[i] = _mm256_shuffle_epi8(all, codes.half[h].at[i]);
    return out;
  }
  // 2 * 127 * 127 fits 16 bits, so that the first sum does not saturate
  static Int dot(Int sum, const Int &codes, const int8_t *x) {
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    const __m256i ones = _mm256_set1_epi16(1), all = _mm256_set1_epi32(four);
    for (int i = 0; i < 2; i++)
      sum.at[i] = _mm256_add_epi32(sum.at[i], _mm256_madd_epi16(_mm256_maddubs_epi16(codes.at[i], all), ones));
    return sum;
  }
  static Float total(const Int &high, const Int &high2, const Int &low, const Int &low2) {
    Float out;
    for (int i = 0; i < 2; i++) {
      const __m256i h = _mm256_slli_epi32(_mm256_add_epi32(high.at[i], high2.at[i]), 7);
      const __m256i l = _mm256_add_epi32(low.at[i], low2.at[i]);
      out.at[i] = _mm256_cvtepi32_ps(_mm256_add_epi32(h, l));
    }
    return out;
  }
  static Int plus(Int x, const Int &y) {
    for (int i = 0; i < 2; i++) x.at[i] = _mm256_add_epi32(x.at[i], y.at[i]);
    return x;
  }
  static Int high(Int x) {
    for (int i = 0; i < 2; i++) x.at[i] = _mm256_slli_epi32(x.at[i], 7);
    return x;
  }
  static Float number(const Int &x) { return {{_mm256_cvtepi32_ps(x.at[0]), _mm256_cvtepi32_ps(x.at[1])}}; }
  static Float product(const Float &x, const Float &y) {
    return {{_mm256_mul_ps(x.at[0], y.at[0]), _mm256_mul_ps(x.at[1], y.at[1])}};
  }
  static Float times(Float x, float y) {
    for (int i = 0; i < 2; i++) x.at[i] = _mm256_mul_ps(x.at[i], _mm256_set1_ps(y));
    return x;
  }
  static Float add_product(Float sum, const Float &x, const Float &y) {
    for (int i = 0; i < 2; i++) sum.at[i] = _mm256_add_ps(sum.at[i], _mm256_mul_ps(x.at[i], y.at[i]));
    return sum;
  }
};

}  // namespace kvrt
