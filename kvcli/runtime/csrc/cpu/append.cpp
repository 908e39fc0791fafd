// kvrt_append: pack the tokens that leave the exact window, keep the others in the tail, and fill the sinks.
#include <new>

#include "encode.h"
#include "predict.h"

namespace kvrt {
namespace {

struct Append {
  const kv_layer &layer;
  const kvrt_append_args &args;
  const PageOps &ops;
  kv_page_layout at;

  int64_t rows(int s) const { return args.starts ? args.starts[s + 1] - args.starts[s] : 1; }
  int64_t first_row(int s) const { return args.starts ? args.starts[s] : s; }

  // a new row, or one of the tail, as float32 values of the exact dtype
  void fetch(const View &view, bool key, int64_t slot, float *out) const {
    const int d = layer.head_dim;
    const int64_t held = view.length();
    if (slot < held) {
      load_row(args.cache.tail, layer.exact_dtype, view.exact_row(layer.tail_tokens, !key, slot % layer.tail_tokens), d,
               out);
      return;
    }
    const int64_t row = first_row(view.seq) + slot - held;
    load_row(key ? args.k : args.v, args.dtype,
             key ? row * args.k_row_stride + view.head * args.k_head_stride
                 : row * args.v_row_stride + view.head * args.v_head_stride,
             d, out);
    if (args.dtype != layer.exact_dtype) round_row(out, layer.exact_dtype, d);
  }

  // A sliding layer's pages may be used in turn, so that a long prompt writes one more than once: the last one counts.
  bool overwritten(const View &view, int64_t page, int64_t last) const {
    if (!layer.window) return false;
    const int32_t *table = view.table();
    for (int64_t p = page + 1; p < last; p++)
      if (table[p] == table[page]) return true;
    return false;
  }

  // the caller's predictions for slots from `first` on, or the mean
  Offset offset(const View &view, bool key, int64_t first) const {
    const float *given = key ? args.k_predicted : args.v_predicted;
    if (!given) return {key ? k_mean(layer, view.head) : v_mean(layer, view.head), 0};
    const int64_t width = kv_width(layer);
    return {given + (first - kv_boundary(&layer, view.length())) * width + view.head * layer.head_dim, width};
  }

  // values of all heads from what their keys tell, slots first ... last - 1, all of one page
  void pack_predicted(const View &any, int64_t first, int64_t last, float *x, float *room) const {
    const int64_t page = first / layer.block_size, begin = page * layer.block_size, width = kv_width(layer);
    float *predicted = room + layer.block_size * (width + layer.head_dim);
    predict_values(ops, any, at, page, static_cast<int>(first - begin), static_cast<int>(last - begin), room, predicted);
    for (int h = 0; h < layer.num_kv_heads; h++)
      pack(View{layer, args.cache, any.seq, h}, false, first, last, {predicted + h * layer.head_dim, width}, x);
  }

  // slots first ... last - 1, all of one page
  void pack(const View &view, bool key, int64_t first, int64_t last, Offset off, float *x) const {
    const int d = layer.head_dim, count = static_cast<int>(last - first);
    const kv_format &f = key ? layer.k : layer.v;
    for (int t = 0; t < count; t++) fetch(view, key, first + t, x + static_cast<int64_t>(t) * d);

    uint8_t *slice = view.slice(first / layer.block_size, at);
    const int64_t in_page = first % layer.block_size;
    uint8_t *codes = slice + (key ? at.k_codes : at.v_codes) + in_page * kv_row_bytes(&f, d);
    if (kv_is_exact(&f)) {
      store_row(x, codes, exact_page_dtype(layer, f), 0, count * d);
      return;
    }
    if (key)
      keys_to_stored(ops, view, first, count, off, x);
    else
      values_to_stored(ops, view, count, off, x);
    // on the channel axis in_page is 0: only whole pages are written there
    const int64_t group = f.axis == KV_TOKEN ? in_page * d / f.group : 0;
    encode_section(f, x, count, d, codes,
                   slice + (key ? at.k_scales : at.v_scales) + group * (f.scale_dtype == KV_SCALE_E5M3 ? 1 : 2),
                   slice + (key ? at.k_zeros : at.v_zeros) + group * 2);
  }

  // new rows go to the sinks, the tail or both; after pack(), for they may take the place of tokens that left
  void keep(const View &view, float *x) const {
    const int64_t held = view.length(), n = held + rows(view.seq), boundary = kv_boundary(&layer, n);
    const int64_t tail = std::max(held, boundary);
    for (int key = 1; key >= 0; key--) {
      if (!(key ? args.k : args.v)) continue;
      for (int64_t t = held < layer.sink_tokens ? held : tail; t < n; t++) {
        if (t >= layer.sink_tokens && t < tail) {
          t = tail - 1;  // neither a sink nor of the tail
          continue;
        }
        fetch(view, key, t, x);
        if (t < layer.sink_tokens)
          store_row(x, args.cache.sinks, layer.exact_dtype, view.exact_row(layer.sink_tokens, !key, t), layer.head_dim);
        if (t >= tail)
          store_row(x, args.cache.tail, layer.exact_dtype,
                    view.exact_row(layer.tail_tokens, !key, t % layer.tail_tokens), layer.head_dim);
      }
    }
  }
};

// Refuses before anything is written. *pages: most pages any head writes; *values: all that is quantised.
int check(const Append &a, int64_t *pages, double *values) {
  const kv_layer &l = a.layer;
  const kvrt_append_args &args = a.args;
  const kvrt_cache &cache = args.cache;
  const bool turns = coded_before_rope(l) || k_mean(l, 0) || args.k_predicted || turns_for_values(l);
  if ((args.k_predicted || args.v_predicted) && (cache.num_seqs > 1 || l.v_weight)) return KVRT_INVALID;
  if (args.k_predicted && !l.rope) return KVRT_INVALID;
  *pages = 0;
  *values = 0;
  for (int s = 0; s < cache.num_seqs; s++) {
    const int64_t rows = a.rows(s);
    if (rows < 0 || rows > args.max_new) return KVRT_INVALID;
    if (!rows) continue;
    if (!args.k && !args.v) return KVRT_INVALID;
    for (int h = 0; h < l.num_kv_heads; h++) {
      const View view{l, cache, s, h};
      const int64_t held = view.length(), n = held + rows;
      if (held < 0) return KVRT_INVALID;
      const int64_t from = kv_boundary(&l, held), to = kv_boundary(&l, n);
      *values += static_cast<double>(rows + to - from) * l.head_dim;
      if (from == to) continue;
      const int64_t first = from / l.block_size, last = (to + l.block_size - 1) / l.block_size;
      for (int64_t p = first; p < last; p++)
        if (!view.has_page(p)) return KVRT_INVALID;
      if (turns && !rope_reaches(view, from, to)) return KVRT_INVALID;
      *pages = std::max(*pages, last - first);
    }
  }
  return KVRT_OK;
}

int append(const kv_layer *layer, const kvrt_append_args *args, const kvrt_exec *exec) {
  if (!args) return KVRT_INVALID;
  int status = check_layer(layer);
  if (status != KVRT_OK) return status;
  if (!is_dtype(args->dtype)) return KVRT_INVALID;
  status = check_cache(*layer, args->cache, true);
  if (status != KVRT_OK) return status;

  const Append a{*layer, *args, current_ops(), kv_layout_of(layer)};
  int64_t pages;
  double values;
  status = check(a, &pages, &values);
  if (status != KVRT_OK || values == 0) return status;

  const int heads = layer->num_kv_heads, block = layer->block_size;
  const int64_t owners = static_cast<int64_t>(args->cache.num_seqs) * heads, jobs = owners * pages * 2;
  const int threads = threads_for(exec, std::max(jobs, owners), (layer->v_weight ? kv_width(*layer) : 20) * values);
  const int64_t rows_of = static_cast<int64_t>(block) * layer->head_dim;
  Scratch scratch(rows_of + predict_floats(*layer), threads);
  if (!scratch.data()) return KVRT_NO_MEMORY;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float *x = scratch.mine();
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < jobs; i++) {
      const int64_t owner = i / (pages * 2), job = i % (pages * 2);
      const View view{*layer, args->cache, static_cast<int>(owner / heads), static_cast<int>(owner % heads)};
      const int64_t rows = a.rows(view.seq);
      if (!rows) continue;
      const int64_t held = view.length();
      const int64_t from = kv_boundary(layer, held), to = kv_boundary(layer, held + rows);
      const int64_t page = from / block + job / 2;
      const int64_t first = std::max(from, page * block), last = std::min(to, (page + 1) * block);
      const bool key = job % 2 == 0, later = !key && layer->v_weight;
      if (first < last && (key ? args->k : args->v) && !later && !a.overwritten(view, page, (to + block - 1) / block))
        a.pack(view, key, first, last, a.offset(view, key, first), x);
    }
    if (layer->v_weight && args->v) {
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < args->cache.num_seqs * pages; i++) {
        const View view{*layer, args->cache, static_cast<int>(i / pages), 0};
        if (!a.rows(view.seq)) continue;
        const int64_t held = view.length(), from = kv_boundary(layer, held);
        const int64_t to = kv_boundary(layer, held + a.rows(view.seq)), page = from / block + i % pages;
        const int64_t first = std::max(from, page * block), last = std::min(to, (page + 1) * block);
        if (first < last && !a.overwritten(view, page, (to + block - 1) / block))
          a.pack_predicted(view, first, last, x, x + rows_of);
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < owners; i++) {
      const View view{*layer, args->cache, static_cast<int>(i / heads), static_cast<int>(i % heads)};
      if (a.rows(view.seq)) a.keep(view, x);
    }
  }
  return KVRT_OK;
}

}  // namespace
}  // namespace kvrt

extern "C" int kvrt_append(const kv_layer *layer, const kvrt_append_args *args, const kvrt_exec *exec) {
  try {
    return kvrt::append(layer, args, exec);
  } catch (const std::bad_alloc &) {
    return KVRT_NO_MEMORY;
  }
}
