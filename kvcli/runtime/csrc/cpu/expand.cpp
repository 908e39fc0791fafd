// kvrt_expand: pages to dense keys and values.
#include <new>

#include "predict.h"

namespace kvrt {
namespace {

int expand(const kv_layer *layer, const kvrt_expand_args *args, const kvrt_exec *exec) {
  if (!args) return KVRT_INVALID;
  int status = check_layer(layer);
  if (status != KVRT_OK) return status;
  const kv_layer &l = *layer;
  const kvrt_cache &cache = args->cache;
  status = check_cache(l, cache, false);
  if (status != KVRT_OK) return status;
  if (!is_dtype(args->dtype) || args->sequence < 0 || args->sequence >= cache.num_seqs) return KVRT_INVALID;
  if (args->first < 0 || args->count < 0 || (args->with_sinks && args->keys_before_rope)) return KVRT_INVALID;
  if (args->with_sinks && l.sink_tokens && !cache.sinks) return KVRT_INVALID;
  if (!args->count || (!args->k && !args->v)) return KVRT_OK;

  const int64_t block = l.block_size, begin = args->first, end = begin + args->count;
  const int64_t first_page = begin / block, pages = (end + block - 1) / block - first_page;
  // RoPE comes in where the stored side of it is not the wanted one, and with the mean of keys after it
  const bool predicts = args->v && l.v_weight;
  const bool turns =
      (args->k && (coded_before_rope(l) ? !args->keys_before_rope : args->keys_before_rope || k_mean(l, 0))) ||
      (predicts && turns_for_values(l));
  if (turns && !l.rope) return KVRT_INVALID;
  for (int h = 0; h < l.num_kv_heads; h++) {
    const View view{l, cache, args->sequence, h};
    for (int64_t p = first_page; p < first_page + pages; p++)
      if (!view.has_page(p)) return KVRT_INVALID;
    if (turns && !rope_reaches(view, begin, end)) return KVRT_INVALID;
  }

  const PageOps &ops = current_ops();
  const kv_page_layout at = kv_layout_of(layer);
  const int d = l.head_dim;
  const auto write = [&](const View &view, int64_t page, int first, int last, Offset offset, float *x) {
    for (int key = 1; key >= 0; key--) {
      void *out = key ? args->k : args->v;
      if (!out) continue;
      if (key)
        decode_keys(ops, view, at, page, first, last, args->keys_before_rope != 0, x);
      else
        decode_values(ops, view, at, page, first, last, offset, x);
      for (int t = first; t < last; t++) {
        const int64_t slot = page * block + t;
        float *row = x + static_cast<int64_t>(t - first) * d;
        if (args->with_sinks && slot < l.sink_tokens)
          load_row(cache.sinks, l.exact_dtype, view.exact_row(l.sink_tokens, !key, slot), d, row);
        const int64_t to = key ? view.head * args->k_head_stride + (slot - begin) * args->k_row_stride
                               : view.head * args->v_head_stride + (slot - begin) * args->v_row_stride;
        store_row(row, out, args->dtype, to, d);
      }
    }
  };

  // a prediction is of all heads, which are one job then
  const int64_t width = kv_width(l), jobs = predicts ? pages : pages * l.num_kv_heads;
  const double work = static_cast<double>(args->count * width * (predicts ? 10 + width : 10));
  const int threads = threads_for(exec, jobs, work);
  const Scratch scratch(block * d + predict_floats(l), threads);
  if (!scratch.data()) return KVRT_NO_MEMORY;

#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t i = 0; i < jobs; i++) {
    float *x = scratch.mine(), *room = x + block * d, *predicted = room + block * (width + d);
    const int64_t page = first_page + i % pages;
    const int first = static_cast<int>(std::max(begin - page * block, int64_t{0}));
    const int last = static_cast<int>(std::min(end - page * block, block));
    const View view{l, cache, args->sequence, static_cast<int>(i / pages)};
    if (!predicts) {
      write(view, page, first, last, {v_mean(l, view.head), 0}, x);
      continue;
    }
    predict_values(ops, view, at, page, first, last, room, predicted);
    for (int h = 0; h < l.num_kv_heads; h++)
      write(View{l, cache, args->sequence, h}, page, first, last, {predicted + h * d, width}, x);
  }
  return KVRT_OK;
}

}  // namespace
}  // namespace kvrt

extern "C" int kvrt_expand(const kv_layer *layer, const kvrt_expand_args *args, const kvrt_exec *exec) {
  try {
    return kvrt::expand(layer, args, exec);
  } catch (const std::bad_alloc &) {
    return KVRT_NO_MEMORY;
  }
}
