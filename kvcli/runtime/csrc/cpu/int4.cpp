// Linear layers in 4 bits: activations into integers, tiles over threads, and weights written out for many rows.
#include "int4_byte.h"

#include "cache_view.h"
#include "multiversion.h"

namespace kvrt {
namespace {

// x[i] = scale * (128 high[i] + low[i]), with one scale for the group, up to half a step of 1/16256 of its largest value
KVRT_CLONES
void split_activations(const float *x, int n, int group, int8_t *high, int8_t *low, float *scale, int32_t *sum) {
  const float shift = 12582912.0f;  // adding it rounds to a whole number, half to even
  for (int first = 0; first < n; first += group) {
    uint32_t largest = 0;  // sizes are ordered as their bits are, and what is not finite comes last
    for (int i = first; i < first + group; i++) {
      const uint32_t size = bits_of(x[i]) & 0x7fffffffu;
      largest = size > largest ? size : largest;
    }
    const bool finite = largest < 0x7f800000u;
    const float most = float_of(largest), step = finite ? most / kMaxActivation : most - most;
    const float inverse = finite && step >= 0x1p-126f ? kMaxActivation / most : 0;
    int32_t total = 0;
    for (int i = first; i < first + group; i++) {
      const int32_t whole = inverse > 0 ? static_cast<int32_t>((x[i] * inverse + shift) - shift) : 0;
      const int32_t top = (whole + kHigh / 2) >> 7;
      high[i] = static_cast<int8_t>(top);
      low[i] = static_cast<int8_t>(whole - top * kHigh);
      total += whole;
    }
    *scale++ = step;
    *sum++ = total;
  }
}

// The same in one byte, for a block of rows: int4_byte.h says how they lie. x [rows][n]
KVRT_CLONES
void round_activations(const float *x, int rows, int n, int group, int8_t *out, float *steps) {
  const float shift = 12582912.0f;
  for (int r = 0; r < rows; r++)
    for (int first = 0; first < n; first += group) {
      const float *from = x + static_cast<int64_t>(r) * n + first;
      uint32_t largest = 0;
      for (int i = 0; i < group; i++) {
        const uint32_t size = bits_of(from[i]) & 0x7fffffffu;
        largest = size > largest ? size : largest;
      }
      const bool finite = largest < 0x7f800000u;
      const float most = float_of(largest), step = finite ? most / kMaxByte : most - most;
      const float inverse = finite && step >= 0x1p-126f ? kMaxByte / most : 0;
      int32_t total = 0;
      int8_t whole[kMaxGroup];
      for (int i = 0; i < group; i++) {
        const int32_t q = inverse > 0 ? static_cast<int32_t>((from[i] * inverse + shift) - shift) : 0;
        whole[i] = static_cast<int8_t>(q);
        total += q;
      }
      for (int i = 0; i < group; i += 4) std::memcpy(out + (first + i) * rows + 4 * r, whole + i, 4);
      float *at = steps + 2 * (first / group) * rows + r;
      at[0] = step;
      at[rows] = step * static_cast<float>(total);
    }
}

// Tiles first ... last-1 as bf16 [in_features][stride], outputs side by side from column 0 on.
KVRT_CLONES
void expand_tiles(const uint8_t *weights, int in_features, int group, int grid, int64_t first, int64_t last,
                  uint16_t *out, int64_t stride) {
  for (int64_t tile = first; tile < last; tile++) {
    const uint8_t *w = weights + tile * int4_tile_bytes(in_features, group);
    for (int g = 0; g < in_features; g += group) {
      uint16_t both[2 * kTile];
      std::memcpy(both, w, sizeof both);
      w += sizeof both;
      float scale[kTile], zero[kTile];
      for (int o = 0; o < kTile; o++) {
        scale[o] = half_to_float(both[o]), zero[o] = half_to_float(both[kTile + o]);
        if (grid == KVRT_GRID_ZERO_CODE) zero[o] *= -scale[o];
        if (grid == KVRT_GRID_NF4) zero[o] = 0;
      }
      for (int j = 0; j < group; j += 8, w += 64) {
        uint32_t codes[kTile];
        std::memcpy(codes, w, sizeof codes);
        for (int i = 0; i < 8; i++) {
          const int at = 8 * (i % 4) + 4 * (i / 4);
          uint16_t *y = out + (g + j + i) * stride + tile * kTile;
          for (int o = 0; o < kTile; o++) {
            const int32_t bits = static_cast<int32_t>(codes[o] >> at & 15);
            const float code = grid == KVRT_GRID_NF4 ? kNf4[bits] : static_cast<float>(bits);
            y[o] = float_to_bfloat(code * scale[o] + zero[o]);
          }
        }
      }
    }
  }
}

bool is_grid(int32_t grid) { return grid >= KVRT_GRID_ZERO_WEIGHT && grid <= KVRT_GRID_NF4; }

bool is_shape(int32_t in_features, int32_t group) {
  return group > 0 && group % 8 == 0 && group <= kMaxGroup && in_features > 0 && in_features % group == 0;
}

}  // namespace
}  // namespace kvrt

using namespace kvrt;

extern "C" {

int kvrt_int4_matmul(void *y, const void *x, const void *weights, const void *bias, int64_t rows, int32_t out_features,
                     int32_t in_features, int32_t group, int32_t grid, int32_t dtype, int32_t out_dtype,
                     int32_t activation_bits, const kvrt_exec *exec) {
  if (!is_grid(grid) || !is_dtype(dtype) || !is_dtype(out_dtype) || rows < 0 || out_features < 1) return KVRT_INVALID;
  if (!is_shape(in_features, group) || !weights || (rows && (!x || !y))) return KVRT_INVALID;
  if (activation_bits != 8 && activation_bits != 16) return KVRT_INVALID;
  const bool byte = activation_bits == 8;
  const int64_t groups = in_features / group, values = rows * in_features, blocks = (rows + kRowBlock - 1) / kRowBlock;
  const int threads = threads_for(exec, blocks, 4.0 * static_cast<double>(values));
  const Scratch block(static_cast<int64_t>(kRowBlock) * in_features, threads), steps(2 * rows * groups, 1);
  const Scratch parts(((byte ? 1 : 2) * values + 3) / 4, 1);
  if (!block.data() || !steps.data() || !parts.data()) return KVRT_NO_MEMORY;
  int8_t *high = reinterpret_cast<int8_t *>(parts.data()), *low = byte ? nullptr : high + values;
  float *scale = steps.data();
  int32_t *sum = reinterpret_cast<int32_t *>(scale + rows * groups);
  over_rows(blocks, threads, [&](int64_t first, int64_t last) {
    float *row = block.mine();
    const int64_t end = std::min(rows, last * kRowBlock);
    for (int64_t r = first * kRowBlock; r < end;) {
      const int taken = byte ? row_block(end - r) : 1;
      load_row(x, dtype, r * in_features, taken * in_features, row);
      if (byte)
        round_activations(row, taken, in_features, group, high + r * in_features, scale + 2 * r * groups);
      else
        split_activations(row, in_features, group, high + r * in_features, low + r * in_features, scale + r * groups,
                          sum + r * groups);
      r += taken;
    }
  });
  const Int4Job job{static_cast<const uint8_t *>(weights), high, low, scale, sum, bias, y, rows, out_features,
                    in_features, group, grid, dtype, out_dtype};
  const int64_t tiles = (out_features + kTile - 1) / kTile;
  const PageOps &ops = current_ops();
  over_rows(tiles, threads_for(exec, tiles, static_cast<double>(rows) * out_features * in_features),
            [&](int64_t first, int64_t last) { ops.int4_tiles(job, first, last); });
  return KVRT_OK;
}

int kvrt_int4_expand(void *out, const void *weights, int32_t first, int32_t count, int32_t in_features, int32_t group,
                     int32_t grid, const kvrt_exec *exec) {
  if (!is_grid(grid) || !is_shape(in_features, group)) return KVRT_INVALID;
  if (first < 0 || count < 0 || first % kTile || count % kTile) return KVRT_INVALID;
  if (!weights || (count && !out)) return KVRT_INVALID;
  const uint8_t *from = static_cast<const uint8_t *>(weights) + first / kTile * int4_tile_bytes(in_features, group);
  const int64_t tiles = count / kTile;
  over_rows(tiles, threads_for(exec, tiles, static_cast<double>(count) * in_features * 4),
            [&](int64_t a, int64_t b) {
              expand_tiles(from, in_features, group, grid, a, b, static_cast<uint16_t *>(out), count);
            });
  return KVRT_OK;
}

}  // extern "C"
