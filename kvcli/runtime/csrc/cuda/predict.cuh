// Values that are predicted from their own layer's keys (kv_layer.v_weight): AQUA-KV's linear map, Shutova et al., 2025,
// arXiv:2501.19392. What tokens are packed and expanded with is here; attention adds the map once, in combine.cu.
#pragma once

#include "vector.cuh"

namespace kvrt {

// Predictions of channels `channel` ... `channel` + width - 1 of the head's values, for tokens first ... first + count - 1,
// whose keys are packed in one page: out[count][width]. Summed in double and rounded once, as the reference does; a product
// of two floats is exact in double, so that the sum is the CPU's to the last bit. By the whole block, with TILE * head_dim
// floats of scratch. Begins and ends with a barrier.
static __device__ __noinline__ void predict_values(const HeadView& view, int64_t first, int count, int channel, int width,
                                                   float* keys, float* out) {
  const kv_layer& layer = view.layer;
  const int dim = layer.head_dim, all = layer.num_kv_heads * dim, threads = static_cast<int>(blockDim.x);
  for (int tile = 0; tile < count; tile += TILE)
    for (int begin = 0; begin < width; begin += threads) {  // a thread has a channel of every teams-th token
      const int rows = count - tile < TILE ? count - tile : TILE;
      const int columns = width - begin < threads ? width - begin : threads, teams = threads / columns;
      const int team = threadIdx.x / columns, column = begin + threadIdx.x % columns;
      const int output = view.head * dim + channel + column;
      const bool active = team < teams;
      double sums[TILE];
#pragma unroll
      for (int i = 0; i < TILE; i++) sums[i] = layer.v_mean ? layer.v_mean[output] : 0.0;
      for (int head = 0; head < layer.num_kv_heads; head++) {
        __syncthreads();  // all have read the keys before
        decode_rows(BlockTeam(), HeadView{layer, view.cache, view.sequence, head}, true, KEYS_BEFORE_ROPE, first + tile,
                    rows, keys);
        for (int c = 0; active && c < dim; c++) {
          const double weight = layer.v_weight[static_cast<int64_t>(head * dim + c) * all + output];
#pragma unroll
          for (int i = 0; i < TILE; i++) {
            const int token = team + i * teams;
            if (token >= rows) break;
            sums[i] += static_cast<double>(keys[token * dim + c]) * weight;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < TILE; i++) {
        const int token = team + i * teams;
        if (!active || token >= rows) break;
        out[(tile + token) * width + column] = static_cast<float>(sums[i]);
      }
    }
  __syncthreads();
}

}  // namespace kvrt
