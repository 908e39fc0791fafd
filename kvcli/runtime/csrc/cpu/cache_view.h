// What append, attend and expand share: which arguments make sense, where a sequence's things lie, threads and scratch.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdlib>

#include "half.h"
#include "kvrt.h"
#include "page_ops.h"

namespace kvrt {

static inline bool is_dtype(int dtype) { return dtype == KV_F32 || dtype == KV_F16 || dtype == KV_BF16; }

static inline bool rotated(const kv_format &f) { return f.hadamard && !kv_is_exact(&f) && f.axis == KV_TOKEN; }

// the means count for coded tensors only
static inline const float *k_mean(const kv_layer &l, int head) {
  return kv_is_exact(&l.k) || !l.k_mean ? nullptr : l.k_mean + static_cast<int64_t>(head) * l.head_dim;
}
static inline const float *v_mean(const kv_layer &l, int head) {
  return kv_is_exact(&l.v) || !l.v_mean ? nullptr : l.v_mean + static_cast<int64_t>(head) * l.head_dim;
}
static inline bool coded_before_rope(const kv_layer &l) { return l.rope_before && !kv_is_exact(&l.k); }
// keys as predictors of values see them lie before RoPE
static inline bool turns_for_values(const kv_layer &l) { return l.v_weight && !coded_before_rope(l); }
static inline int exact_page_dtype(const kv_layer &l, const kv_format &f) {
  return f.bits == 32 ? KV_F32 : l.page_dtype;
}

static inline int check_format(const kv_format &f, int head_dim, int block_size) {
  if (kv_is_exact(&f)) return f.bits == 16 || f.bits == 32 ? KVRT_OK : KVRT_INVALID;
  if (f.bits == 1) return KVRT_UNSUPPORTED;
  if (f.bits != 2 && f.bits != 3 && f.bits != 4 && f.bits != 8) return KVRT_INVALID;
  if (f.axis != KV_TOKEN && f.axis != KV_CHANNEL) return KVRT_INVALID;
  if (f.group < 1 || (f.axis == KV_TOKEN ? head_dim : block_size) % f.group) return KVRT_INVALID;
  if (f.scale_dtype != KV_SCALE_F16 && f.scale_dtype != KV_SCALE_E5M3) return KVRT_INVALID;
  if (f.table && !f.symmetric) return KVRT_INVALID;
  return f.table && f.bits > 4 ? KVRT_UNSUPPORTED : KVRT_OK;
}

static inline int check_layer(const kv_layer *l) {
  if (!l || l->num_kv_heads < 1 || l->head_dim < 1 || l->num_heads < 1) return KVRT_INVALID;
  if (l->num_heads % l->num_kv_heads) return KVRT_INVALID;
  if (l->head_dim % 8 || l->head_dim > KV_MAX_HEAD_DIM || l->num_heads / l->num_kv_heads > 64) return KVRT_UNSUPPORTED;
  if (l->block_size != 16 && l->block_size != 32 && l->block_size != 64 && l->block_size != 128) return KVRT_INVALID;
  if (!is_dtype(l->exact_dtype) || (l->page_dtype != KV_F16 && l->page_dtype != KV_BF16)) return KVRT_INVALID;
  if (l->sink_tokens < 0 || l->residual_window < 0 || l->tail_tokens < 0 || l->window < 0) return KVRT_INVALID;
  int status = check_format(l->k, l->head_dim, l->block_size);
  if (status == KVRT_OK) status = check_format(l->v, l->head_dim, l->block_size);
  if (status != KVRT_OK) return status;
  if (l->portable) {  // tokens are written one by one: no scale may span several, and nothing lies beside the pages
    if (l->sink_tokens || (!kv_is_exact(&l->k) && l->k.axis == KV_CHANNEL)) return KVRT_INVALID;
    if (!kv_is_exact(&l->v) && l->v.axis == KV_CHANNEL) return KVRT_INVALID;
  } else if (l->tail_tokens < l->residual_window + l->block_size - 1) {
    return KVRT_INVALID;
  }
  const bool turns = !kv_is_exact(&l->k) && (l->rope_before || l->k_mean);
  if (l->v_weight && kv_is_exact(&l->v)) return KVRT_INVALID;
  return (turns || turns_for_values(*l)) && !l->rope ? KVRT_INVALID : KVRT_OK;
}

static inline int check_cache(const kv_layer &l, const kvrt_cache &c, bool needs_lengths) {
  if (c.num_seqs < 0 || c.max_pages < 0) return KVRT_INVALID;
  // values are predicted from the keys of all heads in a slot
  if (l.v_weight && (c.block_table_head_stride || c.length_head_stride)) return KVRT_UNSUPPORTED;
  if (c.num_seqs && (!c.block_tables || (needs_lengths && !c.lengths))) return KVRT_INVALID;
  if (c.num_seqs && needs_lengths && ((l.sink_tokens && !c.sinks) || (!l.portable && l.tail_tokens && !c.tail)))
    return KVRT_INVALID;
  return KVRT_OK;
}

// One kv head of one sequence.
struct View {
  const kv_layer &layer;
  const kvrt_cache &cache;
  int seq, head;

  int64_t length() const { return cache.lengths[seq * cache.length_stride + head * cache.length_head_stride]; }
  const int32_t *table() const {
    return cache.block_tables + seq * cache.block_table_stride + head * cache.block_table_head_stride;
  }
  const int32_t *positions() const {
    return cache.positions ? cache.positions + seq * cache.position_stride : nullptr;
  }
  bool has_page(int64_t page) const { return page < cache.max_pages && table()[page] >= 0 && cache.pages; }
  uint8_t *slice(int64_t page, const kv_page_layout &at) const {
    return cache.pages + (static_cast<int64_t>(table()[page]) * layer.num_kv_heads + head) * at.head_bytes;
  }
  int64_t position(int64_t slot) const { return cache.positions ? positions()[slot] : slot; }
  // the first value of an entry of the sinks or the tail, counted in values
  int64_t exact_row(int tokens, int which, int64_t entry) const {
    const int64_t row = cache.slots ? cache.slots[seq] : seq;
    return (((row * 2 + which) * layer.num_kv_heads + head) * tokens + entry) * layer.head_dim;
  }
};

// rows of the rotary table that the slots [first, last) need exist
static inline bool rope_reaches(const View &view, int64_t first, int64_t last) {
  const int64_t rows = view.layer.rope_positions;
  if (first >= last) return true;
  if (!view.cache.positions) return last <= rows;
  const int32_t *at = view.positions();
  for (int64_t t = first; t < last; t++)
    if (at[t] < 0 || at[t] >= rows) return false;
  return true;
}

static inline int threads_for(const kvrt_exec *exec, int64_t items, double work) {
  if (work < 200e3 || items < 2) return 1;  // waking a team costs more than this many operations
  const int wanted = exec && exec->threads > 0 ? exec->threads : omp_get_max_threads();
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, items)));
}

// Call body(first, last) on equal runs of rows, one a thread.
template <typename Body>
static void over_rows(int64_t rows, int threads, const Body &body) {
  if (threads == 1) {
    body(int64_t{0}, rows);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
    body(rows * me / team, rows * (me + 1) / team);
  }
}

// Uninitialised floats for the length of a call; null data when there is no memory.
class Scratch {
 public:
  Scratch(int64_t per_thread, int threads) : stride_((per_thread + 15) / 16 * 16) {
    const size_t bytes = sizeof(float) * static_cast<size_t>(stride_) * static_cast<size_t>(threads);
    data_ = static_cast<float *>(std::aligned_alloc(64, bytes ? bytes : 64));
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  float *data() const { return data_; }
  float *mine() const { return data_ + stride_ * omp_get_thread_num(); }

 private:
  int64_t stride_;
  float *data_;
};

}  // namespace kvrt
