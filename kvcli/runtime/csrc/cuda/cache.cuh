// Which tokens a sequence holds, and where they lie. Everything that depends on lengths is read from device memory, so
// that a captured graph replays with whatever lengths the host wrote since.
#pragma once

#include "format.cuh"

namespace kvrt {

constexpr int WARP = 32;
constexpr int TILE = 16;  // tokens that a warp works on at a time; divides every block size
constexpr unsigned FULL_MASK = 0xFFFFFFFFu;

// One kv head of one sequence of the batch.
struct HeadView {
  const kv_layer& layer;
  const kvrt_cache& cache;
  int sequence, head;

  __device__ __forceinline__ int64_t length() const {
    return cache.lengths[sequence * cache.length_stride + head * cache.length_head_stride];
  }
  __device__ __forceinline__ int64_t slot() const { return cache.slots ? cache.slots[sequence] : sequence; }

  // The RoPE position of a token.
  __device__ __forceinline__ int64_t position(int64_t token) const {
    return cache.positions ? cache.positions[sequence * cache.position_stride + token] : token;
  }

  // Pool index of a logical page, -1 if it is not there.
  __device__ __forceinline__ int page(int64_t logical) const {
    if (logical >= cache.max_pages) return -1;
    return cache.block_tables[sequence * cache.block_table_stride + head * cache.block_table_head_stride + logical];
  }

  // The head's slice of a page.
  __device__ __forceinline__ uint8_t* slice(int64_t page, int64_t head_bytes) const {
    return cache.pages + (page * layer.num_kv_heads + head) * head_bytes;
  }

  // Index of the first value of a row of the tail or the sinks; which is 0 for keys, 1 for values.
  __device__ __forceinline__ int64_t tail_row(int which, int64_t token) const {
    return (((slot() * 2 + which) * layer.num_kv_heads + head) * layer.tail_tokens + token % layer.tail_tokens) *
           layer.head_dim;
  }
  __device__ __forceinline__ int64_t sink_row(int which, int64_t token) const {
    return (((slot() * 2 + which) * layer.num_kv_heads + head) * layer.sink_tokens + token) * layer.head_dim;
  }
};

// Which slots the last token of a sequence of n tokens sees, apart from sliding windows over explicit positions.
struct Visible {
  int64_t n, boundary, first;  // slots first ... n - 1; those below boundary are packed, unless they are sinks
  int64_t oldest_position;     // with explicit positions: the least that a sliding window shows
  bool by_position;

  __device__ __forceinline__ Visible(const HeadView& view, const int32_t* query_positions) {
    n = view.length() + 1;
    boundary = kv_boundary(&view.layer, n);
    by_position = view.layer.window > 0 && view.cache.positions != nullptr;
    first = by_position ? 0 : kv_first_visible(&view.layer, n);
    const int64_t query = query_positions ? query_positions[view.sequence] : by_position ? view.position(n - 1) : n - 1;
    oldest_position = query - view.layer.window + 1;
  }
  __device__ __forceinline__ bool shows(const HeadView& view, int64_t token) const {
    return token >= first && token < n && (!by_position || view.position(token) >= oldest_position);
  }
  __device__ __forceinline__ int64_t first_packed(const HeadView& view) const {
    return first > view.layer.sink_tokens ? first : view.layer.sink_tokens;
  }
};

}  // namespace kvrt
