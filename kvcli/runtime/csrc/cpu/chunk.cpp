// kvrt_attend_chunk: what a chunk of one sequence attends to, from keys and values written out as float32.
//
// A block of queries, all heads that share keys together, goes over the slots that it sees, kKeys at a time, with a
// running maximum and sum (FlashAttention, arXiv:2205.14135). Nothing is computed for slots that no query of the block
// sees, which for a causal chunk is most of what a mask would throw away.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cache_view.h"
#include "multiversion.h"

#define KVRT_PART static inline __attribute__((always_inline))

namespace kvrt {
namespace {

constexpr int kKeys = 64;   // of a step
constexpr int kLanes = 16;  // columns are computed by so many
constexpr int kQueries = 48;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

typedef float Lane __attribute__((vector_size(4 * kLanes)));

// c [R][16 J] = a [R][k] b [k][16 J], or added to it
template <int R, int J>
KVRT_PART void product(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int k, float *c,
                       int64_t c_stride, bool more) {
  Lane sum[R][J];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < J; j++) {
      sum[r][j] = Lane{};
      if (more) std::memcpy(&sum[r][j], c + r * c_stride + j * kLanes, sizeof(Lane));
    }
  for (int i = 0; i < k; i++) {
    Lane x[J];
    for (int j = 0; j < J; j++) std::memcpy(&x[j], b + i * b_stride + j * kLanes, sizeof(Lane));
    for (int r = 0; r < R; r++)
      for (int j = 0; j < J; j++) sum[r][j] += a[r * a_stride + i] * x[j];
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < J; j++) std::memcpy(c + r * c_stride + j * kLanes, &sum[r][j], sizeof(Lane));
}

template <int J>
KVRT_PART void product_rows(int rows, const float *a, int64_t a_stride, const float *b, int64_t b_stride, int k,
                            float *c, int64_t c_stride, bool more) {
  int r = 0;
  for (; r + 3 <= rows; r += 3)
    product<3, J>(a + r * a_stride, a_stride, b, b_stride, k, c + r * c_stride, c_stride, more);
  for (; r < rows; r++) product<1, J>(a + r * a_stride, a_stride, b, b_stride, k, c + r * c_stride, c_stride, more);
}

// columns: a multiple of 16
KVRT_CLONES
void multiply(int rows, int columns, const float *a, int64_t a_stride, const float *b, int64_t b_stride, int k, float *c,
              int64_t c_stride, bool more) {
  int at = 0;
  for (; at + 2 * kLanes <= columns; at += 2 * kLanes)
    product_rows<2>(rows, a, a_stride, b + at, b_stride, k, c + at, c_stride, more);
  if (at < columns) product_rows<1>(rows, a, a_stride, b + at, b_stride, k, c + at, c_stride, more);
}

KVRT_CLONES
void scale_row(float *x, int n, float factor) {
  for (int i = 0; i < n; i++) x[i] *= factor;
}

// Keys and values of consecutive slots; keys [block][head_dim][kKeys] of each kv head.
struct Slots {
  const float *k, *v;
  int64_t first, count, head_stride;
  float *turned;
  int64_t blocks() const { return (count + kKeys - 1) / kKeys; }
};

struct Chunk {
  const kv_layer &layer;
  const kvrt_chunk_args &args;
  const PageOps &ops;
  Slots parts[2];  // packed, exact
  int group, queries;

  int64_t work_floats() const { return static_cast<int64_t>(queries) * group * (2 * layer.head_dim + kKeys + 2); }

  // slots of a part that the query of token t sees, from the part's first on
  void seen(int part, int64_t t, int64_t *from, int64_t *to) const {
    const int64_t oldest = kv_first_visible(&layer, t + 1), boundary = kv_boundary(&layer, t + 1);
    const Slots &s = parts[part];
    *from = std::max(int64_t{0}, (part ? std::max(oldest, boundary) : oldest) - s.first);
    *to = std::min(s.count, (part ? t + 1 : boundary) - s.first);
  }

  void turn(int part, int64_t head, int64_t block) const {
    const Slots &s = parts[part];
    const int d = layer.head_dim;
    const int64_t first = block * kKeys, count = std::min<int64_t>(kKeys, s.count - first);
    const float *from = s.k + head * s.head_stride + first * d;
    float *to = s.turned + (head * s.blocks() + block) * kKeys * d;
    for (int c = 0; c < d; c++)
      for (int64_t t = 0; t < kKeys; t++) to[c * kKeys + t] = t < count ? from[t * d + c] : 0.0f;
  }

  void attend(int64_t head, int64_t first, int64_t last, float *x) const {
    const int d = layer.head_dim, rows = static_cast<int>(last - first) * group;
    float *query = x, *sums = query + rows * d, *scores = sums + rows * d, *top = scores + rows * kKeys;
    float *mass = top + rows;
    for (int r = 0; r < rows; r++) {
      const int64_t at = (first + r / group) * args.q_row_stride + (head * group + r % group) * d;
      load_row(args.q, args.dtype, at, d, query + r * d);
      for (int c = 0; c < d; c++) query[r * d + c] *= layer.softmax_scale;
      top[r] = kNothing, mass[r] = 0;
    }
    std::fill(sums, sums + rows * d, 0.0f);
    for (int part = 0; part < 2; part++) step(part, head, first, last, query, scores, sums, top, mass);
    for (int r = 0; r < rows; r++) {
      const int64_t token = first + r / group, h = head * group + r % group;
      scale_row(sums + r * d, d, mass[r] > 0 ? 1.0f / mass[r] : 0.0f);
      store_row(sums + r * d, args.out, args.out_dtype, token * args.out_row_stride + h * d, d);
      if (args.lse) args.lse[h * args.tokens + token] = top[r] + std::log(mass[r]);
    }
  }

  // one part of the slots
  void step(int part, int64_t head, int64_t first, int64_t last, const float *query, float *scores, float *sums,
            float *top, float *mass) const {
    const Slots &s = parts[part];
    const int d = layer.head_dim, rows = static_cast<int>(last - first) * group;
    int64_t from, to, unused;
    seen(part, args.start + first, &from, &unused);
    seen(part, args.start + last - 1, &unused, &to);
    if (from >= to) return;
    for (int64_t base = from / kKeys * kKeys; base < to; base += kKeys) {
      const int64_t begin = std::max(base, from / kLanes * kLanes), end = std::min(base + kKeys, to);
      const int count = static_cast<int>(end - begin), columns = (count + kLanes - 1) / kLanes * kLanes;
      const float *keys = s.turned + (head * s.blocks() + base / kKeys) * kKeys * d + (begin - base);
      multiply(rows, columns, query, d, keys, kKeys, d, scores, kKeys, false);
      for (int r = 0; r < rows; r++) {
        int64_t low, high;
        seen(part, args.start + first + r / group, &low, &high);
        low = std::max(low, begin) - begin, high = std::min(high, end) - begin;
        float *row = scores + r * kKeys;
        if (low >= high) {
          std::fill(row, row + count, 0.0f);
          continue;
        }
        const int n = static_cast<int>(high - low);
        const float best = std::max(top[r], ops.max_of(row + low, n));
        if (best != top[r]) {
          const float factor = std::exp(top[r] - best);
          mass[r] *= factor;
          scale_row(sums + r * d, d, factor);
          top[r] = best;
        }
        mass[r] += ops.exp_sum(row + low, n, best);
        std::fill(row, row + low, 0.0f);
        std::fill(row + high, row + count, 0.0f);
      }
      multiply(rows, d, scores, kKeys, s.v + head * s.head_stride + begin * d, d, count, sums, d, true);
    }
  }
};

int attend_chunk(const kv_layer *layer, const kvrt_chunk_args *args, const kvrt_exec *exec) {
  if (!args) return KVRT_INVALID;
  const int status = check_layer(layer);
  if (status != KVRT_OK) return status;
  const kvrt_chunk_args &a = *args;
  const int d = layer->head_dim, heads = layer->num_kv_heads;
  if (d % kLanes || layer->softcap > 0) return KVRT_UNSUPPORTED;
  if (!is_dtype(a.dtype) || !is_dtype(a.out_dtype) || a.tokens < 0 || a.start < 0) return KVRT_INVALID;
  if (a.packed_count < 0 || a.exact_count < 0 || a.packed_first < 0 || a.exact_first < 0) return KVRT_INVALID;
  if (a.packed_count && (!a.packed_k || !a.packed_v)) return KVRT_INVALID;
  if (a.exact_count && (!a.exact_k || !a.exact_v)) return KVRT_INVALID;
  if (!a.tokens) return KVRT_OK;
  if (!a.q || !a.out) return KVRT_INVALID;

  const int group = layer->num_heads / heads;
  Chunk chunk{*layer, a, current_ops(),
              {{a.packed_k, a.packed_v, a.packed_first, a.packed_count, a.packed_head_stride, nullptr},
               {a.exact_k, a.exact_v, a.exact_first, a.exact_count, a.exact_head_stride, nullptr}},
              group, std::max(1, kQueries / group)};
  const int64_t packed = chunk.parts[0].blocks(), exact = chunk.parts[1].blocks();
  const Scratch turned(heads * (packed + exact) * kKeys * d, 1);
  const int64_t blocks = (a.tokens + chunk.queries - 1) / chunk.queries, jobs = blocks * heads;
  const int threads = threads_for(exec, jobs, static_cast<double>(a.tokens) * (a.packed_count + a.exact_count) * d);
  const Scratch work(chunk.work_floats(), threads);
  if (!turned.data() || !work.data()) return KVRT_NO_MEMORY;
  chunk.parts[0].turned = turned.data();
  chunk.parts[1].turned = turned.data() + heads * packed * kKeys * d;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < heads * (packed + exact); i++) {
      const int64_t block = i % (packed + exact);
      chunk.turn(block >= packed, i / (packed + exact), block < packed ? block : block - packed);
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < jobs; i++) {  // the last queries see most, so they come first
      const int64_t first = (blocks - 1 - i / heads) * chunk.queries;
      chunk.attend(i % heads, first, std::min<int64_t>(first + chunk.queries, a.tokens), work.mine());
    }
  }
  return KVRT_OK;
}

}  // namespace
}  // namespace kvrt

extern "C" int kvrt_attend_chunk(const kv_layer *layer, const kvrt_chunk_args *args, const kvrt_exec *exec) {
  return kvrt::attend_chunk(layer, args, exec);
}
