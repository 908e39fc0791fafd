// Decode pages into dense keys and values, and the sums of keys by weight: for eviction, and for values told by keys.
#include "combine.h"
#include "partial.cuh"
#include "predict.cuh"

namespace kvrt {

namespace {

constexpr int THREADS = 128;
constexpr int HEADS = 8;  // query heads whose key sums a block keeps

// Grid: (tiles of tokens, kv heads, keys and values).
template <bool PREDICTS>
__global__ void __launch_bounds__(THREADS)
expand_kernel(const __grid_constant__ kv_layer layer, const __grid_constant__ kvrt_expand_args args) {
  KVRT_DYNAMIC_SHARED(shared);
  float* rows = reinterpret_cast<float*>(shared);
  const bool keys = blockIdx.z == 0;
  void* out = keys ? args.k : args.v;
  if (!out) return;
  const HeadView view = {layer, args.cache, args.sequence, static_cast<int>(blockIdx.y)};
  const int dim = layer.head_dim;
  const int64_t tile = (args.first / TILE + blockIdx.x) * TILE, end = args.first + args.count;
  const int64_t first = tile > args.first ? tile : args.first, last = tile + TILE < end ? tile + TILE : end;
  const int count = static_cast<int>(last - first);
  if (count <= 0) return;
  decode_rows(BlockTeam(), view, keys, args.keys_before_rope ? KEYS_BEFORE_ROPE : KEYS_AFTER_ROPE, first, count, rows);
  float* predicted = rows + TILE * dim;
  const bool predicts = PREDICTS && !keys;
  if (predicts) predict_values(view, first, count, 0, dim, predicted + TILE * dim, predicted);
  for (int i = threadIdx.x; i < count * dim; i += THREADS) {
    const int64_t token = first + i / dim;
    const bool sink = args.with_sinks && token < layer.sink_tokens;
    const int64_t exact = view.sink_row(keys ? 0 : 1, token) + i % dim;
    const float packed = predicts ? __fadd_rn(rows[i], predicted[i]) : rows[i];
    const float x = sink ? load_value(args.cache.sinks, exact, layer.exact_dtype) : packed;
    store_value(out, view.head * (keys ? args.k_head_stride : args.v_head_stride) +
                         (token - args.first) * (keys ? args.k_row_stride : args.v_row_stride) + i % dim,
                args.dtype, x);
  }
}

// Turn the raw scores that attend left into weights, and into zeros where nothing was seen.
// Grid: (slots, query heads, sequences).
__global__ void __launch_bounds__(THREADS)
mass_kernel(const __grid_constant__ kv_layer layer, const __grid_constant__ kvrt_attend_args args) {
  const int head = blockIdx.y, sequence = blockIdx.z;
  const HeadView view = {layer, args.cache, sequence, head / (layer.num_heads / layer.num_kv_heads)};
  const Visible visible(view, args.query_positions);
  const int64_t row = static_cast<int64_t>(sequence) * layer.num_heads + head;
  const float lse = partial_of(layer, args, sequence, head, args.splits)[0];  // left there by combine.cu
  const int64_t step = static_cast<int64_t>(gridDim.x) * THREADS;
  // of weights that only sums of keys need, no more are made than these look at
  const bool own = layer.v_weight && args.mass == own_mass(layer, args);
  const int64_t end = own && visible.n < args.mass_stride ? visible.n : args.mass_stride;
  for (int64_t slot = blockIdx.x * THREADS + threadIdx.x; slot < end; slot += step) {
    const bool packed = slot >= layer.sink_tokens && slot < visible.boundary;
    const bool seen = visible.shows(view, slot) && args.parts & (packed ? KVRT_PACKED : KVRT_EXACT) &&
                      (!packed || view.page(slot / layer.block_size) >= 0);
    float& mass = args.mass[row * args.mass_stride + slot];
    mass = seen ? exp_of(mass - lse) : 0.0f;
  }
}

// Sums over a split's packed tokens of weight times key before RoPE: [sequences][query heads][splits][kv heads][head_dim].
// Grid: (splits of the keys of each kv head, groups of query heads, sequences). An element has one thread.
__global__ void __launch_bounds__(THREADS)
key_sum_kernel(const __grid_constant__ kv_layer layer, const __grid_constant__ kvrt_attend_args args, float* out) {
  KVRT_DYNAMIC_SHARED(shared);
  float* rows = reinterpret_cast<float*>(shared);
  float *sums = rows + TILE * layer.head_dim, *running = sums + HEADS * layer.head_dim;
  const int dim = layer.head_dim, sequence = blockIdx.z, split = static_cast<int>(blockIdx.x) / layer.num_kv_heads;
  const HeadView view = {layer, args.cache, sequence, static_cast<int>(blockIdx.x) % layer.num_kv_heads};
  const int first_head = blockIdx.y * HEADS;
  const int heads = layer.num_heads - first_head < HEADS ? layer.num_heads - first_head : HEADS;
  // weights are zero where a head sees nothing, and then its own visibility is not asked here
  const Visible visible(view, args.query_positions);
  const float* mass = args.mass + (static_cast<int64_t>(sequence) * layer.num_heads + first_head) * args.mass_stride;
  for (int i = threadIdx.x; i < heads * dim; i += THREADS) running[i] = 0;
  const PageRange range = pages_of_split(view, visible, args, split);
  const int64_t low = visible.first_packed(view), block = layer.block_size;
  for (int64_t page = range.last - 1; page >= range.first;) {  // chunk by chunk from the last, as values are summed
    const int64_t chunk = range.base + (page - range.base) / range.chunk * range.chunk;
    const int64_t begin = chunk > range.first ? chunk : range.first;
    const int64_t end = (page + 1) * block < visible.boundary ? (page + 1) * block : visible.boundary;
    for (int i = threadIdx.x; i < heads * dim; i += THREADS) sums[i] = 0;
    for (int64_t tile = begin * block; tile < end; tile += TILE) {
      const int64_t first = tile > low ? tile : low, last = tile + TILE < end ? tile + TILE : end;
      if (first >= last || view.page(tile / block) < 0) continue;
      decode_rows(BlockTeam(), view, true, KEYS_BEFORE_ROPE, first, static_cast<int>(last - first), rows);
      for (int i = threadIdx.x; i < heads * dim; i += THREADS) {
        float sum = sums[i];
        for (int64_t token = first; token < last && token < args.mass_stride; token++)
          sum += mass[i / dim * args.mass_stride + token] * rows[(token - first) * dim + i % dim];
        sums[i] = sum;
      }
      __syncthreads();  // the next tile takes the rows' place
    }
    for (int i = threadIdx.x; i < heads * dim; i += THREADS) running[i] = __fadd_rn(sums[i], running[i]);
    page = begin - 1;
  }
  for (int i = threadIdx.x; i < heads * dim; i += THREADS) {
    const int64_t head = static_cast<int64_t>(sequence) * layer.num_heads + first_head + i / dim;
    out[((head * args.splits + split) * layer.num_kv_heads + view.head) * dim + i % dim] = running[i];
  }
}

}  // namespace

cudaError_t launch_expand(const kv_layer& layer, const kvrt_expand_args& args, cudaStream_t stream) {
  const int64_t tiles = args.count > 0 ? (args.first + args.count + TILE - 1) / TILE - args.first / TILE : 0;
  if (!tiles) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(layer.num_kv_heads), 2);
  const size_t shared = sizeof(float) * TILE * static_cast<size_t>(layer.v_weight ? 3 * layer.head_dim : layer.head_dim);
  const auto kernel = layer.v_weight ? expand_kernel<true> : expand_kernel<false>;
  return KVRT_LAUNCH(kernel, grid, dim3(THREADS), shared, stream, layer, args);
}

cudaError_t launch_mass(const kv_layer& layer, const kvrt_attend_args& args, cudaStream_t stream) {
  const int64_t blocks = (args.mass_stride + THREADS - 1) / THREADS;
  const dim3 slots(static_cast<unsigned>(blocks < 64 ? blocks : 64), static_cast<unsigned>(layer.num_heads),
                   static_cast<unsigned>(args.cache.num_seqs));
  const size_t none = 0;
  const cudaError_t status = KVRT_LAUNCH(mass_kernel, slots, dim3(THREADS), none, stream, layer, args);
  if (status != cudaSuccess || !(args.key_sum || layer.v_weight)) return status;
  kvrt_attend_args summed = args;  // the workspace has room for splits' sums only where values are predicted
  if (!layer.v_weight) summed.splits = 1, summed.split_pages = 0;
  const dim3 grid(static_cast<unsigned>(layer.num_kv_heads * summed.splits),
                  static_cast<unsigned>((layer.num_heads + HEADS - 1) / HEADS),
                  static_cast<unsigned>(args.cache.num_seqs));
  const size_t shared = sizeof(float) * (TILE + 2 * HEADS) * static_cast<size_t>(layer.head_dim);
  float* out = layer.v_weight ? key_sums(layer, args) : args.key_sum;
  return KVRT_LAUNCH(key_sum_kernel, grid, dim3(THREADS), shared, stream, layer, summed, out);
}

}  // namespace kvrt
