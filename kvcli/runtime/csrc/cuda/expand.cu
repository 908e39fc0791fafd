// Decode pages into dense keys and values, and the sums of keys by weight that eviction asks for.
#include "combine.h"
#include "partial.cuh"
#include "vector.cuh"

namespace kvrt {

namespace {

constexpr int THREADS = 128;
constexpr int HEADS = 8;  // query heads whose key sums a block keeps

// Decode tokens first ... first + count - 1 (of one page) of the keys or the values into rows[count][head_dim].
__device__ void decode_rows(const HeadView& view, bool keys, KeyForm form, int64_t first, int count, float* rows) {
  const kv_layer& layer = view.layer;
  const kv_page_layout at = kv_layout_of(&layer);
  const kv_format& format = keys ? layer.k : layer.v;
  const int dim = layer.head_dim, page = view.page(first / layer.block_size);
  const int in_page = static_cast<int>(first % layer.block_size);
  const uint8_t* slice = view.slice(page < 0 ? 0 : page, at.head_bytes);
  const Sections sections = {slice + (keys ? at.k_codes : at.v_codes), slice + (keys ? at.k_scales : at.v_scales),
                             slice + (keys ? at.k_zeros : at.v_zeros), static_cast<int>(kv_row_bytes(&format, dim))};
  for (int i = threadIdx.x; i < count * (dim / 8); i += THREADS) {
    float x[8] = {};
    if (page >= 0) decode_eight(format, layer.page_dtype, dim, sections, in_page + i / (dim / 8), i % (dim / 8), x);
    for (int j = 0; j < 8; j++) rows[i * 8 + j] = x[j];
  }
  finish_rows(BlockTeam(), view, keys, form, first, count, rows, dim);
}

// Grid: (tiles of tokens, kv heads, keys and values).
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
  decode_rows(view, keys, args.keys_before_rope ? KEYS_BEFORE_ROPE : KEYS_AFTER_ROPE, first, count, rows);
  for (int i = threadIdx.x; i < count * dim; i += THREADS) {
    const int64_t token = first + i / dim;
    const bool sink = args.with_sinks && token < layer.sink_tokens;
    const int64_t exact = view.sink_row(keys ? 0 : 1, token) + i % dim;
    const float x = sink ? load_value(args.cache.sinks, exact, layer.exact_dtype) : rows[i];
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
  for (int64_t slot = blockIdx.x * THREADS + threadIdx.x; slot < args.mass_stride; slot += step) {
    const bool packed = slot >= layer.sink_tokens && slot < visible.boundary;
    const bool seen = visible.shows(view, slot) && args.parts & (packed ? KVRT_PACKED : KVRT_EXACT) &&
                      (!packed || view.page(slot / layer.block_size) >= 0);
    float& mass = args.mass[row * args.mass_stride + slot];
    mass = seen ? exp_of(mass - lse) : 0.0f;
  }
}

// Sum over packed tokens of weight times key before RoPE. Grid: (kv heads, groups of query heads, sequences).
__global__ void __launch_bounds__(THREADS)
key_sum_kernel(const __grid_constant__ kv_layer layer, const __grid_constant__ kvrt_attend_args args) {
  KVRT_DYNAMIC_SHARED(shared);
  float* rows = reinterpret_cast<float*>(shared);
  float* sums = rows + TILE * layer.head_dim;
  const int dim = layer.head_dim, sequence = blockIdx.z;
  const HeadView view = {layer, args.cache, sequence, static_cast<int>(blockIdx.x)};
  const int first_head = blockIdx.y * HEADS;
  const int heads = layer.num_heads - first_head < HEADS ? layer.num_heads - first_head : HEADS;
  // weights are zero where a head sees nothing, and then its own visibility is not asked here
  const Visible visible(view, args.query_positions);
  const float* mass = args.mass + (static_cast<int64_t>(sequence) * layer.num_heads + first_head) * args.mass_stride;
  for (int i = threadIdx.x; i < heads * dim; i += THREADS) sums[i] = 0;
  const int64_t low = visible.first_packed(view);
  for (int64_t tile = low / TILE * TILE; tile < visible.boundary; tile += TILE) {
    if (view.page(tile / layer.block_size) < 0) continue;
    const int64_t first = tile > low ? tile : low;
    const int64_t last = tile + TILE < visible.boundary ? tile + TILE : visible.boundary;
    decode_rows(view, true, KEYS_BEFORE_ROPE, first, static_cast<int>(last - first), rows);
    for (int i = threadIdx.x; i < heads * dim; i += THREADS)
      for (int64_t token = first; token < last && token < args.mass_stride; token++)
        sums[i] += mass[i / dim * args.mass_stride + token] * rows[(token - first) * dim + i % dim];
    __syncthreads();  // the next tile takes the rows' place
  }
  for (int i = threadIdx.x; i < heads * dim; i += THREADS) {
    const int64_t head = static_cast<int64_t>(sequence) * layer.num_heads + first_head + i / dim;
    args.key_sum[(head * layer.num_kv_heads + view.head) * dim + i % dim] = sums[i];
  }
}

}  // namespace

cudaError_t launch_expand(const kv_layer& layer, const kvrt_expand_args& args, cudaStream_t stream) {
  const int64_t tiles = args.count > 0 ? (args.first + args.count + TILE - 1) / TILE - args.first / TILE : 0;
  if (!tiles) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(layer.num_kv_heads), 2);
  const size_t shared = sizeof(float) * TILE * static_cast<size_t>(layer.head_dim);
  return KVRT_LAUNCH(expand_kernel, grid, dim3(THREADS), shared, stream, layer, args);
}

cudaError_t launch_mass(const kv_layer& layer, const kvrt_attend_args& args, cudaStream_t stream) {
  const int64_t blocks = (args.mass_stride + THREADS - 1) / THREADS;
  const dim3 slots(static_cast<unsigned>(blocks < 64 ? blocks : 64), static_cast<unsigned>(layer.num_heads),
                   static_cast<unsigned>(args.cache.num_seqs));
  const size_t none = 0;
  const cudaError_t status = KVRT_LAUNCH(mass_kernel, slots, dim3(THREADS), none, stream, layer, args);
  if (status != cudaSuccess || !args.key_sum) return status;
  const dim3 grid(static_cast<unsigned>(layer.num_kv_heads),
                  static_cast<unsigned>((layer.num_heads + HEADS - 1) / HEADS),
                  static_cast<unsigned>(args.cache.num_seqs));
  const size_t shared = sizeof(float) * (TILE + HEADS) * static_cast<size_t>(layer.head_dim);
  return KVRT_LAUNCH(key_sum_kernel, grid, dim3(THREADS), shared, stream, layer, args);
}

}  // namespace kvrt
