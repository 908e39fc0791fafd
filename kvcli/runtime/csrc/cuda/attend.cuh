// What the two attend kernels share: parameters, the walk over pages, and the merging of warps and chunks.
#pragma once

#include "partial.cuh"
#include "tile.cuh"

namespace kvrt {

constexpr int MAX_STAGES = 4;

struct AttendParams {
  kv_layer layer;
  kvrt_attend_args args;
  TilePlan plan;
  int group_tiles;  // blocks that share a kv head, each with some of its query heads
  int stages;       // tiles of a warp in shared memory
  int first_split;  // that of blockIdx.x == 0; split args.splits is the exact part
  int mean;         // keys have a mean that is added to the scores
};

// Offsets into a block's dynamic shared memory, computed alike on both sides.
struct SharedPlan {
  int query, stored_query, mean_query, steps, fragments, running, scratch, scratch_bytes, stages, bytes;
};

// What a block works on.
struct Task {
  const AttendParams& params;
  HeadView view;
  int first_head, group;  // query heads first_head ... first_head + group - 1
  Visible visible;

  __device__ __forceinline__ Task(const AttendParams& p, int group_tile)
      : params(p),
        view{p.layer, p.args.cache, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y) / p.group_tiles},
        visible(view, p.args.query_positions) {
    const int whole = p.layer.num_heads / p.layer.num_kv_heads;
    const int begin = static_cast<int>(blockIdx.y) % p.group_tiles * group_tile;
    first_head = view.head * whole + begin;
    group = whole - begin < group_tile ? whole - begin : group_tile;
  }
  __device__ __forceinline__ int warp() const { return threadIdx.x / WARP; }
  __device__ __forceinline__ int warps() const { return blockDim.x / WARP; }

  __device__ __forceinline__ float capped(float score) const {
    const float cap = params.layer.softcap;
    return cap > 0 ? cap * tanhf(score / cap) : score;
  }
  // Leave a raw score where the weight will be; mass.cu turns it into one.
  __device__ __forceinline__ void keep_score(int query, int64_t token, float score) const {
    const kvrt_attend_args& args = params.args;
    if (args.mass && query < group && token < args.mass_stride)
      args.mass[(static_cast<int64_t>(view.sequence) * params.layer.num_heads + first_head + query) * args.mass_stride +
                token] = score;
  }
};

__device__ __forceinline__ void wait_for_oldest(int stages) {
  if (stages == 4) ptx::cp_async_wait<2>();
  else if (stages == 3) ptx::cp_async_wait<1>();
  else ptx::cp_async_wait<0>();
}

// Let an engine see all tiles of pages first ... last - 1 that are this warp's, in order.
template <class Engine>
__device__ __forceinline__ void walk_tiles(const Task& task, Engine& engine, int64_t first, int64_t last,
                                           uint8_t* stages) {
  const AttendParams& params = task.params;
  const kv_layer& layer = params.layer;
  const int tiles_a_page = layer.block_size / TILE, warps = task.warps();
  const int64_t low = task.visible.first_packed(task.view), high = task.visible.boundary;
  int64_t begin = first * tiles_a_page, end = last * tiles_a_page;
  if (begin < low / TILE) begin = low / TILE;
  if (end > (high + TILE - 1) / TILE) end = (high + TILE - 1) / TILE;
  begin += task.warp();
  const int64_t head_bytes = kv_layout_of(&layer).head_bytes;
  const auto load = [&](int64_t tile, int stage) {
    if (tile < end) {
      const int page = task.view.page(tile / tiles_a_page);
      if (page >= 0) {
        uint8_t* to = stages + stage * params.plan.bytes;
        const uint8_t* slice = task.view.slice(page, head_bytes);
        const int in_page = static_cast<int>(tile % tiles_a_page);
        const int valid = high - tile * TILE < TILE ? static_cast<int>(high - tile * TILE) : TILE;
        load_tensor(params.plan.k, to, slice, in_page, valid);
        load_tensor(params.plan.v, to, slice, in_page, valid);
        if (params.plan.rope_at >= 0)
          copy_section(to + params.plan.rope_at,
                       reinterpret_cast<const uint8_t*>(layer.rope + tile * TILE * layer.head_dim),
                       layer.head_dim * static_cast<int>(sizeof(float)));
      }
    }
    ptx::cp_async_commit();  // an empty group too, so that the count of groups stays that of tiles
  };
  for (int i = 0; i + 1 < params.stages; i++) load(begin + i * warps, i);
  int stage = 0;
  for (int64_t tile = begin; tile < end; tile += warps) {
    wait_for_oldest(params.stages);
    __syncwarp();  // all lanes' copies are here, and all lanes are done with the stage that is filled next
    load(tile + (params.stages - 1) * warps, stage ? stage - 1 : params.stages - 1);
    if (task.view.page(tile / tiles_a_page) >= 0)
      engine.tile(stages + stage * params.plan.bytes, tile * TILE, low, high);
    stage = stage + 1 < params.stages ? stage + 1 : 0;
  }
}

// Fold the warps' partials to that of the chunk, and it with what was there before, as combine.cu folds splits. All by
// the whole block, begins and ends with a barrier. Partials are [warps][group_tile][head_dim + 2].
__device__ __forceinline__ void merge_warps(const Task& task, int group_tile, const float* partials, float* running) {
  const int dim = task.params.layer.head_dim, floats = partial_floats(dim);
  __syncthreads();
  const auto fold = [&](int query, int at, float& maximum) {
    float sum = 0;
    maximum = -INFINITY;
    for (int warp = task.warps() - 1; warp >= 0; warp--) {
      const float* partial = partials + (warp * group_tile + query) * floats;
      const Weights weights = weigh(partial[0], maximum);
      sum = merged(weights, partial[at], sum);
      maximum = weights.maximum;
    }
    const Weights weights = weigh(maximum, running[query * floats]);
    maximum = weights.maximum;
    return merged(weights, sum, running[query * floats + at]);
  };
  float maximum = 0;
  for (int i = threadIdx.x; i < task.group * dim; i += blockDim.x) {
    const float sum = fold(i / dim, 2 + i % dim, maximum);
    running[i / dim * floats + 2 + i % dim] = sum;
  }
  __syncthreads();  // the maximum and the sum of weights change last: all of the above reads them
  for (int query = threadIdx.x; query < task.group; query += blockDim.x) {
    const float sum = fold(query, 1, maximum);
    running[query * floats] = maximum, running[query * floats + 1] = sum;
  }
  __syncthreads();
}

}  // namespace kvrt
