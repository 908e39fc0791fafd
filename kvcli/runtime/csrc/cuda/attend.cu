// Split-KV attention of one new token a sequence over packed pages, sinks and the tail.
//
// Grid: (splits of the pages, then the exact tokens; kv heads and groups of their query heads; sequences). Every block
// leaves a partial for each of its query heads in the workspace; combine.cu makes one of them.
#include "combine.h"
#include "launches.h"
#include "scalar_engine.cuh"
#include "tensor_engine.cuh"

namespace kvrt {

namespace {

constexpr int TENSOR_MIN_GROUP = 3;  // query heads of a kv head from which the tensor cores are taken
constexpr int WARPS = 4;
constexpr int SHARED_TARGET = 48 * 1024;  // stages beyond two are added while a block takes no more than this
constexpr int SHARED_MAX = 98 * 1024;     // what every GPU from sm_80 on gives a block

// Query times scale, for `rows` heads; rows beyond the group are zeros. By the whole block; the caller ends it with
// a barrier, which the queries themselves do not need.
__device__ void load_queries(const Task& task, int rows, float* query, float* stored, float* mean) {
  const kvrt_attend_args& args = task.params.args;
  const kv_layer& layer = task.params.layer;
  const int dim = layer.head_dim, half = dim / 2;
  const int64_t first = task.view.sequence * args.q_row_stride;
  for (int i = threadIdx.x; i < rows * dim; i += blockDim.x) {
    const int row = i / dim;
    float x = 0;
    if (row < task.group)
      x = load_value(args.q, first + (task.first_head + row) * args.q_head_stride + i % dim, args.dtype) *
          layer.softmax_scale;
    query[i] = x;
    if (stored != query) stored[i] = x;
  }
  if (stored != query) hadamard_rows(BlockTeam(), stored, rows, dim, dim);
  __syncthreads();
  if (!task.params.mean) return;
  const float* k_mean = layer.k_mean + task.view.head * dim;
  for (int i = threadIdx.x; i < rows * half; i += blockDim.x) {
    const int at = i / half * dim + i % half, pair = i % half;
    const float q0 = query[at], q1 = query[at + half], m0 = k_mean[pair], m1 = k_mean[pair + half];
    mean[at] = q0 * m0 + q1 * m1;
    mean[at + half] = q1 * m0 - q0 * m1;
  }
}

// The pages of this block's split, chunk by chunk from the last.
template <class Engine>
__device__ __forceinline__ void attend_packed(const Task& task, Engine& engine, int split, int group_tile,
                                              float* partials, uint8_t* stages, float* running) {
  const AttendParams& params = task.params;
  const PageRange range = pages_of_split(task.view, task.visible, params.args, split);
  const int64_t last_chunk = range.last > range.first ? (range.last - 1 - range.base) / range.chunk : -1;
  const int64_t first_chunk = range.last > range.first ? (range.first - range.base) / range.chunk : 0;
  for (int64_t chunk = last_chunk; chunk >= first_chunk; chunk--) {
    const int64_t begin = range.base + chunk * range.chunk, end = begin + range.chunk;
    engine.begin();
    walk_tiles(task, engine, begin > range.first ? begin : range.first, end < range.last ? end : range.last,
               stages + static_cast<size_t>(task.warp()) * params.stages * params.plan.bytes);
    __syncthreads();  // partials take the place of stages
    engine.finish(partials + task.warp() * group_tile * partial_floats(params.layer.head_dim));
    merge_warps(task, group_tile, partials, running);
  }
}

template <int GROUP>
__device__ __forceinline__ void attend_exact(const Task& task, ScalarEngine<GROUP>& engine, int group_tile,
                                             float* partials, float* running) {
  const kv_layer& layer = task.params.layer;
  const Visible& see = task.visible;
  if (layer.portable) return;
  const int64_t sinks_end = see.boundary < layer.sink_tokens ? see.boundary : layer.sink_tokens;
  const int64_t sinks = sinks_end > see.first ? sinks_end - see.first : 0;
  const int64_t tail_first = see.boundary > see.first ? see.boundary : see.first;
  const int64_t entries = sinks + see.n - tail_first;
  engine.begin();
  for (int64_t first = task.warp() * TILE; first < entries; first += task.warps() * TILE)
    engine.exact_tile(first, entries, see.first, sinks, tail_first);
  engine.finish(partials + task.warp() * group_tile * partial_floats(layer.head_dim));
  merge_warps(task, group_tile, partials, running);
}

__device__ void clear_running(const Task& task, float* running) {
  const int floats = partial_floats(task.params.layer.head_dim);
  for (int i = threadIdx.x; i < task.group * floats; i += blockDim.x) running[i] = i % floats ? 0.0f : -INFINITY;
}

// running ends with a barrier of merge_warps, or with the caller's.
__device__ void store_running(const Task& task, int split, const float* running) {
  const int floats = partial_floats(task.params.layer.head_dim);
  for (int i = threadIdx.x; i < task.group * floats; i += blockDim.x)
    partial_of(task.params.layer, task.params.args, task.view.sequence, task.first_head + i / floats,
               split)[i % floats] = running[i];
}

template <int GROUP>
__global__ void __launch_bounds__(WARPS * WARP)
attend_scalar(const __grid_constant__ AttendParams params, const __grid_constant__ SharedPlan plan) {
  KVRT_DYNAMIC_SHARED(shared);
  const Task task(params, GROUP);
  const int dim = params.layer.head_dim, split = params.first_split + static_cast<int>(blockIdx.x);
  float* query = reinterpret_cast<float*>(shared + plan.query);
  float* stored = reinterpret_cast<float*>(shared + plan.stored_query);
  float* mean = reinterpret_cast<float*>(shared + plan.mean_query);
  float* steps = reinterpret_cast<float*>(shared + plan.steps);
  float* running = reinterpret_cast<float*>(shared + plan.running);
  float* partials = reinterpret_cast<float*>(shared + plan.stages);
  clear_running(task, running);
  load_queries(task, GROUP, query, stored, mean);
  const SharedQuery queries = {query, stored, mean, steps};
  float* scratch = reinterpret_cast<float*>(shared + plan.scratch + task.warp() * plan.scratch_bytes);
  ScalarEngine<GROUP> engine(task, queries, scratch);
  if (split == params.args.splits) {
    attend_exact(task, engine, GROUP, partials, running);
  } else {
    if (params.plan.rope_at >= 0)
      for (int i = threadIdx.x; i < TILE * dim; i += blockDim.x) steps[i] = params.layer.rope[i] / params.layer.rope[0];
    if (params.mean) __syncthreads();
    attend_packed(task, engine, split, GROUP, partials, shared + plan.stages, running);
  }
  store_running(task, split, running);
}

template <int DIM>
__global__ void __launch_bounds__(WARPS * WARP)
attend_tensor(const __grid_constant__ AttendParams params, const __grid_constant__ SharedPlan plan) {
  KVRT_DYNAMIC_SHARED(shared);
  __shared__ float query_sum[TENSOR_GROUP];
  const Task task(params, TENSOR_GROUP);
  const int dim = params.layer.head_dim, split = params.first_split + static_cast<int>(blockIdx.x);
  float* query = reinterpret_cast<float*>(shared + plan.query);
  float* stored = reinterpret_cast<float*>(shared + plan.stored_query);
  float* mean = reinterpret_cast<float*>(shared + plan.mean_query);
  float* running = reinterpret_cast<float*>(shared + plan.running);
  float* partials = reinterpret_cast<float*>(shared + plan.stages);
  clear_running(task, running);
  load_queries(task, TENSOR_GROUP, query, stored, mean);
  if (split == params.args.splits) {
    const SharedQuery queries = {query, stored, mean, nullptr};
    ScalarEngine<TENSOR_GROUP> engine(task, queries, nullptr);
    attend_exact(task, engine, TENSOR_GROUP, partials, running);
  } else {
    uint4* fragments = reinterpret_cast<uint4*>(shared + plan.fragments);
    uint4* steps = reinterpret_cast<uint4*>(shared + plan.steps);
    Half2Bits* tables = reinterpret_cast<Half2Bits*>(shared + plan.scratch);
    fill_query_fragments<DIM>(stored, dim, fragments);
    if (params.mean) fill_step_fragments(params.layer, steps);
    if (params.layer.k.table) fill_table(params.layer.k, tables);
    if (params.layer.v.table) fill_table(params.layer.v, tables + TABLE_ENTRIES);
    for (int q = threadIdx.x; q < TENSOR_GROUP; q += blockDim.x) {
      float sum = 0;
      for (int i = 0; i < dim; i++) sum += stored[q * dim + i];
      query_sum[q] = sum;
    }
    __syncthreads();
    const TensorShared data = {fragments, steps, mean, query_sum, tables, tables + TABLE_ENTRIES};
    TensorEngine<DIM> engine(task, data);
    attend_packed(task, engine, split, TENSOR_GROUP, partials, shared + plan.stages, running);
  }
  store_running(task, split, running);
}

bool tensor_cores_take(const kv_format& format, int head_dim) {
  if (kv_is_exact(&format)) return format.bits == 16;
  return format.axis == KV_CHANNEL || format.group % 8 == 0 || format.group == head_dim;
}

bool fits_tensor_cores(const kv_layer& layer, const kvrt_attend_args& args, Cores cores) {
  if (cores == Cores::SCALAR || layer.head_dim % 16 || args.cache.positions) return false;
  if (layer.rope_before && !kv_is_exact(&layer.k)) return false;
  if (!tensor_cores_take(layer.k, layer.head_dim) || !tensor_cores_take(layer.v, layer.head_dim)) return false;
  return cores == Cores::TENSOR || layer.num_heads / layer.num_kv_heads >= TENSOR_MIN_GROUP;
}

int take(SharedPlan& plan, int64_t bytes) {
  const int at = plan.bytes;
  plan.bytes += static_cast<int>((bytes + 127) / 128 * 128);
  return at;
}

// Lays out shared memory and fixes stages and warps; false if nothing fits.
bool plan_shared(AttendParams& params, SharedPlan& plan, int& warps, int group_tile, int tensor_dim) {
  const kv_layer& layer = params.layer;
  const int64_t dim = layer.head_dim, rows = group_tile * dim * 4;
  for (warps = WARPS; warps; warps /= 2)
    for (params.stages = MAX_STAGES; params.stages >= 2; params.stages--) {
      plan = {};
      plan.query = take(plan, rows);
      plan.stored_query = layer.k.hadamard ? take(plan, rows) : plan.query;
      plan.mean_query = take(plan, params.mean ? rows : 0);
      plan.steps = take(plan, params.mean ? TILE * dim * 4 : 0);
      plan.fragments = take(plan, tensor_dim / 16 * WARP * 16);
      plan.running = take(plan, group_tile * partial_floats(layer.head_dim) * 4);
      if (tensor_dim) {
        plan.scratch = take(plan, 2 * TABLE_ENTRIES * sizeof(Half2Bits));
      } else {
        const int64_t turned = params.mean ? rows : 0, keys = layer.rope_before ? rows + TILE * dim * 4 : 0;
        plan.scratch_bytes = static_cast<int>(turned + keys);
        plan.scratch = take(plan, warps * plan.scratch_bytes);
      }
      const int64_t partials = warps * group_tile * partial_floats(layer.head_dim) * 4;
      const int64_t stages = static_cast<int64_t>(warps) * params.stages * params.plan.bytes;
      plan.stages = take(plan, partials > stages ? partials : stages);
      if (plan.bytes <= (params.stages > 2 ? SHARED_TARGET : SHARED_MAX)) return true;
    }
  return false;
}

template <class Kernel>
cudaError_t launch(Kernel kernel, AttendParams& params, int group_tile, int tensor_dim, cudaStream_t stream) {
  const kv_layer& layer = params.layer;
  SharedPlan plan;
  int warps;
  const int whole = layer.num_heads / layer.num_kv_heads;
  params.group_tiles = (whole + group_tile - 1) / group_tile;
  if (!plan_shared(params, plan, warps, group_tile, tensor_dim)) return cudaErrorInvalidConfiguration;
  const int parts = params.args.parts, last = params.args.splits + (parts & KVRT_EXACT ? 1 : 0);
  params.first_split = parts & KVRT_PACKED ? 0 : params.args.splits;
  const dim3 grid(static_cast<unsigned>(last - params.first_split),
                  static_cast<unsigned>(layer.num_kv_heads * params.group_tiles),
                  static_cast<unsigned>(params.args.cache.num_seqs));
  const dim3 threads(static_cast<unsigned>(warps * WARP));
  return KVRT_LAUNCH(kernel, grid, threads, static_cast<size_t>(plan.bytes), stream, params, plan);
}

}  // namespace

int64_t attend_workspace(const kv_layer& layer, int num_seqs, int splits) {
  kvrt_attend_args args = {};
  args.cache.num_seqs = num_seqs, args.splits = splits;
  const int64_t sums = layer.v_weight ? splits * key_sum_floats(layer) : 0;
  return (key_sums_at(layer, args) + static_cast<int64_t>(num_seqs) * layer.num_heads * sums) *
         static_cast<int64_t>(sizeof(float));
}

cudaError_t launch_attend(const kv_layer& layer, const kvrt_attend_args& wanted, Cores cores, cudaStream_t stream) {
  AttendParams params = {};
  kvrt_attend_args args = wanted;
  if (layer.v_weight && !args.mass) args.mass = own_mass(layer, args), args.mass_stride = layer.rope_positions;
  params.layer = layer, params.args = args;
  params.mean = layer.k_mean && !layer.rope_before && !kv_is_exact(&layer.k);
  params.plan = plan_tile(layer, params.mean && !args.cache.positions);
  const int whole = layer.num_heads / layer.num_kv_heads, dim = layer.head_dim;
  cudaError_t status;
  if (fits_tensor_cores(layer, args, cores)) {
    if (dim <= 64) status = launch(attend_tensor<64>, params, TENSOR_GROUP, 64, stream);
    else if (dim <= 128) status = launch(attend_tensor<128>, params, TENSOR_GROUP, 128, stream);
    else status = launch(attend_tensor<256>, params, TENSOR_GROUP, 256, stream);
  } else {
    if (whole == 1) status = launch(attend_scalar<1>, params, 1, 0, stream);
    else if (whole == 2) status = launch(attend_scalar<2>, params, 2, 0, stream);
    else status = launch(attend_scalar<4>, params, 4, 0, stream);
  }
  return status == cudaSuccess ? launch_combine(layer, args, stream) : status;
}

}  // namespace kvrt
