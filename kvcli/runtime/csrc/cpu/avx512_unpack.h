// Packed codes to vectors, four tokens at a time, for the AVX-512 loops over pages.
//
// A "quad" is 64 channels of four rows: rows t, t+1 in the halves of one register, t+2, t+3 in those of another, so
// that one two-source byte permutation brings together any codes of the four. It puts the bytes that hold a few codes
// into each 64-bit lane, vpmultishiftqb moves every code to the bottom of a word, and what lies above it is ignored by the
// lookup: vpermw reads five bits, so a table of 32 entries repeats the levels. Codes of eight bits stay bytes.
//
//   scores   a 128-bit lane per token:   8 channels as words, or 16 as bytes
//   values   a 32-bit lane per channel:  2 tokens as words, or 4 as bytes
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace kvrt {
namespace {

struct alignas(64) Bytes64 {
  uint8_t at[64];
  operator __m512i() const { return _mm512_load_si512(at); }
};

// Permutations for all steps of a quad and the shifts they share. Pitch: bytes between the two rows in a register.
template <int Steps>
struct Spread {
  Bytes64 index[Steps];
  Bytes64 shift;
};

template <int Bits, int Pitch>
constexpr Spread<8> score_words_spread() {
  Spread<8> s{};
  for (int i = 0; i < 64; ++i) {
    const int token = i / 16, half = i / 8 % 2, m = i % 8;
    for (int j = 0; j < 8; ++j) {
      const int byte = (8 * j + 4 * half) * Bits / 8 + (m == 1 && Bits > 2 ? 1 : 0);
      s.index[j].at[i] = uint8_t(64 * (token / 2) + Pitch * (token % 2) + byte);
    }
    s.shift.at[i] = uint8_t(4 * half * Bits % 8 + m / 2 * Bits);
  }
  return s;
}

template <int Bits, int Pitch>
constexpr Spread<4> value_words_spread() {  // one register, two tokens
  Spread<4> s{};
  for (int i = 0; i < 64; ++i) {
    const int pair = i / 8, m = i % 8;
    for (int j = 0; j < 4; ++j) {
      int byte = (16 * j + 2 * pair) * Bits / 8 + m % 2;
      if (byte >= 8 * Bits) byte = 8 * Bits - 1;
      s.index[j].at[i] = uint8_t(Pitch * (m / 2 % 2) + byte);
    }
    s.shift.at[i] = uint8_t(16 * (m / 2 % 2) + 2 * pair * Bits % 8 + m / 4 * Bits);
  }
  return s;
}

constexpr Bytes64 transpose_4x16() {  // four lanes of 16 bytes to 16 lanes of four
  Bytes64 b{};
  for (int i = 0; i < 64; ++i) b.at[i] = uint8_t(i % 4 * 16 + i / 4);
  return b;
}

// Rows are Dense where a row is exactly 64 codes of at most 4 bits: then two of them are one load.
template <int Bits, bool Dense>
struct Unpack {
  static constexpr int kPitch = Dense ? 8 * Bits : 32;
  static constexpr Spread<8> kScoreWords = score_words_spread<Bits, kPitch>();
  static constexpr Spread<4> kValueWords = value_words_spread<Bits, kPitch>();

  __m512i low, high;  // rows 0, 1 and 2, 3

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

  // row: 64 channels (or the last of a row, in bytes) of the first of four rows.
  void load(const uint8_t *row, int64_t row_bytes, int bytes) {
    low = two_rows(row, row_bytes, bytes);
    high = two_rows(row + 2 * row_bytes, row_bytes, bytes);
  }

  __m512i score_words(int j, __m512i levels) const {
    const __m512i spread = _mm512_permutex2var_epi8(low, kScoreWords.index[j], high);
    return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(kScoreWords.shift, spread), levels);
  }
  static __m512i value_words(int j, __m512i two_rows, __m512i levels) {
    const __m512i spread = _mm512_permutexvar_epi8(kValueWords.index[j], two_rows);
    return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(kValueWords.shift, spread), levels);
  }
};

// Eight bits: codes are bytes already.
template <bool Dense>
struct Unpack<8, Dense> {
  static constexpr Bytes64 kTranspose = transpose_4x16();
  const uint8_t *row;
  int64_t row_bytes;

  void load(const uint8_t *row_, int64_t row_bytes_, int) { row = row_, row_bytes = row_bytes_; }

  __m512i score_bytes(int j) const {
    const auto part = [&](int t) { return _mm_loadu_si128((const __m128i *)(row + t * row_bytes + 16 * j)); };
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(part(0)), part(1), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(part(2)), part(3), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  __m512i value_bytes(int j) const { return _mm512_permutexvar_epi8(kTranspose, score_bytes(j)); }
};

}  // namespace
}  // namespace kvrt
