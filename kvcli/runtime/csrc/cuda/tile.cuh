// Sixteen tokens of one head's slice of a page, on their way from global to shared memory.
//
// A warp works on a tile at a time and copies its next ones meanwhile, alone: no barrier of the block is in its way,
// and each block has as many tiles in flight as it has warps and stages. Whatever the page's size, a tile is small.
#pragma once

#include "vector.cuh"

namespace kvrt {

// One tensor's part of a tile. Offsets "from" count from the head's slice, "at" from the tile in shared memory.
struct TensorTile {
  int codes_from, scales_from, zeros_from;
  int codes_at, scales_at, zeros_at;
  int row_bytes;    // of one token's codes
  int pitch;        // from one token's codes to the next in shared memory
  int scale_bytes;  // of the tile's scales
  int zero_bytes;
  int tiles_a_row;  // tiles that share their scales: more than one where a channel-axis group is longer than a tile
};

struct TilePlan {
  TensorTile k, v;
  int rope_at;  // one row of the rope table, that of the tile's first token; -1: none
  int bytes;
};

inline TensorTile plan_tensor(const kv_format& format, int head_dim, int64_t codes, int64_t scales, int64_t zeros,
                              int& end) {
  TensorTile tile = {};
  tile.codes_from = static_cast<int>(codes), tile.scales_from = static_cast<int>(scales);
  tile.zeros_from = static_cast<int>(zeros);
  tile.row_bytes = static_cast<int>(kv_row_bytes(&format, head_dim));
  // 16 bytes more a row put neighbouring tokens into different banks
  tile.pitch = tile.row_bytes % 16 == 0 ? tile.row_bytes + 16 : tile.row_bytes;
  tile.tiles_a_row = 1;
  int groups = 0;
  if (!kv_is_exact(&format)) {
    const bool channel = format.axis == KV_CHANNEL;
    if (channel && format.group > TILE) tile.tiles_a_row = format.group / TILE;
    groups = channel ? head_dim * (format.group > TILE ? 1 : TILE / format.group) : TILE * (head_dim / format.group);
  }
  tile.scale_bytes = groups * scale_bytes(format);
  tile.zero_bytes = format.symmetric ? 0 : groups * 2;
  tile.codes_at = end;
  tile.scales_at = static_cast<int>(kv_align(tile.codes_at + TILE * tile.pitch));
  tile.zeros_at = static_cast<int>(kv_align(tile.scales_at + tile.scale_bytes));
  end = static_cast<int>(kv_align(tile.zeros_at + tile.zero_bytes));
  return tile;
}

inline TilePlan plan_tile(const kv_layer& layer, bool with_rope) {
  const kv_page_layout at = kv_layout_of(&layer);
  TilePlan plan = {};
  int end = 0;
  plan.k = plan_tensor(layer.k, layer.head_dim, at.k_codes, at.k_scales, at.k_zeros, end);
  plan.v = plan_tensor(layer.v, layer.head_dim, at.v_codes, at.v_scales, at.v_zeros, end);
  plan.rope_at = with_rope ? end : -1;
  plan.bytes = end + (with_rope ? static_cast<int>(kv_align(layer.head_dim * static_cast<int>(sizeof(float)))) : 0);
  return plan;
}

// Copies by one warp. Sections begin at multiples of 16, so a size that is one too keeps all copies aligned; the other
// sizes are multiples of 8, since heads have a multiple of 8 channels.
__device__ __forceinline__ void copy_section(uint8_t* to, const uint8_t* from, int bytes) {
  const int lane = threadIdx.x % WARP;
  if (bytes % 16 == 0)
    for (int i = lane * 16; i < bytes; i += WARP * 16) ptx::cp_async16(to + i, from + i);
  else
    for (int i = lane * 8; i < bytes; i += WARP * 8) ptx::cp_async8(to + i, from + i);
}

// Start copying tile `tile` of a page; `valid` of its tokens have been written. Rows past them become zeros, as
// whatever lies there may be infinite or no number at all, which a weight of zero does not cancel.
__device__ __forceinline__ void load_tensor(const TensorTile& plan, uint8_t* stage, const uint8_t* slice, int tile,
                                            int valid) {
  const uint8_t* codes = slice + plan.codes_from + tile * TILE * plan.row_bytes;
  uint8_t* to = stage + plan.codes_at;
  if (plan.row_bytes % 16 == 0) {
    const int lane = threadIdx.x % WARP, row = lane / 2;
    for (int i = lane % 2 * 16; i < plan.row_bytes; i += 32)
      ptx::cp_async16_zfill(to + row * plan.pitch + i, codes + row * plan.row_bytes + i, row < valid);
  } else {
    copy_section(to, codes, TILE * plan.row_bytes);
  }
  const int row = tile / plan.tiles_a_row;
  if (plan.scale_bytes)
    copy_section(stage + plan.scales_at, slice + plan.scales_from + row * plan.scale_bytes, plan.scale_bytes);
  if (plan.zero_bytes)
    copy_section(stage + plan.zeros_at, slice + plan.zeros_from + row * plan.zero_bytes, plan.zero_bytes);
}

__device__ __forceinline__ Sections sections_of(const TensorTile& plan, const uint8_t* stage) {
  return {stage + plan.codes_at, stage + plan.scales_at, stage + plan.zeros_at, plan.pitch};
}

}  // namespace kvrt
