// A warp's attention over tiles of sixteen tokens on the tensor cores, for up to eight queries of a kv head.
//
// With g = lane / 4 and t = lane % 4 (ptx.cuh has the fragments):
//
//   scores   Q (16 x 16 channels) times K^T (16 channels x 8 tokens). Rows 0 ... 7 of Q are the queries in half, rows
//            8 ... 15 what the halves leave out, so that a score, the sum of both rows, has the query in full precision
//            and the rows of a group of eight cost nothing. A dot product does not care for the order of the channels:
//            each lane takes whole chunks of codes of token g, and Q's columns are permuted to match.
//   values   V^T (16 channels x 16 tokens) times P^T (16 tokens x 8 queries). P^T's fragment is what the lane's scores
//            of its query g already are: nothing moves between lanes.
#pragma once

#include "attend.cuh"
#include "pairs.cuh"

namespace kvrt {

constexpr int TENSOR_GROUP = 8;  // queries of a block

struct TensorShared {
  const uint4* query;      // [DIM / 16][lanes]: fragments of Q
  const uint4* steps;      // [head_dim / 16][2][lanes]: of the steps of each half of the tokens, {high, high, low, low}
  const float* mean;       // [8][head_dim]: a, then b
  const float* query_sum;  // [8]: over the channels, for zero points of whole tokens
  const Half2Bits *k_table, *v_table;
};

__host__ __device__ __forceinline__ bool folds(const kv_format& format, int head_dim) {
  return !kv_is_exact(&format) && format.axis == KV_TOKEN && format.group == head_dim;
}

// Which channel, or one past the last, the lane's half `which` of pair k of chunks `part` holds in Q and K.
__host__ __device__ __forceinline__ int key_chunk(int part, int t, int which) { return part * 8 + 2 * t + which; }

// Q's fragments, by the whole block: kvrt::TensorShared::query.
template <int DIM>
__device__ void fill_query_fragments(const float* query, int head_dim, uint4* out) {
  for (int i = threadIdx.x; i < DIM / 16 * WARP; i += blockDim.x) {
    const int slice = i / WARP, lane = i % WARP, part = slice / 4, g = lane / 4, t = lane % 4;
    float x[4];
    for (int j = 0; j < 4; j++) {  // pairs 2 * (slice % 4) and the next, two chunks each
      const int channel = key_chunk(part, t, j % 2) * 8 + slice % 4 * 2 + j / 2;
      x[j] = channel < head_dim ? query[g * head_dim + channel] : 0.0f;
    }
    out[i] = {pair_bits(x[0], x[1]), pair_bits(rest_of(x[0]), rest_of(x[1])), pair_bits(x[2], x[3]),
              pair_bits(rest_of(x[2]), rest_of(x[3]))};
  }
}

// The step table's fragments, by the whole block: kvrt::TensorShared::steps, from [16][head_dim] floats of the layer.
__device__ __forceinline__ void fill_step_fragments(const kv_layer& layer, uint4* out) {
  const int dim = layer.head_dim;
  const float stretch = layer.rope[0];  // the table's cosines are stretched by it: cos 0
  for (int i = threadIdx.x; i < dim / 16 * 2 * WARP; i += blockDim.x) {
    const int slice = i / (2 * WARP), token = i / WARP % 2 * 8 + i % WARP / 4, t = i % 4;
    float x[4];
    for (int j = 0; j < 4; j++) x[j] = layer.rope[token * dim + slice * 16 + 2 * t + j % 2 + j / 2 * 8] / stretch;
    out[i] = {pair_bits(x[0], x[1]), pair_bits(x[2], x[3]), pair_bits(rest_of(x[0]), rest_of(x[1])),
              pair_bits(rest_of(x[2]), rest_of(x[3]))};
  }
}

// DIM is head_dim rounded up to 64, 128 or 256.
template <int DIM>
struct TensorEngine {
  const Task& task;
  const TensorShared& shared;
  float maximum, sum, zero_sum;  // of query g, the sums over this lane's tokens
  float values[DIM / 16][4];     // [2 channels][queries 2t, 2t + 1]

  __device__ __forceinline__ TensorEngine(const Task& t, const TensorShared& s) : task(t), shared(s) {}

  __device__ __forceinline__ void begin() {
    maximum = -INFINITY, sum = 0, zero_sum = 0;
#pragma unroll
    for (int i = 0; i < DIM / 16; i++)
      for (int j = 0; j < 4; j++) values[i][j] = 0;
  }

  // score[half * 2 + i] is that of query g and token half * 8 + 2t + i.
  __device__ __forceinline__ void multiply_keys(const uint8_t* stage, int valid, float (&score)[4]) {
    const kv_layer& layer = task.params.layer;
    const int dim = layer.head_dim, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const Sections keys = sections_of(task.params.plan.k, stage);
    const bool folded = folds(layer.k, dim);
    float products[2][4] = {};
#pragma unroll 1
    for (int part = 0; part * 64 < dim; part++) {
      int chunk[2];
      for (int i = 0; i < 2; i++) {  // chunks past the head meet zeros in Q; any codes will do
        chunk[i] = key_chunk(part, t, i);
        if (chunk[i] >= dim / 8) chunk[i] = dim / 8 - 1;
      }
      uint32_t pairs[2][8];
#pragma unroll
      for (int half = 0; half < 2; half++)
        decode_pairs(layer.k, layer.page_dtype, dim, keys, {{half * 8 + g, half * 8 + g}, {chunk[0], chunk[1]}}, folded,
                     shared.k_table, valid, pairs[half]);
#pragma unroll
      for (int slice = 0; slice < 4; slice++) {
        const uint4 q = shared.query[(part * 4 + slice) * WARP + lane];
        const uint32_t a[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const uint32_t b[2] = {pairs[half][2 * slice], pairs[half][2 * slice + 1]};
          ptx::mma_m16n8k16<__half>(products[half], a, b);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      score[i] = products[i / 2][i % 2] + products[i / 2][i % 2 + 2];
      if (folded) {
        const int token = i / 2 * 8 + 2 * t + i % 2;
        score[i] *= load_scale(keys.scales, token, layer.k.scale_dtype);
        if (!layer.k.symmetric)
          score[i] += half_bits_to_float(reinterpret_cast<const uint16_t*>(keys.zeros)[token]) * shared.query_sum[g];
      }
    }
  }

  // The keys' mean: (a, b) turned to the tile's first position, times the steps from there, both in two terms.
  __device__ __forceinline__ void add_mean(const uint8_t* stage, float (&score)[4]) {
    const int dim = task.params.layer.head_dim, half = dim / 2, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const float* base = reinterpret_cast<const float*>(stage + task.params.plan.rope_at);
    const float* factors = shared.mean + g * dim;
    float products[2][4] = {};
#pragma unroll 1
    for (int slice = 0; slice < dim / 16; slice++) {
      float x[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int at = slice * 16 + 2 * t + j % 2 + j / 2 * 8;
        const bool second = at >= half;
        const int pair = second ? at - half : at;
        const float a = factors[pair], b = factors[pair + half], cosine = base[pair], sine = base[pair + half];
        x[j] = second ? cosine * b - sine * a : cosine * a + sine * b;
      }
      const uint32_t a[4] = {pair_bits(x[0], x[1]), pair_bits(rest_of(x[0]), rest_of(x[1])), pair_bits(x[2], x[3]),
                             pair_bits(rest_of(x[2]), rest_of(x[3]))};
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint4 steps = shared.steps[(slice * 2 + i) * WARP + lane];
        const uint32_t high[2] = {steps.x, steps.y}, low[2] = {steps.z, steps.w};
        ptx::mma_m16n8k16<__half>(products[i], a, high);
        ptx::mma_m16n8k16<__half>(products[i], a, low);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) score[i] += products[i / 2][i % 2] + products[i / 2][i % 2 + 2];
  }

  // Sixteen packed tokens from `first` on; those of low ... high - 1 count.
  __device__ __forceinline__ void tile(const uint8_t* stage, int64_t first, int64_t low, int64_t high) {
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int valid = high - first < TILE ? static_cast<int>(high - first) : TILE;
    const int begin = low > first ? static_cast<int>(low - first) : 0;
    float score[4];
    multiply_keys(stage, valid, score);
    if (task.params.mean) add_mean(stage, score);
    float highest = maximum;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int token = i / 2 * 8 + 2 * t + i % 2;
      const bool shown = token >= begin && token < valid;
      score[i] = shown ? task.capped(score[i]) : -INFINITY;
      if (shown) task.keep_score(g, first + token, score[i]);
      highest = fmaxf(highest, score[i]);
    }
    for (int step = 1; step < 4; step *= 2) highest = fmaxf(highest, __shfl_xor_sync(FULL_MASK, highest, step));
    // a tile shows at least one token, so that highest is a number unless scores are none
    const float shrink = exp_of(maximum - highest);
    if (__any_sync(FULL_MASK, highest != maximum)) {
      const float own[2] = {__shfl_sync(FULL_MASK, shrink, 8 * t), __shfl_sync(FULL_MASK, shrink, 8 * t + 4)};
#pragma unroll
      for (int i = 0; i < DIM / 16; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) values[i][j] *= own[j % 2];
    }
    maximum = highest;
    sum *= shrink, zero_sum *= shrink;
    add_values(stage, valid, score);
  }

  // values += weights times the tile's values; score becomes weights on the way.
  __device__ __forceinline__ void add_values(const uint8_t* stage, int valid, float (&score)[4]) {
    const kv_layer& layer = task.params.layer;
    const int dim = layer.head_dim, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const Sections stored = sections_of(task.params.plan.v, stage);
    const bool folded = folds(layer.v, dim);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int token = i / 2 * 8 + 2 * t + i % 2;
      score[i] = exp_of(score[i] - maximum);
      sum += score[i];
      if (!folded) continue;
      const bool written = token < valid;  // else the scale may be no number
      if (written && !layer.v.symmetric)
        zero_sum += score[i] * half_bits_to_float(reinterpret_cast<const uint16_t*>(stored.zeros)[token]);
      score[i] = written ? score[i] * load_scale(stored.scales, token, layer.v.scale_dtype) : 0.0f;
    }
    const uint32_t weights[2] = {pair_bits(score[0], score[1]), pair_bits(score[2], score[3])};
#pragma unroll
    for (int part = 0; part < DIM / 64; part++) {
      if (part * 64 >= dim) break;
      const int chunk = part * 8 + g < dim / 8 ? part * 8 + g : dim / 8 - 1;  // past the head: never written
      uint32_t pairs[2][8];
#pragma unroll
      for (int half = 0; half < 2; half++)
        decode_pairs(layer.v, layer.page_dtype, dim, stored, {{half * 8 + 2 * t, half * 8 + 2 * t + 1}, {chunk, chunk}},
                     folded, shared.v_table, valid, pairs[half]);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const uint32_t a[4] = {pairs[0][2 * k], pairs[0][2 * k + 1], pairs[1][2 * k], pairs[1][2 * k + 1]};
        ptx::mma_m16n8k16<__half>(values[part * 4 + k], a, weights);
      }
    }
  }

  // Leave this warp's sums at partial [8][head_dim + 2].
  __device__ __forceinline__ void finish(float* partial) {
    const int dim = task.params.layer.head_dim, floats = partial_floats(dim), lane = threadIdx.x % WARP;
    const int g = lane / 4, t = lane % 4;
    for (int step = 1; step < 4; step *= 2) {
      sum += __shfl_xor_sync(FULL_MASK, sum, step);
      zero_sum += __shfl_xor_sync(FULL_MASK, zero_sum, step);
    }
    if (t == 0) partial[g * floats] = maximum, partial[g * floats + 1] = sum;
    const float zero[2] = {__shfl_sync(FULL_MASK, zero_sum, 8 * t), __shfl_sync(FULL_MASK, zero_sum, 8 * t + 4)};
#pragma unroll
    for (int i = 0; i < DIM / 16; i++) {
      const int channel = (i / 4 * 8 + g) * 8 + i % 4 * 2;
      if (channel >= dim) continue;
#pragma unroll
      for (int j = 0; j < 4; j++) partial[(2 * t + j % 2) * floats + 2 + channel + j / 2] = values[i][j] + zero[j % 2];
    }
  }
};

}  // namespace kvrt
