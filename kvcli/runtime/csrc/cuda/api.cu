// kvrt.h on CUDA: validation and dispatch.
//
// Every call puts kernels on exec->stream and returns: it allocates nothing, waits for nothing and reads no device
// memory, so a stream under capture takes it. What only device memory knows is therefore not checked: lengths, block
// tables, slots, positions beyond the rope table, tokens beyond the block table.
#include <atomic>
#include <cstring>

#include "fused.h"
#include "launches.h"

namespace {

using kvrt::Cores;

constexpr const char* VARIANTS[] = {"cuda", "cuda-scalar", "cuda-tensor"};
std::atomic<int> chosen{0};

// Why this machine runs no kernels, or null.
const char* reason_against() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  return devices > 0 ? nullptr : "there is no CUDA device";
}

cudaStream_t stream_of(const kvrt_exec* exec) { return exec ? static_cast<cudaStream_t>(exec->stream) : nullptr; }

int status_of(cudaError_t status) {
  if (status == cudaSuccess) return KVRT_OK;
  cudaGetLastError();  // a later call is not to report it again
  return status == cudaErrorInvalidConfiguration ? KVRT_UNSUPPORTED : KVRT_DEVICE;
}

bool is_dtype(int dtype) { return dtype >= KV_F32 && dtype <= KV_BF16; }

constexpr int64_t MAX_BLOCKS = 0x7FFFFFFF;  // of a grid's x

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % KV_ALIGNMENT == 0; }

int check_format(const kv_format& format, const kv_layer& layer) {
  if (format.bits == 16 || format.bits == 32) return KVRT_OK;
  if (format.bits == 1) return KVRT_UNSUPPORTED;
  if (format.bits != 2 && format.bits != 3 && format.bits != 4 && format.bits != 8) return KVRT_INVALID;
  if (format.axis != KV_TOKEN && format.axis != KV_CHANNEL) return KVRT_INVALID;
  const bool channel = format.axis == KV_CHANNEL;
  if (format.group < 1 || (channel ? layer.block_size : layer.head_dim) % format.group) return KVRT_INVALID;
  if (format.hadamard && channel) return KVRT_INVALID;
  if (format.table && (!format.symmetric || format.bits > 4)) return KVRT_INVALID;
  return KVRT_OK;
}

int check_layer(const kv_layer* layer) {
  if (!layer || layer->num_kv_heads < 1 || layer->num_heads < 1) return KVRT_INVALID;
  if (layer->num_heads % layer->num_kv_heads) return KVRT_INVALID;
  const int block = layer->block_size;
  if (block != 16 && block != 32 && block != 64 && block != 128) return KVRT_INVALID;
  if (layer->head_dim < 1) return KVRT_INVALID;
  if (layer->head_dim % 8 || layer->head_dim > KV_MAX_HEAD_DIM) return KVRT_UNSUPPORTED;
  if (!is_dtype(layer->page_dtype) || !is_dtype(layer->exact_dtype) || layer->page_dtype == KV_F32) return KVRT_INVALID;
  if (!layer->portable && layer->tail_tokens < layer->residual_window + block - 1) return KVRT_INVALID;
  if (layer->v_weight && kv_is_exact(&layer->v)) return KVRT_INVALID;
  const bool turns = layer->v_weight || (!kv_is_exact(&layer->k) && (layer->rope_before || layer->k_mean));
  if (turns && (!layer->rope || layer->rope_positions < kvrt::MIN_ROPE_POSITIONS || !aligned(layer->rope)))
    return KVRT_INVALID;
  const int status = check_format(layer->k, *layer);
  return status ? status : check_format(layer->v, *layer);
}

int check_cache(const kv_layer& layer, const kvrt_cache& cache, bool beside) {
  if (cache.num_seqs < 0 || cache.max_pages < 0) return KVRT_INVALID;
  // values are predicted from the keys of all heads in a slot
  if (layer.v_weight && (cache.block_table_head_stride || cache.length_head_stride)) return KVRT_UNSUPPORTED;
  if (!cache.num_seqs) return KVRT_OK;
  // a cache for sequences so short that none leaves the exact window has no pages
  if (cache.max_pages && (!cache.block_tables || (!beside && !cache.pages))) return KVRT_INVALID;
  if (!aligned(cache.pages) || !aligned(cache.tail) || !aligned(cache.sinks)) return KVRT_INVALID;
  if (beside && !cache.lengths) return KVRT_INVALID;
  if (beside && !layer.portable && (!cache.tail || (layer.sink_tokens && !cache.sinks))) return KVRT_INVALID;
  return KVRT_OK;
}

}  // namespace

extern "C" {

int kvrt_version(void) { return KVRT_VERSION; }
const char* kvrt_kind(void) { return "cuda"; }

const char* kvrt_status_text(int status) {
  switch (status) {
    case KVRT_OK: return "success";
    case KVRT_INVALID: return "arguments contradict each other";
    case KVRT_UNSUPPORTED: return "not implemented by the CUDA kernels";
    case KVRT_NO_MEMORY: return "out of memory";
    case KVRT_DEVICE: return "the CUDA runtime reported an error";
    default: return "unknown status";
  }
}

const char* kvrt_variant(int i, const char** reason) {
  if (i < 0 || i >= static_cast<int>(sizeof VARIANTS / sizeof *VARIANTS)) return nullptr;
  if (reason) *reason = reason_against();
  return VARIANTS[i];
}

int kvrt_use_variant(const char* name) {
  if (!name) {
    chosen = 0;
    return KVRT_OK;
  }
  for (int i = 0; i < static_cast<int>(sizeof VARIANTS / sizeof *VARIANTS); i++)
    if (!std::strcmp(name, VARIANTS[i])) {
      chosen = i;
      return KVRT_OK;
    }
  return KVRT_INVALID;
}

const char* kvrt_current_variant(void) { return VARIANTS[chosen]; }

int kvrt_page_layout(const kv_layer* layer, kv_page_layout* out) {
  if (!layer || !out) return KVRT_INVALID;
  *out = kv_layout_of(layer);
  return KVRT_OK;
}

int64_t kvrt_boundary(const kv_layer* layer, int64_t n) { return kv_boundary(layer, n); }

int kvrt_append(const kv_layer* layer, const kvrt_append_args* args, const kvrt_exec* exec) {
  int status = check_layer(layer);
  if (status) return status;
  if (!args || args->max_new < 0 || !is_dtype(args->dtype)) return KVRT_INVALID;
  if ((args->k_predicted || args->v_predicted) && (args->cache.num_seqs > 1 || layer->v_weight)) return KVRT_INVALID;
  if (args->k_predicted && !layer->rope) return KVRT_INVALID;
  if ((status = check_cache(*layer, args->cache, true)) != KVRT_OK) return status;
  if (!args->starts && args->max_new > 1) return KVRT_INVALID;
  if (!args->cache.num_seqs || !args->max_new) return KVRT_OK;
  if (!args->k && !args->v) return KVRT_INVALID;
  return status_of(kvrt::launch_append(*layer, *args, stream_of(exec)));
}

int64_t kvrt_attend_workspace(const kv_layer* layer, int32_t num_seqs, int32_t splits) {
  return layer && num_seqs > 0 && splits > 0 ? kvrt::attend_workspace(*layer, num_seqs, splits) : 0;
}

int kvrt_attend(const kv_layer* layer, const kvrt_attend_args* args, const kvrt_exec* exec) {
  int status = check_layer(layer);
  if (status) return status;
  if (!args || !is_dtype(args->dtype) || args->splits < 1 || args->split_pages < 0) return KVRT_INVALID;
  if (args->parts < KVRT_PACKED || args->parts > KVRT_ALL) return KVRT_INVALID;
  if ((status = check_cache(*layer, args->cache, true)) != KVRT_OK) return status;
  if (!args->cache.num_seqs) return KVRT_OK;
  if (!args->q || !args->out || !args->workspace || !aligned(args->workspace)) return KVRT_INVALID;
  if (args->workspace_bytes < kvrt::attend_workspace(*layer, args->cache.num_seqs, args->splits)) return KVRT_INVALID;
  // weights are made of scores in place and keys are summed by them, so each needs the one before
  if (args->key_sum && !args->mass && !layer->v_weight) return KVRT_UNSUPPORTED;
  if (args->key_sum && !kv_is_exact(&layer->k) && !layer->rope_before && !layer->rope) return KVRT_INVALID;
  if (args->key_sum && kv_is_exact(&layer->k) && !layer->rope) return KVRT_INVALID;
  const int variant = chosen;
  const Cores cores = variant == 0 ? Cores::AUTOMATIC : variant == 1 ? Cores::SCALAR : Cores::TENSOR;
  return status_of(kvrt::launch_attend(*layer, *args, cores, stream_of(exec)));
}

int kvrt_expand(const kv_layer* layer, const kvrt_expand_args* args, const kvrt_exec* exec) {
  int status = check_layer(layer);
  if (status) return status;
  if (!args || !is_dtype(args->dtype) || args->first < 0 || args->count < 0) return KVRT_INVALID;
  if ((status = check_cache(*layer, args->cache, false)) != KVRT_OK) return status;
  if (args->sequence < 0 || args->sequence >= args->cache.num_seqs) return KVRT_INVALID;
  if (args->with_sinks && args->keys_before_rope) return KVRT_INVALID;
  if (args->with_sinks && layer->sink_tokens && !args->cache.sinks) return KVRT_INVALID;
  const bool stored_before = layer->rope_before && !kv_is_exact(&layer->k);
  if (args->keys_before_rope && args->k && !layer->rope && !stored_before) return KVRT_INVALID;
  if (args->first + args->count > static_cast<int64_t>(args->cache.max_pages) * layer->block_size) return KVRT_INVALID;
  return status_of(kvrt::launch_expand(*layer, *args, stream_of(exec)));
}

int kvrt_hadamard(float* out, const float* x, int64_t rows, int32_t head_dim, const kvrt_exec* exec) {
  if (!out || !x || rows < 0 || head_dim < 2 || head_dim % 2) return KVRT_INVALID;
  if (head_dim > 1024 || rows > MAX_BLOCKS) return KVRT_UNSUPPORTED;
  return status_of(kvrt::launch_hadamard(out, x, rows, head_dim, stream_of(exec)));
}

int kvrt_rms_norm(void* y, const void* x, void* residual, const void* weight, int64_t rows, int32_t width, float eps,
                  int32_t dtype, const kvrt_exec* exec) {
  if (!y || !x || !weight || rows < 0 || width < 1 || !is_dtype(dtype)) return KVRT_INVALID;
  if (rows > MAX_BLOCKS) return KVRT_UNSUPPORTED;
  return status_of(kvrt::launch_rms_norm(y, x, residual, weight, rows, width, eps, dtype, stream_of(exec)));
}

int kvrt_rope(void* qkv, const int32_t* positions, const float* rope, int64_t rope_positions, const void* q_norm,
              const void* k_norm, float eps, int64_t rows, int32_t num_heads, int32_t num_kv_heads, int32_t head_dim,
              int32_t dtype, const kvrt_exec* exec) {
  if (!qkv || !positions || !rope || rope_positions < 1 || rows < 0 || !is_dtype(dtype)) return KVRT_INVALID;
  if (num_heads < 1 || num_kv_heads < 1 || head_dim < 2 || head_dim % 2) return KVRT_INVALID;
  if (rows > MAX_BLOCKS / (num_heads + num_kv_heads)) return KVRT_UNSUPPORTED;
  const kvrt::RopeArgs args = {qkv,  positions, rope,         q_norm,   k_norm, eps,
                               rows, num_heads, num_kv_heads, head_dim, dtype};
  return status_of(kvrt::launch_rope(args, stream_of(exec)));
}

int kvrt_silu_mul(void* y, const void* x, int64_t rows, int32_t width, int32_t dtype, const kvrt_exec* exec) {
  if (!y || !x || rows < 0 || width < 1 || !is_dtype(dtype)) return KVRT_INVALID;
  if (rows > MAX_BLOCKS) return KVRT_UNSUPPORTED;
  return status_of(kvrt::launch_silu_mul(y, x, rows, width, dtype, stream_of(exec)));
}

int kvrt_attend_chunk(const kv_layer*, const kvrt_chunk_args*, const kvrt_exec*) { return KVRT_UNSUPPORTED; }

int kvrt_int4_matmul(void*, const void*, const void*, const void*, int64_t, int32_t, int32_t, int32_t, int32_t, int32_t,
                     int32_t, int32_t, const kvrt_exec*) {
  return KVRT_UNSUPPORTED;
}

int kvrt_int4_expand(void*, const void*, int32_t, int32_t, int32_t, int32_t, int32_t, const kvrt_exec*) {
  return KVRT_UNSUPPORTED;
}

}  // extern "C"
