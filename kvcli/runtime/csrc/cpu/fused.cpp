// The small fused operations of a decoder layer. A token's row is a few thousand values: loops that vectorise, and
// threads only where there are many rows.
#include <cmath>

#include "cache_view.h"
#include "multiversion.h"

#define KVRT_PART static inline __attribute__((always_inline))

namespace kvrt {
namespace {

constexpr int kLanes = 16;

// Sixteen sums, so that the order is the same whatever the width of the machine's registers.
KVRT_PART float sum_of_squares(const float *x, int n) {
  float lane[kLanes] = {0};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < kLanes; k++) lane[k] += x[i + k] * x[i + k];
  for (int k = 0; i < n; i++, k++) lane[k] += x[i] * x[i];
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int k = 0; k < width; k++) lane[k] += lane[k + width];
  return lane[0];
}

// As in Llama: the normed value is rounded to dtype before the weight is multiplied on.
KVRT_PART void norm_row(float *x, const float *weight, int n, float eps, int dtype) {
  const float factor = 1.0f / std::sqrt(sum_of_squares(x, n) / static_cast<float>(n) + eps);
  for (int i = 0; i < n; i++) x[i] *= factor;
  round_row(x, dtype, n);
  for (int i = 0; i < n; i++) x[i] *= weight[i];
}

KVRT_CLONES
void norm_rows(void *y, const void *x, void *residual, const float *weight, int64_t first, int64_t last, int width,
               float eps, int dtype, float *row, float *other) {
  for (int64_t r = first; r < last; r++) {
    load_row(x, dtype, r * width, width, row);
    if (residual) {
      load_row(residual, dtype, r * width, width, other);
      for (int i = 0; i < width; i++) row[i] = other[i] + row[i];
      store_row(row, residual, dtype, r * width, width);
      round_row(row, dtype, width);
    }
    norm_row(row, weight, width, eps, dtype);
    store_row(row, y, dtype, r * width, width);
  }
}

// exp(x) = 2^n * p(f): a polynomial of degree 6, relative error about 2e-7
KVRT_PART float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float shift = 12582912.0f, n = (x * 1.44269504f + shift) - shift;
  const float f = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  return p * float_of(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

KVRT_CLONES
void silu_mul_rows(void *y, const void *x, int64_t first, int64_t last, int width, int dtype, float *gate, float *up) {
  for (int64_t r = first; r < last; r++) {
    load_row(x, dtype, 2 * r * width, width, gate);
    load_row(x, dtype, (2 * r + 1) * width, width, up);
    for (int i = 0; i < width; i++) gate[i] = gate[i] / (1.0f + exp_of(-gate[i])) * up[i];
    store_row(gate, y, dtype, r * width, width);
  }
}

struct RopeJob {
  void *qkv;
  const int32_t *positions;
  const float *rope;
  float q_norm[KV_MAX_HEAD_DIM], k_norm[KV_MAX_HEAD_DIM];
  bool norms_q, norms_k;
  float eps;
  int num_heads, num_kv_heads, head_dim, dtype;
};

KVRT_CLONES
void rope_rows(const RopeJob &job, int64_t first, int64_t last) {
  const int d = job.head_dim, half = d / 2, heads = job.num_heads + 2 * job.num_kv_heads;
  float x[KV_MAX_HEAD_DIM], out[KV_MAX_HEAD_DIM];
  for (int64_t r = first; r < last; r++) {
    const float *cos = job.rope + static_cast<int64_t>(job.positions[r]) * d, *sin = cos + half;
    for (int h = 0; h < job.num_heads + job.num_kv_heads; h++) {
      const int64_t at = (r * heads + h) * d;
      const bool query = h < job.num_heads;
      load_row(job.qkv, job.dtype, at, d, x);
      if (query ? job.norms_q : job.norms_k) {
        norm_row(x, query ? job.q_norm : job.k_norm, d, job.eps, job.dtype);
        round_row(x, job.dtype, d);
      }
      for (int i = 0; i < half; i++) {
        out[i] = x[i] * cos[i] - x[i + half] * sin[i];
        out[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
      }
      store_row(out, job.qkv, job.dtype, at, d);
    }
  }
}

}  // namespace
}  // namespace kvrt

using namespace kvrt;

extern "C" {

int kvrt_hadamard(float *out, const float *x, int64_t rows, int32_t head_dim, const kvrt_exec *exec) {
  if (rows < 0 || head_dim < 1 || (rows && (!out || !x))) return KVRT_INVALID;
  if (head_dim % 8 || head_dim > KV_MAX_HEAD_DIM) return KVRT_UNSUPPORTED;
  const PageOps &ops = current_ops();
  over_rows(rows, threads_for(exec, rows, static_cast<double>(rows) * head_dim), [&](int64_t first, int64_t last) {
    float *to = out + first * head_dim;
    const size_t bytes = sizeof(float) * static_cast<size_t>((last - first) * head_dim);
    if (out != x) std::memmove(to, x + first * head_dim, bytes);
    ops.hadamard(to, last - first, head_dim);
  });
  return KVRT_OK;
}

int kvrt_rms_norm(void *y, const void *x, void *residual, const void *weight, int64_t rows, int32_t width, float eps,
                  int32_t dtype, const kvrt_exec *exec) {
  if (!is_dtype(dtype) || rows < 0 || width < 1 || !weight || (rows && (!x || !y))) return KVRT_INVALID;
  const int threads = threads_for(exec, rows, static_cast<double>(rows) * width * 4);
  const Scratch weights(width, 1), scratch(2 * static_cast<int64_t>(width), threads);
  if (!weights.data() || !scratch.data()) return KVRT_NO_MEMORY;
  load_row(weight, dtype, 0, width, weights.data());
  over_rows(rows, threads, [&](int64_t first, int64_t last) {
    float *row = scratch.mine();
    norm_rows(y, x, residual, weights.data(), first, last, width, eps, dtype, row, row + width);
  });
  return KVRT_OK;
}

int kvrt_rope(void *qkv, const int32_t *positions, const float *rope, int64_t rope_positions, const void *q_norm,
              const void *k_norm, float eps, int64_t rows, int32_t num_heads, int32_t num_kv_heads, int32_t head_dim,
              int32_t dtype, const kvrt_exec *exec) {
  if (!is_dtype(dtype) || rows < 0 || num_heads < 0 || num_kv_heads < 0 || head_dim < 2 || head_dim % 2)
    return KVRT_INVALID;
  if (head_dim > KV_MAX_HEAD_DIM) return KVRT_UNSUPPORTED;
  if (rows && (!qkv || !positions || !rope)) return KVRT_INVALID;
  for (int64_t r = 0; r < rows; r++)
    if (positions[r] < 0 || positions[r] >= rope_positions) return KVRT_INVALID;
  RopeJob job;
  job.qkv = qkv, job.positions = positions, job.rope = rope, job.eps = eps;
  job.norms_q = q_norm, job.norms_k = k_norm;
  job.num_heads = num_heads, job.num_kv_heads = num_kv_heads, job.head_dim = head_dim, job.dtype = dtype;
  if (q_norm) load_row(q_norm, dtype, 0, head_dim, job.q_norm);
  if (k_norm) load_row(k_norm, dtype, 0, head_dim, job.k_norm);
  const double work = static_cast<double>(rows) * (num_heads + num_kv_heads) * head_dim * 4;
  over_rows(rows, threads_for(exec, rows, work), [&](int64_t first, int64_t last) { rope_rows(job, first, last); });
  return KVRT_OK;
}

int kvrt_silu_mul(void *y, const void *x, int64_t rows, int32_t width, int32_t dtype, const kvrt_exec *exec) {
  if (!is_dtype(dtype) || rows < 0 || width < 1 || (rows && (!x || !y))) return KVRT_INVALID;
  const int threads = threads_for(exec, rows, static_cast<double>(rows) * width * 10);
  const Scratch scratch(2 * static_cast<int64_t>(width), threads);
  if (!scratch.data()) return KVRT_NO_MEMORY;
  over_rows(rows, threads, [&](int64_t first, int64_t last) {
    float *row = scratch.mine();
    silu_mul_rows(y, x, first, last, width, dtype, row, row + width);
  });
  return KVRT_OK;
}

}  // extern "C"
