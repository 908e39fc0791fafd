// Append new tokens: quantise what leaves the exact window into pages, keep the rest in the tail ring, fill the sinks.
//
// A token leaves from the ring (it was appended before this step) or straight from the new rows. New tokens take ring
// entries that leaving tokens still hold, so reading and writing are ordered: within one block where the step is small
// (decode), by two launches on the stream where it is large (prefill), so that many blocks may pack at once. Values that
// are predicted from keys wait, in a launch of their own, for the keys of all heads to be packed.
#include "launches.h"
#include "predict.cuh"

namespace kvrt {

namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int SLICE = 32;        // channels of a channel-axis page that are worked on at a time
constexpr int MAX_GROUP = 256;   // values that share a scale: a whole head at most, or a whole page

// The tokens one block packs at once: a group of the channel axis is whole, tokens of the token axis are independent.
__host__ __device__ int unit_tokens(const kv_format& format) {
  return !kv_is_exact(&format) && format.axis == KV_CHANNEL && format.group > TILE ? format.group : TILE;
}
__host__ __device__ int unit_width(const kv_format& format, int head_dim) {
  return !kv_is_exact(&format) && format.axis == KV_CHANNEL && head_dim > SLICE ? SLICE : head_dim;
}

struct Source {
  const kvrt_append_args& args;
  const HeadView& view;
  int which;
  int64_t length, n, first_row;
  const float* given;  // the caller's predictions, from the boundary on, in the mean's place; or null

  __device__ Source(const kvrt_append_args& a, const HeadView& v, int w) : args(a), view(v), which(w) {
    length = v.length();
    first_row = a.starts ? a.starts[v.sequence] : v.sequence;
    n = length + (a.starts ? a.starts[v.sequence + 1] - first_row : 1);
    given = which ? a.v_predicted : a.k_predicted;
  }
  // One value of the ring or of the new rows, rounded to the exact dtype.
  __device__ float value(int64_t token, int channel) const {
    const kv_layer& layer = view.layer;
    if (token < length) return load_value(args.cache.tail, view.tail_row(which, token) + channel, layer.exact_dtype);
    const int64_t row = first_row + token - length;
    const int64_t index = which ? row * args.v_row_stride + view.head * args.v_head_stride
                                : row * args.k_row_stride + view.head * args.k_head_stride;
    return round_to(load_value(which ? args.v : args.k, index + channel, args.dtype), layer.exact_dtype);
  }
  // The same as it is quantised, but for the Hadamard transform: before RoPE if the plan says so, without the mean or
  // what was predicted.
  __device__ float stored(int64_t token, int channel) const {
    const kv_layer& layer = view.layer;
    float x = value(token, channel);
    const float* mean = which ? layer.v_mean : layer.k_mean;
    if (given) mean = given + (token - kv_boundary(&layer, length)) * layer.num_kv_heads * layer.head_dim;
    if (mean) mean += view.head * layer.head_dim;
    if (which) return mean ? __fsub_rn(x, mean[channel]) : x;
    if (layer.rope_before) {
      const int half = layer.head_dim / 2;
      const bool second = channel >= half;
      const int pair = second ? channel - half : channel;
      const float* row = layer.rope + view.position(token) * layer.head_dim;
      x = unrotated(x, value(token, second ? pair : pair + half), row[pair], row[pair + half], second);
      return mean ? __fsub_rn(x, mean[channel]) : x;
    }
    return mean ? __fsub_rn(x, mean_at(layer, mean, view.position(token), channel)) : x;
  }
};

// kvcli.quant.quantizer.sum_by_halves over scratch[0 ... count - 1], which it overwrites. The sum, in every lane.
__device__ float sum_by_halves(float* scratch, int count) {
  const int lane = threadIdx.x % WARP;
  while (count % 2 == 0) {
    count /= 2;
    __syncwarp();
    for (int i = lane; i < count; i += WARP) scratch[i] = __fadd_rn(scratch[i], scratch[i + count]);
  }
  __syncwarp();
  float sum = scratch[0];
  for (int i = 1; i < count; i++) sum = __fadd_rn(sum, scratch[i]);
  __syncwarp();  // the caller fills scratch anew
  return sum;
}

__device__ __forceinline__ int nearest_level(float x, const kv_format& format) {
  int code = 0;
  for (int i = 1; i < 1 << format.bits; i++)
    code += !(x <= __fmul_rn(__fadd_rn(format.levels[i], format.levels[i - 1]), 0.5f));  // no number: the last level
  return code;
}

__device__ __forceinline__ float inverse_of(float scale) { return scale > 0 ? __fdiv_rn(1.0f, scale) : 0.0f; }

struct Encoded {
  uint32_t scale, zero;  // as stored
};

// Quantise one group by one warp: kvcli.quant.quantizer to the last bit. Values x[i * stride] become codes in place.
__device__ Encoded quantize_group(float* x, int stride, int count, const kv_format& format, float* scratch) {
  const int lane = threadIdx.x % WARP;
  const int top = (1 << format.bits) - 1;
  Encoded out = {0, 0};
  if (format.table) {
    for (int i = lane; i < count; i += WARP) scratch[i] = __fmul_rn(x[i * stride], x[i * stride]);
    const float sigma = __fsqrt_rn(__fdiv_rn(sum_by_halves(scratch, count), static_cast<float>(count)));
    const float by_sigma = inverse_of(sigma);
    for (int i = lane; i < count; i += WARP) {
      const float point = format.levels[nearest_level(__fmul_rn(x[i * stride], by_sigma), format)];
      scratch[i] = __fmul_rn(x[i * stride], point);
    }
    const float along = sum_by_halves(scratch, count);
    for (int i = lane; i < count; i += WARP) {
      const float point = format.levels[nearest_level(__fmul_rn(x[i * stride], by_sigma), format)];
      scratch[i] = __fmul_rn(point, point);
    }
    const float gain = __fdiv_rn(along, sum_by_halves(scratch, count));
    out.scale = encode_scale(gain < 0 ? 0.0f : gain, format.scale_dtype, false);
  } else {
    float low = INFINITY, high = -INFINITY;
    for (int i = lane; i < count; i += WARP) low = fminf(low, x[i * stride]), high = fmaxf(high, x[i * stride]);
    low = __fadd_rn(-warp_max(-low), 0.0f), high = warp_max(high);  // no negative zero
    float scale;
    if (format.symmetric) {
      scale = __fmul_rn(fmaxf(fabsf(high), fabsf(low)), static_cast<float>(2.0 / top));
    } else {
      out.zero = __half_as_ushort(__float2half_rn(__fadd_rn(fminf(fmaxf(low, -65504.0f), 65504.0f), 0.0f)));
      scale = __fdiv_rn(fmaxf(__fsub_rn(high, half_bits_to_float(out.zero)), 0.0f), static_cast<float>(top));
    }
    out.scale = encode_scale(scale, format.scale_dtype, format.bits == 8);
  }
  const float decoded =
      half_bits_to_float(format.scale_dtype == KV_SCALE_E5M3 ? out.scale << E5M3_SHIFT : out.scale);
  const float inverse = inverse_of(decoded);
  for (int i = lane; i < count; i += WARP) {
    float code;
    if (format.table) code = static_cast<float>(nearest_level(__fmul_rn(x[i * stride], inverse), format));
    else if (format.symmetric) code = rintf(__fadd_rn(__fmul_rn(x[i * stride], inverse), top * 0.5f));
    else code = rintf(__fmul_rn(__fsub_rn(x[i * stride], half_bits_to_float(out.zero)), inverse));
    x[i * stride] = fminf(fmaxf(code, 0.0f), static_cast<float>(top));
  }
  return out;
}

struct Target {
  uint8_t *codes, *scales, *zeros;
};

__device__ void store_scale(const kv_format& format, const Target& to, int64_t index, Encoded value) {
  if (format.scale_dtype == KV_SCALE_E5M3) to.scales[index] = static_cast<uint8_t>(value.scale);
  else reinterpret_cast<uint16_t*>(to.scales)[index] = static_cast<uint16_t>(value.scale);
  if (!format.symmetric) reinterpret_cast<uint16_t*>(to.zeros)[index] = static_cast<uint16_t>(value.zero);
}

// Pack tokens first ... last - 1, which lie in one page, by the whole block. rows has unit_tokens * unit_width floats,
// keys what predict_values needs.
template <bool PREDICTS>
__device__ void pack_unit(const Source& from, int64_t first, int64_t last, const Target& to, float* rows,
                          float* scratches, float* keys) {
  const kv_layer& layer = from.view.layer;
  const kv_format& format = from.which ? layer.v : layer.k;
  const int dim = layer.head_dim, in_page = static_cast<int>(first % layer.block_size);
  const int count = static_cast<int>(last - first);
  const int64_t row_bytes = kv_row_bytes(&format, dim);
  if (kv_is_exact(&format)) {
    const int page_dtype = format.bits == 32 ? static_cast<int>(KV_F32) : layer.page_dtype;
    for (int i = threadIdx.x; i < count * dim; i += THREADS)
      store_value(to.codes + (in_page + i / dim) * row_bytes, i % dim, page_dtype,
                  from.value(first + i / dim, i % dim));
    return;
  }
  const bool token_axis = format.axis == KV_TOKEN;
  float* scratch = scratches + threadIdx.x / WARP * MAX_GROUP;
  const int tile = unit_width(format, dim);
  const bool predicts = PREDICTS && from.which;
  for (int channel = 0; channel < dim; channel += tile) {
    const int width = dim - channel < tile ? dim - channel : tile;
    if (predicts) predict_values(from.view, first, count, channel, width, keys, rows);
    for (int i = threadIdx.x; i < count * width; i += THREADS)
      rows[i] = predicts ? __fsub_rn(from.value(first + i / width, channel + i % width), rows[i])
                         : from.stored(first + i / width, channel + i % width);
    if (format.hadamard) hadamard_rows(BlockTeam(), rows, count, dim, dim);
    __syncthreads();
    const int per_row = token_axis ? width / format.group : width;  // groups side by side
    const int groups = (token_axis ? count : count / format.group) * per_row;
    for (int g = threadIdx.x / WARP; g < groups; g += WARPS) {
      const int row = g / per_row, column = g % per_row;
      float* values = rows + (token_axis ? row * width + column * format.group : row * format.group * width + column);
      const Encoded value = quantize_group(values, token_axis ? 1 : width, format.group, format, scratch);
      const int64_t index = token_axis ? static_cast<int64_t>(in_page + row) * per_row + column
                                       : static_cast<int64_t>(in_page / format.group + row) * dim + channel + column;
      if (threadIdx.x % WARP == 0) store_scale(format, to, index, value);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * width / 8; i += THREADS) {
      const int row = i / (width / 8), chunk = i % (width / 8);
      uint64_t codes = 0;
      for (int j = 0; j < 8; j++)
        codes |= static_cast<uint64_t>(rows[row * width + chunk * 8 + j]) << (j * format.bits);
      uint8_t* at = to.codes + (in_page + row) * row_bytes + (channel / 8 + chunk) * format.bits;
      store_eight_codes(at, format.bits, codes);
    }
    __syncthreads();  // the next channels take the rows' place
  }
}

// A sliding layer's pages may be used in turn, so that a long prompt writes one more than once: the last one counts.
__device__ bool overwritten(const HeadView& view, int64_t logical, int64_t last, int page) {
  if (!view.layer.window) return false;
  for (int64_t later = logical + 1; later < last; later++)
    if (view.page(later) == page) return true;
  return false;
}

enum Work { PACK = 1, KEEP = 2, KEYS = 4, VALUES = 8 };

// Grid: (units, keys and values of each kv head, sequences). Each block packs every gridDim.x-th unit.
template <bool PREDICTS>
__global__ void __launch_bounds__(THREADS)
append_kernel(const __grid_constant__ kv_layer layer, const __grid_constant__ kvrt_append_args args, int work) {
  KVRT_DYNAMIC_SHARED(shared);
  float* scratches = reinterpret_cast<float*>(shared);
  float* keys = scratches + WARPS * MAX_GROUP;
  float* rows = keys + (PREDICTS ? TILE * layer.head_dim : 0);
  const int which = blockIdx.y % 2;
  if (!(work & (which ? VALUES : KEYS))) return;
  const HeadView view = {layer, args.cache, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y / 2)};
  const Source from(args, view, which);
  const kv_page_layout at = kv_layout_of(&layer);
  const int dim = layer.head_dim;
  if (work & PACK) {
    const int64_t old_boundary = kv_boundary(&layer, from.length), new_boundary = kv_boundary(&layer, from.n);
    const int unit = unit_tokens(which ? layer.v : layer.k);
    for (int64_t u = old_boundary / unit + blockIdx.x; u * unit < new_boundary; u += gridDim.x) {
      const int64_t first = u * unit > old_boundary ? u * unit : old_boundary;
      const int64_t last = (u + 1) * unit < new_boundary ? (u + 1) * unit : new_boundary;
      const int64_t logical = first / layer.block_size;
      const int page = view.page(logical);
      const int64_t pages_end = (new_boundary + layer.block_size - 1) / layer.block_size;
      if (page < 0 || overwritten(view, logical, pages_end, page)) continue;
      uint8_t* slice = view.slice(page, at.head_bytes);
      const Target to = {slice + (which ? at.v_codes : at.k_codes), slice + (which ? at.v_scales : at.k_scales),
                         slice + (which ? at.v_zeros : at.k_zeros)};
      pack_unit<PREDICTS>(from, first, last, to, rows, scratches, keys);
    }
  }
  if (!(work & KEEP) || layer.portable) return;
  __syncthreads();  // ring entries are read above, by whichever thread, and written below
  const int64_t boundary = kv_boundary(&layer, from.n);
  const int64_t kept = boundary > from.length ? boundary : from.length;
  const int64_t blocks = static_cast<int64_t>(gridDim.x) * THREADS, thread = blockIdx.x * THREADS + threadIdx.x;
  for (int64_t i = thread; i < (from.n - kept) * dim; i += blocks) {
    const int64_t token = kept + i / dim;
    const int channel = static_cast<int>(i % dim);
    store_value(args.cache.tail, view.tail_row(which, token) + channel, layer.exact_dtype, from.value(token, channel));
  }
  const int64_t sinks_end = from.n < layer.sink_tokens ? from.n : layer.sink_tokens;
  for (int64_t i = thread; i < (sinks_end - from.length) * dim; i += blocks) {
    const int64_t token = from.length + i / dim;
    const int channel = static_cast<int>(i % dim);
    store_value(args.cache.sinks, view.sink_row(which, token) + channel, layer.exact_dtype, from.value(token, channel));
  }
}

size_t shared_bytes(const kv_layer& layer) {
  const auto floats = [&](const kv_format& format) {
    return kv_is_exact(&format) ? 0 : unit_tokens(format) * unit_width(format, layer.head_dim);
  };
  const int rows = floats(layer.k) > floats(layer.v) ? floats(layer.k) : floats(layer.v);
  const int keys = layer.v_weight ? TILE * layer.head_dim : 0;
  return static_cast<size_t>(rows + keys + WARPS * MAX_GROUP) * sizeof(float);
}

}  // namespace

cudaError_t launch_append(const kv_layer& layer, const kvrt_append_args& args, cudaStream_t stream) {
  const auto run = [&](int blocks, int work) {
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(2 * layer.num_kv_heads),
                    static_cast<unsigned>(args.cache.num_seqs));
    const auto kernel = layer.v_weight ? append_kernel<true> : append_kernel<false>;
    return KVRT_LAUNCH(kernel, grid, dim3(THREADS), shared_bytes(layer), stream, layer, args, work);
  };
  const bool small = args.max_new <= layer.block_size;
  const int shortest = unit_tokens(layer.k) < unit_tokens(layer.v) ? unit_tokens(layer.k) : unit_tokens(layer.v);
  const int units = small ? 1 : (args.max_new + layer.block_size) / shortest + 1, pack = small ? PACK | KEEP : PACK;
  const int given = (args.k ? KEYS : 0) | (args.v ? VALUES : 0);
  cudaError_t status = cudaSuccess;
  if (layer.v_weight && args.k) status = run(units, pack | KEYS);
  const int rest = layer.v_weight ? given & ~KEYS : given;
  if (status == cudaSuccess && rest) status = run(units, pack | rest);
  return status != cudaSuccess || small || layer.portable ? status : run(8, KEEP | given);
}

}  // namespace kvrt
