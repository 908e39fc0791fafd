// A warp's attention over tiles of sixteen tokens on the ordinary cores, in float32: any format and any head size.
#pragma once

#include "attend.cuh"

namespace kvrt {

// Where a block keeps what its warps share; null where a layer has no need of it. Rows are head_dim floats.
struct SharedQuery {
  const float* query;   // [group tile]: scaled
  const float* stored;  // [group tile]: rotated as the coded keys are
  const float* mean;    // [group tile]: a, then b: the cosines' and sines' factors in query times mean
  const float* steps;   // [16]: cosines and sines of 0 ... 15 times each frequency
};

// GROUP queries of one kv head. In the products a lane works on a token and half its channels, in the sums of values on
// eight channels and some of the tokens.
template <int GROUP>
struct ScalarEngine {
  const Task& task;
  const SharedQuery& shared;
  float* scratch;  // of this warp: [GROUP] rows for the mean, then [16] rows where keys are stored before RoPE
  float maximum[GROUP], sum[GROUP], values[GROUP][8];

  __device__ __forceinline__ ScalarEngine(const Task& t, const SharedQuery& s, float* own)
      : task(t), shared(s), scratch(own) {}

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int q = 0; q < GROUP; q++) {
      maximum[q] = -INFINITY, sum[q] = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) values[q][i] = 0;
    }
  }

  // scores += rows of queries times eight channels
  __device__ __forceinline__ static void multiply(const float* queries, int dim, int chunk, const float (&x)[8],
                                                  float (&scores)[GROUP]) {
#pragma unroll
    for (int q = 0; q < GROUP; q++) {
      float query[8];
      load_eight(queries, q * dim + chunk * 8, KV_F32, query);
#pragma unroll
      for (int i = 0; i < 8; i++) scores[q] += query[i] * x[i];
    }
  }

  // One softmax step over sixteen tokens. score is this lane's token's; value(token, chunk, out) decodes.
  template <class Value>
  __device__ __forceinline__ void accumulate(float (&scores)[GROUP], Value value) {
    const int dim = task.params.layer.head_dim, lane = threadIdx.x % WARP;
    float weight[GROUP];
#pragma unroll
    for (int q = 0; q < GROUP; q++) {
      const float highest = fmaxf(maximum[q], warp_max(scores[q]));
      const float shrink = highest == -INFINITY ? 1.0f : exp_of(maximum[q] - highest);
      weight[q] = highest == -INFINITY ? 0.0f : exp_of(scores[q] - highest);
      maximum[q] = highest;
      sum[q] = sum[q] * shrink + weight[q];
#pragma unroll
      for (int i = 0; i < 8; i++) values[q][i] *= shrink;
    }
    const int chunks = dim / 8, lanes = lanes_a_token(), chunk = lane % lanes;
    for (int base = 0; base < TILE; base += WARP / lanes) {
      const int token = base + lane / lanes;
      float out[8], own[GROUP];
#pragma unroll
      for (int q = 0; q < GROUP; q++) own[q] = __shfl_sync(FULL_MASK, weight[q], token % TILE);
      if (token >= TILE || chunk >= chunks || !value(token, chunk, out)) continue;
#pragma unroll
      for (int q = 0; q < GROUP; q++)
#pragma unroll
        for (int i = 0; i < 8; i++) values[q][i] += own[q] * out[i];
    }
  }

  // Lanes that share a token when values are summed: a power of two, at least a chunk each.
  __device__ __forceinline__ int lanes_a_token() const {
    int lanes = 1;
    while (lanes < task.params.layer.head_dim / 8) lanes *= 2;
    return lanes;
  }

  __device__ __forceinline__ void add_mean(const uint8_t* stage, int64_t token, float (&scores)[GROUP]) {
    const kv_layer& layer = task.params.layer;
    const int dim = layer.head_dim, half = dim / 2, lane = threadIdx.x % WARP;
    const float* queries = shared.mean;
    const float* row;
    if (task.params.plan.rope_at >= 0) {
      // turn (a, b) to the tile's first position; from there it is the same few steps for every tile
      const float* base = reinterpret_cast<const float*>(stage + task.params.plan.rope_at);
      for (int i = lane; i < GROUP * half; i += WARP) {
        const int at = i / half * dim + i % half;
        const float a = shared.mean[at], b = shared.mean[at + half];
        const float cosine = base[i % half], sine = base[i % half + half];
        scratch[at] = cosine * a + sine * b;
        scratch[at + half] = cosine * b - sine * a;
      }
      __syncwarp();
      queries = scratch;
      row = shared.steps + lane % TILE * dim;
    } else {
      row = layer.rope + task.view.position(token) * dim;
    }
    for (int chunk = lane / TILE; chunk < dim / 8; chunk += 2) {
      float x[8];
      load_eight(row, chunk * 8, KV_F32, x);
      multiply(queries, dim, chunk, x, scores);
    }
  }

  // Sixteen packed tokens from `first` on; those of low ... high - 1 count. Comes after a barrier of the warp: scratch,
  // which all lanes read for the last tile, is written.
  __device__ __forceinline__ void tile(const uint8_t* stage, int64_t first, int64_t low, int64_t high) {
    const kv_layer& layer = task.params.layer;
    const int dim = layer.head_dim, lane = threadIdx.x % WARP;
    const int64_t token = first + lane % TILE;
    const bool shown = token >= low && token < high && task.visible.shows(task.view, token);
    const Sections keys = sections_of(task.params.plan.k, stage), stored = sections_of(task.params.plan.v, stage);
    float scores[GROUP] = {};
    if (layer.rope_before && !kv_is_exact(&layer.k)) {
      float* rows = scratch + GROUP * dim;
      const int valid = high - first < TILE ? static_cast<int>(high - first) : TILE;
      for (int i = lane; i < valid * (dim / 8); i += WARP) {
        float x[8];
        decode_eight(layer.k, layer.page_dtype, dim, keys, i / (dim / 8), i % (dim / 8), x);
        for (int j = 0; j < 8; j++) rows[i * 8 + j] = x[j];
      }
      finish_rows(WarpTeam(), task.view, true, KEYS_AFTER_ROPE, first, valid, rows, dim);
      if (shown)
        for (int chunk = lane / TILE; chunk < dim / 8; chunk += 2) {
          float x[8];
          load_eight(rows, lane % TILE * dim + chunk * 8, KV_F32, x);
          multiply(shared.query, dim, chunk, x, scores);
        }
    } else {
      if (shown)
        for (int chunk = lane / TILE; chunk < dim / 8; chunk += 2) {
          float x[8];
          decode_eight(layer.k, layer.page_dtype, dim, keys, lane % TILE, chunk, x);
          multiply(shared.stored, dim, chunk, x, scores);
        }
      if (task.params.mean) add_mean(stage, shown ? token : first, scores);
    }
    finish_scores(scores, token, shown);
    accumulate(scores, [&](int t, int chunk, float(&out)[8]) {
      if (first + t >= high) return false;  // not written yet: the scales may be no numbers
      decode_eight(layer.v, layer.page_dtype, dim, stored, t, chunk, out);
      return true;
    });
  }

  __device__ __forceinline__ void finish_scores(float (&scores)[GROUP], int64_t token, bool shown) {
#pragma unroll
    for (int q = 0; q < GROUP; q++) {
      scores[q] += __shfl_xor_sync(FULL_MASK, scores[q], TILE);
      scores[q] = shown ? task.capped(scores[q]) : -INFINITY;
      if (shown && threadIdx.x % WARP < TILE) task.keep_score(q, token, scores[q]);
    }
  }

  // Sixteen exact tokens. Entry e of `entries` is sink sinks_first + e if e < sinks, else a token of the tail.
  __device__ __forceinline__ void exact_tile(int64_t first, int64_t entries, int64_t sinks_first, int64_t sinks,
                                             int64_t tail_first) {
    const kv_layer& layer = task.params.layer;
    const kvrt_cache& cache = task.params.args.cache;
    const int dim = layer.head_dim, lane = threadIdx.x % WARP;
    const auto load = [&](int which, int64_t entry, int chunk, float(&out)[8]) {
      if (entry < sinks)
        load_eight(cache.sinks, task.view.sink_row(which, sinks_first + entry) + chunk * 8, layer.exact_dtype, out);
      else
        load_eight(cache.tail, task.view.tail_row(which, tail_first + entry - sinks) + chunk * 8, layer.exact_dtype,
                   out);
    };
    const int64_t entry = first + lane % TILE;
    const int64_t token = entry < sinks ? sinks_first + entry : tail_first + entry - sinks;
    const bool shown = entry < entries && task.visible.shows(task.view, token);
    float scores[GROUP] = {};
    if (shown)
      for (int chunk = lane / TILE; chunk < dim / 8; chunk += 2) {
        float x[8];
        load(0, entry, chunk, x);
        multiply(shared.query, dim, chunk, x, scores);
      }
    finish_scores(scores, token, shown);
    accumulate(scores, [&](int t, int chunk, float(&out)[8]) {
      if (first + t >= entries) return false;
      load(1, first + t, chunk, out);
      return true;
    });
  }

  // Leave this warp's sums at partial [GROUP][head_dim + 2].
  __device__ __forceinline__ void finish(float* partial) {
    const int dim = task.params.layer.head_dim, floats = partial_floats(dim), lane = threadIdx.x % WARP;
    const int lanes = lanes_a_token();
#pragma unroll
    for (int q = 0; q < GROUP; q++) {
      for (int step = lanes; step < WARP; step *= 2)
#pragma unroll
        for (int i = 0; i < 8; i++) values[q][i] += __shfl_xor_sync(FULL_MASK, values[q][i], step);
      for (int step = TILE / 2; step; step /= 2) sum[q] += __shfl_xor_sync(FULL_MASK, sum[q], step);
      if (lane == 0) partial[q * floats] = maximum[q], partial[q * floats + 1] = sum[q];
      if (lane < dim / 8)
        for (int i = 0; i < 8; i++) partial[q * floats + 2 + lane * 8 + i] = values[q][i];
    }
  }
};

}  // namespace kvrt
