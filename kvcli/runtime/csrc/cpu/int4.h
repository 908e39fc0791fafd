// Linear layers in 4 bits, read once for a few rows of activations.
//
// Outputs are taken by 16, a tile; a tile is one stream of bytes, a stretch for each group of inputs:
//
//   | scales 16 x f16 | zeros 16 x f16 | codes: group / 8 vectors of 64 bytes |
//
// Byte 4 o + b of vector j holds the codes of output o: for input 8 j + b in its low half, for 8 j + 4 + b in its high
// half. So a vector is two operands of a dot product of four bytes, of 16 outputs each, with nothing to shuffle.
//
// Activations become 15-bit integers with a scale a group, in two signed bytes: x = scale * (128 high + low). Products
// and their sums are exact integers, and what follows is one multiplication after the other in the same order for every
// instruction set, so that all give the same bits.
#pragma once

#include <cstdint>

#include "half.h"
#include "kvrt.h"

namespace kvrt {

constexpr int kTile = 16;          // outputs side by side
constexpr int kHigh = 128;         // what the high byte of an activation weighs
constexpr int kMaxActivation = 127 * kHigh;
constexpr int kMaxByte = 127;     // the same in one byte
constexpr int kMaxGroup = 1024;
constexpr int kMaxLevel = kHigh * kHigh - 1;

// QLoRA's table (arXiv:2305.14314), and the same as (value + 1) / 2 * kMaxLevel = 128 high + low.
constexpr float kNf4[16] = {-1.0f,         -0.69619280f, -0.52507305f, -0.39491749f, -0.28444138f, -0.18477343f,
                            -0.09105004f,  0.0f,         0.07958030f,  0.16093020f,  0.24611230f,  0.33791524f,
                            0.44070983f,   0.56261700f,  0.72295684f,  1.0f};
struct Nf4Bytes {
  uint8_t high[16], low[16];
  constexpr Nf4Bytes() : high(), low() {
    for (int i = 0; i < 16; i++) {
      const int level = static_cast<int>((kNf4[i] + 1) / 2 * kMaxLevel + 0.5f);
      high[i] = static_cast<uint8_t>(level / kHigh), low[i] = static_cast<uint8_t>(level % kHigh);
    }
  }
};
constexpr Nf4Bytes kNf4Bytes{};

static inline int64_t int4_stretch(int group) { return 4 * kTile + int64_t{8} * group; }
static inline int64_t int4_tile_bytes(int in_features, int group) { return in_features / group * int4_stretch(group); }

struct Int4Job {
  const uint8_t *weights;
  const int8_t *high, *low;  // [rows][in_features]; with activations of one byte (int4_byte.h) only high
  const float *scale;        // [rows][groups]; with one byte steps and offsets
  const int32_t *sum;        // [rows][groups]: of the integers; with one byte nothing
  const void *bias;          // [out_features] of dtype, or null
  void *out;                 // [rows][out_features] of out_dtype
  int64_t rows;
  int out_features, in_features, group, grid, dtype, out_dtype;
};

template <class Lanes, int Rows, int Grid>
static inline void int4_tile(const Int4Job &job, int64_t tile, int64_t first_row) {
  using Int = typename Lanes::Int;
  using Float = typename Lanes::Float;
  const int groups = job.in_features / job.group, width = job.in_features;
  const int64_t first = tile * kTile;
  const int count = job.out_features - first < kTile ? static_cast<int>(job.out_features - first) : kTile;
  alignas(64) float row[kTile] = {0};
  if (job.bias) load_row(job.bias, job.dtype, first, count, row);
  Float y[Rows];
  for (int r = 0; r < Rows; r++) y[r] = Lanes::load(row);
  const uint8_t *w = job.weights + tile * int4_tile_bytes(width, job.group);
  for (int g = 0; g < groups; g++) {
    Float scale = Lanes::half(w), zero = Lanes::half(w + 2 * kTile);
    if (Grid == KVRT_GRID_ZERO_CODE) zero = Lanes::times(Lanes::product(scale, zero), -1);
    if (Grid == KVRT_GRID_NF4) zero = Lanes::times(scale, -1), scale = Lanes::times(scale, 2.0f / kMaxLevel);
    w += 4 * kTile;
    Int high[Rows][2], low[Rows][2];  // two chains each: a dot product takes several cycles
    Int mixed[Rows];
    for (int r = 0; r < Rows; r++) {
      mixed[r] = Lanes::zero();
      for (int i = 0; i < 2; i++) high[r][i] = low[r][i] = Lanes::zero();
    }
    for (int j = 0; j < job.group; j += 8, w += 64) {
      const typename Lanes::Codes codes = Lanes::codes(w);
      if (Grid == KVRT_GRID_NF4) {
        const typename Lanes::Codes top = Lanes::look(codes, kNf4Bytes.high);
        const typename Lanes::Codes bottom = Lanes::look(codes, kNf4Bytes.low);
        for (int r = 0; r < Rows; r++) {
          const int64_t at = (first_row + r) * width + static_cast<int64_t>(g) * job.group + j;
          for (int i = 0; i < 2; i++) {
            high[r][0] = Lanes::dot(high[r][0], top.half[i], job.high + at + 4 * i);
            low[r][0] = Lanes::dot(low[r][0], bottom.half[i], job.low + at + 4 * i);
            mixed[r] = Lanes::dot(mixed[r], top.half[i], job.low + at + 4 * i);
            mixed[r] = Lanes::dot(mixed[r], bottom.half[i], job.high + at + 4 * i);
          }
        }
        continue;
      }
      for (int r = 0; r < Rows; r++) {
        const int64_t at = (first_row + r) * width + static_cast<int64_t>(g) * job.group + j;
        for (int i = 0; i < 2; i++) {
          high[r][i] = Lanes::dot(high[r][i], codes.half[i], job.high + at + 4 * i);
          low[r][i] = Lanes::dot(low[r][i], codes.half[i], job.low + at + 4 * i);
        }
      }
    }
    for (int r = 0; r < Rows; r++) {
      const int64_t at = (first_row + r) * groups + g;
      Float total = Lanes::total(high[r][0], high[r][1], low[r][0], low[r][1]);
      if (Grid == KVRT_GRID_NF4) {  // their sum would not fit 32 bits
        total = Lanes::times(Lanes::number(high[r][0]), kHigh * kHigh);
        total = Lanes::add_product(total, Lanes::number(mixed[r]), Lanes::all(kHigh));
        total = Lanes::add_product(total, Lanes::number(low[r][0]), Lanes::all(1));
      }
      const float step = job.scale[at];
      y[r] = Lanes::add_product(y[r], total, Lanes::times(scale, step));
      y[r] = Lanes::add_product(y[r], zero, Lanes::all(step * static_cast<float>(job.sum[at])));
    }
  }
  for (int r = 0; r < Rows; r++) {
    Lanes::store(row, y[r]);
    store_row(row, job.out, job.out_dtype, (first_row + r) * job.out_features + first, count);
  }
}

// All rows of the outputs of tiles first ... last-1. A tile is small enough to stay in the nearest cache.
template <class Lanes, int Grid>
static void int4_byte_tiles(const Int4Job &job, int64_t first, int64_t last);

template <class Lanes, int Grid>
static void int4_tiles_of(const Int4Job &job, int64_t first, int64_t last) {
  if (!job.low) return int4_byte_tiles<Lanes, Grid>(job, first, last);
  for (int64_t tile = first; tile < last; tile++) {
    int64_t r = 0;
    for (; r + 4 <= job.rows; r += 4) int4_tile<Lanes, 4, Grid>(job, tile, r);
    for (; r + 2 <= job.rows; r += 2) int4_tile<Lanes, 2, Grid>(job, tile, r);
    if (r < job.rows) int4_tile<Lanes, 1, Grid>(job, tile, r);
  }
}

template <class Lanes>
static void int4_tiles(const Int4Job &job, int64_t first, int64_t last) {
  switch (job.grid) {
    case KVRT_GRID_ZERO_CODE: return int4_tiles_of<Lanes, KVRT_GRID_ZERO_CODE>(job, first, last);
    case KVRT_GRID_NF4: return int4_tiles_of<Lanes, KVRT_GRID_NF4>(job, first, last);
    default: return int4_tiles_of<Lanes, KVRT_GRID_ZERO_WEIGHT>(job, first, last);
  }
}

// Plain C++, and what the others have to agree with.
struct PortableLanes {
  static constexpr int kRows = 1;  // of one-byte activations, as many as fit the registers
  struct Int {
    int32_t at[kTile];
  };
  struct Float {
    float at[kTile];
  };
  struct Codes {
    uint8_t half[2][4 * kTile];
  };
  static Int zero() { return {}; }
  static Float load(const float *x) {
    Float out;
    for (int i = 0; i < kTile; i++) out.at[i] = x[i];
    return out;
  }
  static void store(float *y, const Float &x) {
    for (int i = 0; i < kTile; i++) y[i] = x.at[i];
  }
  static Float all(float x) {
    Float out;
    for (int i = 0; i < kTile; i++) out.at[i] = x;
    return out;
  }
  static Float half(const uint8_t *x) {
    uint16_t h[kTile];
    std::memcpy(h, x, sizeof h);
    Float out;
    for (int i = 0; i < kTile; i++) out.at[i] = half_to_float(h[i]);
    return out;
  }
  static Codes codes(const uint8_t *w) {
    Codes out;
    for (int i = 0; i < 4 * kTile; i++) out.half[0][i] = w[i] & 15, out.half[1][i] = w[i] >> 4;
    return out;
  }
  static Codes look(const Codes &codes, const uint8_t *table) {
    Codes out;
    for (int h = 0; h < 2; h++)
      for (int i = 0; i < 4 * kTile; i++) out.half[h][i] = table[codes.half[h][i]];
    return out;
  }
  static Int dot(Int sum, const uint8_t *codes, const int8_t *x) {
    for (int i = 0; i < kTile; i++)
      for (int b = 0; b < 4; b++) sum.at[i] += codes[4 * i + b] * x[b];
    return sum;
  }
  static Float total(const Int &high, const Int &high2, const Int &low, const Int &low2) {
    Float out;
    for (int i = 0; i < kTile; i++)
      out.at[i] = static_cast<float>((high.at[i] + high2.at[i]) * kHigh + (low.at[i] + low2.at[i]));
    return out;
  }
  static Int plus(Int x, const Int &y) {
    for (int i = 0; i < kTile; i++) x.at[i] += y.at[i];
    return x;
  }
  static Int high(Int x) {
    for (int i = 0; i < kTile; i++) x.at[i] *= kHigh;
    return x;
  }
  static Float number(const Int &x) {
    Float out;
    for (int i = 0; i < kTile; i++) out.at[i] = static_cast<float>(x.at[i]);
    return out;
  }
  static Float product(Float x, const Float &y) {
    for (int i = 0; i < kTile; i++) x.at[i] *= y.at[i];
    return x;
  }
  static Float times(Float x, float y) {
    for (int i = 0; i < kTile; i++) x.at[i] *= y;
    return x;
  }
  static Float add_product(Float sum, const Float &x, const Float &y) {
    for (int i = 0; i < kTile; i++) sum.at[i] += x.at[i] * y.at[i];
    return sum;
  }
};

}  // namespace kvrt
