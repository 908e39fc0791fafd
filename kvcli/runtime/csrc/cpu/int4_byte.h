// The products of int4.h with activations of one byte: half the work, for many rows or where speed counts for more.
//
// Each group of activations has a scale of its own, x = step * q with q of -127 ... 127, as in llama.cpp's Q8_0. Rows are
// taken by 8, then by 4, 2 and 1; such a block has its activations in the order in which they are multiplied:
//
//   q: [input / 4][row][4], step and offset: [group][2][row]      offset = step * (sum of the group's q), for zeros
//
// so that codes are unpacked once for a block, and everything else is read from one place on. Which block a row falls
// into changes nothing about its result.
#pragma once

#include <algorithm>

#include "int4.h"

namespace kvrt {

constexpr int kRowBlock = 8;
static inline int row_block(int64_t left) { return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1; }

// Rows of a block of Block rows from the row `at` of it on.
template <class Lanes, int Rows, int Block, int Grid>
static inline void int4_byte_tile(const Int4Job &job, int64_t tile, int64_t block_row, int at) {
  using Int = typename Lanes::Int;
  using Float = typename Lanes::Float;
  constexpr int kChains = Rows > 2 ? 1 : 2;  // a dot product takes several cycles
  const int groups = job.in_features / job.group;
  const int64_t first = tile * kTile;
  const int count = job.out_features - first < kTile ? static_cast<int>(job.out_features - first) : kTile;
  alignas(64) float row[kTile] = {0};
  if (job.bias) load_row(job.bias, job.dtype, first, count, row);
  Float y[Rows];
  for (int r = 0; r < Rows; r++) y[r] = Lanes::load(row);
  const uint8_t *w = job.weights + tile * int4_tile_bytes(job.in_features, job.group);
  const int8_t *x = job.high + block_row * job.in_features + 4 * at;
  const float *step = job.scale + 2 * block_row * groups + at;
  for (int g = 0; g < groups; g++, step += 2 * Block) {
    Float scale = Lanes::half(w), zero = Lanes::half(w + 2 * kTile);
    if (Grid == KVRT_GRID_ZERO_CODE) zero = Lanes::times(Lanes::product(scale, zero), -1);
    if (Grid == KVRT_GRID_NF4) zero = Lanes::times(scale, -1), scale = Lanes::times(scale, 2.0f / kMaxLevel);
    w += 4 * kTile;
    Int sum[Rows][kChains], low[Rows];
    for (int r = 0; r < Rows; r++) {
      low[r] = Lanes::zero();
      for (int i = 0; i < kChains; i++) sum[r][i] = Lanes::zero();
    }
    for (int j = 0; j < job.group; j += 8, w += 64) {
      const typename Lanes::Codes codes = Lanes::codes(w);
      const typename Lanes::Codes top = Grid == KVRT_GRID_NF4 ? Lanes::look(codes, kNf4Bytes.high) : codes;
      for (int i = 0; i < 2; i++, x += 4 * Block)
        for (int r = 0; r < Rows; r++)
          sum[r][i % kChains] = Lanes::dot(sum[r][i % kChains], top.half[i], x + 4 * r);
      if (Grid == KVRT_GRID_NF4) {
        const typename Lanes::Codes bottom = Lanes::look(codes, kNf4Bytes.low);
        for (int i = 0; i < 2; i++)
          for (int r = 0; r < Rows; r++)
            low[r] = Lanes::dot(low[r], bottom.half[i], x + 4 * (i - 2) * Block + 4 * r);
      }
    }
    for (int r = 0; r < Rows; r++) {
      if (kChains == 2) sum[r][0] = Lanes::plus(sum[r][0], sum[r][1]);
      // at most 16383 * 127 * 1024, which fits
      if (Grid == KVRT_GRID_NF4) sum[r][0] = Lanes::plus(Lanes::high(sum[r][0]), low[r]);
      y[r] = Lanes::add_product(y[r], Lanes::number(sum[r][0]), Lanes::times(scale, step[r]));
      y[r] = Lanes::add_product(y[r], zero, Lanes::all(step[Block + r]));
    }
  }
  for (int r = 0; r < Rows; r++) {
    Lanes::store(row, y[r]);
    const int64_t to = (block_row + at + r) * job.out_features + first;
    if (count == kTile)
      store_row(row, job.out, job.out_dtype, to, kTile);
    else
      store_row(row, job.out, job.out_dtype, to, count);
  }
}

template <class Lanes, int Block, int Grid>
static inline void int4_byte_block(const Int4Job &job, int64_t tile, int64_t row) {
  constexpr int kRows = std::min(Block, Lanes::kRows);
  for (int at = 0; at < Block; at += kRows) int4_byte_tile<Lanes, kRows, Block, Grid>(job, tile, row, at);
}

// All rows of the outputs of tiles first ... last-1. A tile is small enough to stay in the nearest cache.
template <class Lanes, int Grid>
static void int4_byte_tiles(const Int4Job &job, int64_t first, int64_t last) {
  for (int64_t tile = first; tile < last; tile++)
    for (int64_t r = 0; r < job.rows; r += row_block(job.rows - r)) switch (row_block(job.rows - r)) {
        case 8: int4_byte_block<Lanes, 8, Grid>(job, tile, r); break;
        case 4: int4_byte_block<Lanes, 4, Grid>(job, tile, r); break;
        case 2: int4_byte_block<Lanes, 2, Grid>(job, tile, r); break;
        default: int4_byte_block<Lanes, 1, Grid>(job, tile, r);
      }
}

}  // namespace kvrt
