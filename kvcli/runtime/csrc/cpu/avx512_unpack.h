// Packed codes to vectors of bytes, four tokens at a time, for the AVX-512 loops over pages.
//
// A "quad" is 64 channels of four rows, a "spread" some of their bytes, brought by one permutation into the lanes that need
// them, and a "part" 64 codes of it, each at the bottom of a byte. What lies above a code is ignored by the lookup: vpermb
// reads six bits, so a table of 64 entries repeats the levels. No part need keep the channels in order: the query is laid
// out as the parts of keys are, and the sums of values are put in order at the end of a run.
//
//   scores   a 128-bit lane per token:   16 channels
//   values   a 32-bit lane per channel:  4 tokens
//
// Where codes are half or a quarter of a byte, a part is the spread shifted by so much; else vpmultishiftqb takes them out of
// 64-bit lanes. Codes of eight bits are bytes already.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace kvrt {
namespace {

struct alignas(64) Bytes64 {
  uint8_t at[64];
  operator __m512i() const { return _mm512_load_si512(at); }
};

// sum += unsigned bytes times signed ones, four to a lane. GCC's intrinsic ties sum to a copy of itself, which costs a move
// and, where sums fill the registers, memory.
inline void add_products(__m512i &sum, __m512i u, __m512i s) { __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s)); }

// The four parts of 64 channels: kSpreads * kParts. Rows are Dense where a row is exactly 64 codes of at most 4 bits, all of
// one group: then several of them are one load.
template <int Bits, bool Dense>
struct Spreads {
  static constexpr bool kQuarters = Bits == 2 && Dense;  // four rows are one register
  static constexpr bool kShifts = kQuarters || Bits == 4;
  static constexpr int kSpreads = Bits == 8 ? 4 : kQuarters ? 1 : 2, kParts = 4 / kSpreads;
  static constexpr int kWidth = 64 / kSpreads;  // channels of a spread
  static constexpr int kPitch = Dense ? 8 * Bits : 32;  // bytes between two rows in a register

  // Channel of byte `at` of a token's lane in part p of spread s, for scores.
  static constexpr int score_channel(int s, int p, int at) {
    if (Bits == 8) return 16 * s + at;
    if (kShifts) return kWidth * s + kParts * at + p;
    return 32 * s + at / 8 * 16 + 8 * p + at % 8;
  }

  struct Tables {
    Bytes64 score[kSpreads], value[kSpreads];            // indices
    Bytes64 score_shift[kParts], value_shift[kParts];  // for vpmultishiftqb
  };

  static constexpr Tables tables() {
    Tables t{};
    for (int i = 0; i < 64; ++i) {
      const auto index = [](int token, int byte) {
        return kQuarters ? uint8_t(16 * token + byte) : uint8_t(64 * (token / 2) + kPitch * (token % 2) + byte);
      };
      for (int s = 0; s < kSpreads; ++s) {
        if (kShifts) {
          t.score[s].at[i] = index(i / 16, 16 * s + i % 16);
          t.value[s].at[i] = index(i % 4, 16 * s + i / 4);
        } else {  // a 64-bit lane: 16 channels of a token, or 4 channels of four tokens, two bytes each
          const int byte = i % 8 < 2 * Bits ? i % 8 : 0;
          t.score[s].at[i] = index(i / 16, (32 * s + i / 8 % 2 * 16) * Bits / 8 + byte);
          t.value[s].at[i] = index(i % 8 / 2, (32 * s + i / 8 * 4) * Bits / 8 + (Bits == 3 ? i % 2 : 0));
        }
      }
      for (int p = 0; p < kParts && !kShifts; ++p) {
        t.score_shift[p].at[i] = uint8_t((8 * p + i % 8) * Bits);
        t.value_shift[p].at[i] = uint8_t(i % 4 * 16 + i / 8 * 4 * Bits % 8 + (2 * p + i % 8 / 4) * Bits);
      }
    }
    return t;
  }
};

constexpr Bytes64 transpose_4x16() {  // four lanes of 16 bytes to 16 lanes of four
  Bytes64 b{};
  for (int i = 0; i < 64; ++i) b.at[i] = uint8_t(i % 4 * 16 + i / 4);
  return b;
}

inline __m512i interleaved(__m512i a, __m512i b, int half) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return _mm512_permutex2var_epi32(a, half ? _mm512_add_epi32(low, _mm512_set1_epi32(8)) : low, b);
}

template <int Bits, bool Dense>
struct Unpack : Spreads<Bits, Dense> {
  using Base = Spreads<Bits, Dense>;
  static constexpr typename Base::Tables kTables = Base::tables();

  __m512i low, high;  // rows 0, 1 and 2, 3; all four in low where they fit

  static __m512i two_rows(const uint8_t *row, int64_t row_bytes, int bytes) {
    if constexpr (Dense) {
      if constexpr (Bits == 4) return _mm512_loadu_si512(row);
      return _mm512_maskz_loadu_epi8((1ull << (16 * Bits % 64)) - 1, row);
    } else {
      const __mmask32 mask = __mmask32((1ull << bytes) - 1);
      const __m256i first = _mm256_maskz_loadu_epi8(mask, row);
      return _mm512_inserti64x4(_mm512_castsi256_si512(first), _mm256_maskz_loadu_epi8(mask, row + row_bytes), 1);
    }
  }

  // row: the first of four; channels: those of the 64 that it has.
  void load(const uint8_t *row, int64_t row_bytes, int channels) {
    if constexpr (Base::kQuarters) {
      low = _mm512_loadu_si512(row);
    } else {
      low = two_rows(row, row_bytes, channels * Bits / 8);
      high = two_rows(row + 2 * row_bytes, row_bytes, channels * Bits / 8);
    }
  }

  __m512i score_spread(int s) const {
    return Base::kQuarters ? low : _mm512_permutex2var_epi8(low, kTables.score[s], high);
  }
  __m512i value_spread(int s) const {
    return Base::kQuarters ? _mm512_permutexvar_epi8(kTables.value[s], low)
                           : _mm512_permutex2var_epi8(low, kTables.value[s], high);
  }

  static __m512i shifted(__m512i x, int p) { return p ? _mm512_srli_epi16(x, unsigned(p * Bits)) : x; }
  static __m512i score_part(__m512i spread, int p, __m512i levels) {
    const __m512i codes = Base::kShifts ? shifted(spread, p)
                                        : _mm512_multishift_epi64_epi8(kTables.score_shift[p], spread);
    return _mm512_permutexvar_epi8(codes, levels);
  }
  static __m512i value_part(__m512i spread, int p, __m512i levels) {
    const __m512i codes = Base::kShifts ? shifted(spread, p)
                                        : _mm512_multishift_epi64_epi8(kTables.value_shift[p], spread);
    return _mm512_permutexvar_epi8(codes, levels);
  }

  // A spread's sums, one vector a part, to channels in order.
  static void order(__m512i (&x)[Base::kParts]) {
    if constexpr (Base::kQuarters) {
      const __m512i a = interleaved(x[0], x[2], 0), b = interleaved(x[1], x[3], 0);
      const __m512i c = interleaved(x[0], x[2], 1), d = interleaved(x[1], x[3], 1);
      x[0] = interleaved(a, b, 0), x[1] = interleaved(a, b, 1), x[2] = interleaved(c, d, 0), x[3] = interleaved(c, d, 1);
    } else {
      __m512i low, high;
      if constexpr (Base::kShifts) {
        low = interleaved(x[0], x[1], 0), high = interleaved(x[0], x[1], 1);
      } else {
        low = _mm512_permutex2var_epi64(x[0], _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), x[1]);
        high = _mm512_permutex2var_epi64(x[0], _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), x[1]);
      }
      x[0] = low, x[1] = high;
    }
  }
};

template <bool Dense>
struct Unpack<8, Dense> : Spreads<8, Dense> {
  static constexpr Bytes64 kTranspose = transpose_4x16();
  const uint8_t *row;
  int64_t row_bytes;

  void load(const uint8_t *row_, int64_t row_bytes_, int) { row = row_, row_bytes = row_bytes_; }

  __m512i score_spread(int s) const {
    const auto part = [&](int t) { return _mm_loadu_si128((const __m128i *)(row + t * row_bytes + 16 * s)); };
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(part(0)), part(1), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(part(2)), part(3), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  __m512i value_spread(int s) const { return _mm512_permutexvar_epi8(kTranspose, score_spread(s)); }
  static __m512i score_part(__m512i spread, int, __m512i) { return spread; }
  static __m512i value_part(__m512i spread, int, __m512i) { return spread; }
  static void order(__m512i (&)[1]) {}
};

}  // namespace
}  // namespace kvrt
