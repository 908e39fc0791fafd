// Small operations on vectors in shared memory, by a block or by a warp.
#pragma once

#include "cache.cuh"

namespace kvrt {

// Who works together, and how they wait for each other.
struct BlockTeam {
  __device__ __forceinline__ int rank() const { return threadIdx.x; }
  __device__ __forceinline__ int size() const { return blockDim.x; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
};
struct WarpTeam {
  __device__ __forceinline__ int rank() const { return threadIdx.x % WARP; }
  __device__ __forceinline__ int size() const { return WARP; }
  __device__ __forceinline__ void sync() const { __syncwarp(); }
};

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = WARP / 2; step; step /= 2) x += __shfl_xor_sync(FULL_MASK, x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = WARP / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, step));
  return x;
}

// Orthonormal Hadamard transform of `rows` rows of head_dim floats, pitch floats apart: kvcli.quant.transforms.hadamard
// to the last bit. Begins with a barrier; element i was last written by the thread of rank i % size if rows have no
// gaps.
template <class Team>
__device__ void hadamard_rows(Team team, float* x, int rows, int head_dim, int pitch) {
  const int block = head_dim & -head_dim, half = head_dim / 2;
  for (int stride = 1; stride < block; stride *= 2) {
    team.sync();
    for (int i = team.rank(); i < rows * half; i += team.size()) {
      const int row = i / half, pair = i % half;
      float* low = x + row * pitch + pair / stride * 2 * stride + pair % stride;
      const float a = low[0], b = low[stride];
      low[0] = __fadd_rn(a, b);
      low[stride] = __fsub_rn(a, b);
    }
  }
  // block^-0.5: a power of two, times the float next to sqrt(1/2) if block is an odd power; either product is exact
  float factor = 1.0f;
  for (int size = block; size > 1; size /= 4) factor *= size == 2 ? 0.70710678118654752f : 0.5f;
  team.sync();
  for (int i = team.rank(); i < rows * head_dim; i += team.size()) {
    float* at = x + i / head_dim * pitch + i % head_dim;
    *at = __fmul_rn(*at, factor);
  }
}

// kvcli.models.architectures.Rope on one channel: `own` is its value, `other` that of its partner half a head away.
__device__ __forceinline__ float rotated(float own, float other, float cosine, float sine, bool second) {
  const float a = __fmul_rn(own, cosine), b = __fmul_rn(other, sine);
  return second ? __fadd_rn(a, b) : __fsub_rn(a, b);
}
__device__ __forceinline__ float unrotated(float own, float other, float cosine, float sine, bool second) {
  const float a = __fmul_rn(own, cosine), b = __fmul_rn(other, sine);
  const float norm = __fadd_rn(__fmul_rn(cosine, cosine), __fmul_rn(sine, sine));
  return __fdiv_rn(second ? __fsub_rn(a, b) : __fadd_rn(a, b), norm);
}

// One channel of a mean at a position.
__device__ __forceinline__ float mean_at(const kv_layer& layer, const float* mean, int64_t position, int channel) {
  const int half = layer.head_dim / 2;
  const bool second = channel >= half;
  const int pair = second ? channel - half : channel;
  const float* row = layer.rope + position * layer.head_dim;
  return rotated(mean[channel], mean[second ? pair : pair + half], row[pair], row[pair + half], second);
}

enum KeyForm { KEYS_STORED, KEYS_BEFORE_ROPE, KEYS_AFTER_ROPE };

// Turn decoded rows, token i of which is slot first + i, into keys of the form wanted, or into values. For all rows at
// once: Hadamard, mean, RoPE. Rows are head_dim floats, pitch apart. Begins with a barrier, and ends with one for keys;
// element i of values was last written by the thread of rank i % size if rows have no gaps.
template <class Team>
__device__ void finish_rows(Team team, const HeadView& view, bool keys, KeyForm form, int64_t first, int rows, float* x,
                            int pitch) {
  const kv_layer& layer = view.layer;
  const kv_format& format = keys ? layer.k : layer.v;
  const int dim = layer.head_dim, half = dim / 2;
  const float* mean = keys ? layer.k_mean : layer.v_weight ? nullptr : layer.v_mean;  // else predictions hold it
  mean = mean && !kv_is_exact(&format) ? mean + view.head * dim : nullptr;
  if (format.hadamard) hadamard_rows(team, x, rows, dim, pitch);
  team.sync();
  if (!keys) {
    if (mean)
      for (int i = team.rank(); i < rows * dim; i += team.size()) {
        float* at = x + i / dim * pitch + i % dim;
        *at = __fadd_rn(*at, mean[i % dim]);
      }
    return;
  }
  // exact keys are stored after RoPE whatever the plan says
  const bool stored_before = layer.rope_before && !kv_is_exact(&format);
  for (int i = team.rank(); i < rows * half; i += team.size()) {
    const int row = i / half, pair = i % half;
    float* at = x + row * pitch + pair;
    float a = at[0], b = at[half];
    const bool turns = form == (stored_before ? KEYS_AFTER_ROPE : KEYS_BEFORE_ROPE);
    const float* table = turns || mean ? layer.rope + view.position(first + row) * dim : nullptr;
    const float cosine = table ? table[pair] : 1, sine = table ? table[pair + half] : 0;
    if (mean && (stored_before || form == KEYS_BEFORE_ROPE)) {
      // the mean is one of keys before RoPE: add it there
      if (!stored_before) {
        const float a0 = unrotated(a, b, cosine, sine, false), b0 = unrotated(b, a, cosine, sine, true);
        a = a0, b = b0;
      }
      a = __fadd_rn(a, mean[pair]), b = __fadd_rn(b, mean[pair + half]);
      if (stored_before && turns) {
        const float a1 = rotated(a, b, cosine, sine, false), b1 = rotated(b, a, cosine, sine, true);
        a = a1, b = b1;
      }
    } else if (mean) {
      a = __fadd_rn(a, rotated(mean[pair], mean[pair + half], cosine, sine, false));
      b = __fadd_rn(b, rotated(mean[pair + half], mean[pair], cosine, sine, true));
    } else if (turns) {
      const float a1 = stored_before ? rotated(a, b, cosine, sine, false) : unrotated(a, b, cosine, sine, false);
      const float b1 = stored_before ? rotated(b, a, cosine, sine, true) : unrotated(b, a, cosine, sine, true);
      a = a1, b = b1;
    }
    at[0] = a, at[half] = b;
  }
  team.sync();
}

// Decode tokens first ... first + count - 1 (of one page) of the keys or the values into rows[count][head_dim]: values
// without what is predicted of them. Ends as finish_rows does.
template <class Team>
__device__ void decode_rows(Team team, const HeadView& view, bool keys, KeyForm form, int64_t first, int count,
                            float* rows) {
  const kv_layer& layer = view.layer;
  const kv_page_layout at = kv_layout_of(&layer);
  const kv_format& format = keys ? layer.k : layer.v;
  const int dim = layer.head_dim, page = view.page(first / layer.block_size);
  const int in_page = static_cast<int>(first % layer.block_size);
  const uint8_t* slice = view.slice(page < 0 ? 0 : page, at.head_bytes);
  const Sections sections = {slice + (keys ? at.k_codes : at.v_codes), slice + (keys ? at.k_scales : at.v_scales),
                             slice + (keys ? at.k_zeros : at.v_zeros), static_cast<int>(kv_row_bytes(&format, dim))};
  for (int i = team.rank(); i < count * (dim / 8); i += team.size()) {
    float x[8] = {};
    if (page >= 0) decode_eight(format, layer.page_dtype, dim, sections, in_page + i / (dim / 8), i % (dim / 8), x);
    for (int j = 0; j < 8; j++) rows[i * 8 + j] = x[j];
  }
  finish_rows(team, view, keys, form, first, count, rows, dim);
}

}  // namespace kvrt
