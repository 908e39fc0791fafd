// The three steps of kvrt_attend; attend.cpp checks the arguments and runs them.
#include "attend_call.h"

#include <cmath>
#include <limits>

namespace kvrt {

static constexpr float kNothing = -std::numeric_limits<float>::infinity();

int64_t Call::work_floats() const {
  return layer.num_kv_heads * (prepared_bytes(group) / 4 + 2 * group * (d + half)) + group * kChunk + layer.block_size * d +
         static_cast<int64_t>(group) * d;
}

Work Call::work_at(float *x) const {
  Work w;
  w.per_head = 2 * group * (d + half);
  w.per_prepared = prepared_bytes(group);
  w.prepared = reinterpret_cast<uint8_t *>(x);
  x += layer.num_kv_heads * w.per_prepared / 4;
  w.query = x;
  w.turned = w.query + group * d;
  w.a = w.turned + group * d;
  w.b = w.a + group * half;
  x += layer.num_kv_heads * w.per_head;
  w.scores = x, x += group * kChunk;
  w.keys = x, x += layer.block_size * d;
  w.sums = x;
  return w;
}

Span Call::span(const View &view) const {
  Span s;
  s.n = view.length() + 1;
  s.masked = args.cache.positions && layer.window > 0;
  const int64_t first = s.masked ? 0 : kv_first_visible(&layer, s.n), boundary = kv_boundary(&layer, s.n);
  const bool packed = args.parts & KVRT_PACKED, exact = args.parts & KVRT_EXACT;
  const int64_t sinks = layer.sink_tokens;
  s.sinks_end = exact ? std::min(sinks, boundary) : 0;
  s.sinks_begin = std::min(first, s.sinks_end);
  s.packed_end = packed ? boundary : 0;
  s.packed_begin = std::min(std::max(first, sinks), s.packed_end);
  s.tail_begin = exact ? std::max(first, boundary) : s.n;
  return s;
}

bool Call::sees(const View &view, int64_t slot) const {
  const int64_t query = args.query_positions ? args.query_positions[view.seq] : view.length();
  return view.position(slot) > query - layer.window;
}

bool Call::sees_some(const View &view, const Span &span, int64_t first, int64_t last) const {
  if (!span.masked) return first < last;
  for (int64_t t = first; t < last; t++)
    if (sees(view, t)) return true;
  return false;
}

void Call::cut(const Span &span, int64_t unit, int64_t *from, int64_t *to) const {
  const int64_t block = layer.block_size;
  const int64_t first = span.packed_begin / block, last = (span.packed_end + block - 1) / block;
  if (args.split_pages > 0) {  // by absolute pages: what a unit sums never depends on how many there are
    *from = std::max(first, unit * args.split_pages);
    *to = std::min(last, (unit + 1) * args.split_pages);
  } else {
    const int64_t packed_units = units - 1;
    *from = first + (last - first) * unit / packed_units;
    *to = first + (last - first) * (unit + 1) / packed_units;
  }
  if (span.packed_begin >= span.packed_end) *to = *from;
}

void Call::load_query(const View &view, const Work &w) const {
  for (int g = 0; g < group; g++) {
    float *q = w.query + g * d;
    load_row(args.q, args.dtype,
             view.seq * args.q_row_stride + (static_cast<int64_t>(view.head) * group + g) * args.q_head_stride, d, q);
    for (int i = 0; i < d; i++) q[i] *= layer.softmax_scale;
  }
}

// scores of tokens first ... last - 1 of a run of pages that begins with `page`
void Call::score_run(const View &view, int64_t page, const uint8_t *const *slices, int first, int last,
                     const Work &w) const {
  const int block = layer.block_size;
  if (kv_is_exact(&layer.k) || decoded) {
    for (int begin = first / block * block; begin < last; begin += block) {
      fetch_ahead(slices, begin / block, block, at.k_codes, at.v_codes);
      score_page(view, page + begin / block, slices[begin / block], std::max(first - begin, 0),
                 std::min(last - begin, block), w, w.scores + begin);
    }
    return;
  }
  ops.score_pages(layer, at, slices, w.turned, w.prepared, group, first, last, w.scores, kChunk);
  if (!means) return;
  ops.add_mean_scores(w.a, w.b, rope_row(view, page * block), steps, half, group, first, last, w.scores, kChunk);
}

// the same for one page whose keys are exact, or have to be decoded first
void Call::score_page(const View &view, int64_t page, const uint8_t *slice, int first, int last, const Work &w,
                      float *scores) const {
  if (kv_is_exact(&layer.k)) {
    const int dtype = exact_page_dtype(layer, layer.k);
    ops.score_rows(slice + at.k_codes + first * d * dtype_bytes(dtype), dtype, d, last - first, d, w.query, group,
                   scores + first, kChunk);
    return;
  }
  decode_keys(ops, view, at, page, first, last, false, w.keys);
  ops.score_rows(w.keys, KV_F32, d, last - first, d, w.query, group, scores + first, kChunk);
}

// soft cap, mask, and a copy for the caller; column c is slot + c
void Call::finish(const View &view, const Span &span, int64_t slot, int from, int to, float *scores) const {
  for (int g = 0; g < group; g++) {
    float *x = scores + g * kChunk;
    if (layer.softcap > 0)
      for (int c = from; c < to; c++) x[c] = layer.softcap * std::tanh(x[c] / layer.softcap);
    if (span.masked)
      for (int c = from; c < to; c++)
        if (!sees(view, slot + c)) x[c] = kNothing;
    if (mass)
      std::memcpy(mass_row(view.seq, view.head * group + g) + slot + from, x + from,
                  sizeof(float) * static_cast<size_t>(to - from));
  }
}

// Turn scores into weights against the running maximum, and rescale what was summed against a smaller one.
void Call::absorb(float *scores, int from, int to, float *state) const {
  float *max = state + group * d, *sum = max + group;
  for (int g = 0; g < group; g++) {
    float *x = scores + g * kChunk + from;
    const float here = ops.max_of(x, to - from);
    if (here == kNothing) {
      for (int c = 0; c < to - from; c++) x[c] = 0.0f;
      continue;
    }
    if (here > max[g]) {
      const float shrink = std::exp(max[g] - here);
      sum[g] *= shrink;
      for (int i = 0; i < d; i++) state[g * d + i] *= shrink;
      max[g] = here;
    }
    sum[g] += ops.exp_sum(x, to - from, max[g]);
  }
}

// One run of pages that begins with page p, of the unit that ends before page `to`.
void Call::run_pages(const View &view, const Span &span, int64_t p, int64_t to, const Work &w, float *state) const {
  const int64_t block = layer.block_size, step = pages_of_run(span), slot = p * block, stop = std::min(p + step, to);
  const int begin = static_cast<int>(std::max(span.packed_begin, slot) - slot);
  const int end = static_cast<int>(std::min(span.packed_end, stop * block) - slot);
  if (!sees_some(view, span, slot + begin, slot + end)) {
    for (int g = 0; g < group && mass; g++)
      std::fill_n(mass_row(view.seq, view.head * group + g) + slot + begin, end - begin, kNothing);
    return;
  }
  const uint8_t *slices[2 * (kChunk / 16)];  // of this run and of the next
  for (int64_t i = 0; i < 2 * (kChunk / block); i++) {
    const int64_t page = i < kChunk / block ? p + i : p + step + i - kChunk / block;
    const bool there = i < kChunk / block ? page < stop : page < to && view.has_page(page);
    slices[i] = there ? view.slice(page, at) : nullptr;
  }
  score_run(view, p, slices, begin, end, w);
  finish(view, span, slot, begin, end, w.scores);
  absorb(w.scores, begin, end, state);
  if (!kv_is_exact(&layer.v)) {
    ops.accumulate_pages(layer, at, slices, w.scores, kChunk, group, begin, end, state);
    return;
  }
  const int dtype = exact_page_dtype(layer, layer.v);
  for (int64_t i = p; i < stop; i++) {
    const int column = static_cast<int>((i - p) * block);
    const int first = std::max(begin - column, 0), last = static_cast<int>(std::min<int64_t>(end - column, block));
    fetch_ahead(slices, static_cast<int>(i - p), static_cast<int>(block), at.v_codes, at.head_bytes);
    ops.accumulate_rows(slices[i - p] + at.v_codes + first * d * dtype_bytes(dtype), dtype, d, last - first, d,
                        w.scores + column + first, kChunk, group, state);
  }
}

void Call::run_rows(const View &view, const Span &span, bool sinks, const Work &w, float *state) const {
  const int64_t entries = sinks ? layer.sink_tokens : layer.tail_tokens;
  const int64_t end = sinks ? span.sinks_end : span.n;
  const char *pool = static_cast<const char *>(sinks ? args.cache.sinks : args.cache.tail);
  const int64_t bytes = dtype_bytes(layer.exact_dtype);
  for (int64_t t = sinks ? span.sinks_begin : span.tail_begin; t < end;) {
    const int64_t entry = sinks ? t : t % entries;
    const int count = static_cast<int>(std::min({end - t, entries - entry, static_cast<int64_t>(kChunk)}));
    if (sees_some(view, span, t, t + count)) {
      const int pooled = static_cast<int>(entries);
      ops.score_rows(pool + view.exact_row(pooled, 0, entry) * bytes, layer.exact_dtype, d, count, d, w.query, group,
                     w.scores, kChunk);
      finish(view, span, t, 0, count, w.scores);
      absorb(w.scores, 0, count, state);
      ops.accumulate_rows(pool + view.exact_row(pooled, 1, entry) * bytes, layer.exact_dtype, d, count, d, w.scores,
                          kChunk, group, state);
    } else if (mass) {
      for (int g = 0; g < group; g++)
        std::fill_n(mass_row(view.seq, view.head * group + g) + t, count, kNothing);
    }
    t += count;
  }
}

// The query as codes meet it: turned, and what it has to do with the keys' mean.
void Call::prepare(const View &view, const Work &w) const {
  load_query(view, w);
  std::memcpy(w.turned, w.query, sizeof(float) * static_cast<size_t>(group * d));
  if (rotated(layer.k)) ops.hadamard(w.turned, group, d);
  ops.prepare_query(layer, w.turned, group, w.prepared);
  if (!means) return;
  const float *mean = k_mean(layer, view.head), *cos = steps + 2 * kSteps * half, *sin = cos + half;
  for (int g = 0; g < group; g++)
    for (int i = 0; i < half; i++) {
      const float *q = w.query + g * d;
      const float a = q[i] * mean[i] + q[i + half] * mean[i + half];
      const float b = q[i + half] * mean[i] - q[i] * mean[i + half];
      w.a[g * half + i] = a * cos[i] + b * sin[i];  // in the middle of a run
      w.b[g * half + i] = b * cos[i] - a * sin[i];
    }
}

void Call::run_unit(int seq, int64_t unit, const Work &work) const {
  const bool exact = unit == units - 1;
  int64_t longest = 0;
  for (int head = 0; head < layer.num_kv_heads; head++) {
    const View view{layer, args.cache, seq, head};
    float *out = state(seq, head, unit);
    std::fill_n(out, group * d, 0.0f);
    std::fill_n(out + group * d, group, kNothing);
    std::fill_n(out + group * d + group, group, 0.0f);
    const Span s = span(view);
    const Work w = work.of(head);
    if (exact && (s.sinks_begin < s.sinks_end || s.tail_begin < s.n)) {
      load_query(view, w);
      run_rows(view, s, true, w, out);
      run_rows(view, s, false, w, out);
    }
    if (exact) continue;
    int64_t from, to;
    cut(s, unit, &from, &to);
    if (from < to) prepare(view, w);
    longest = std::max(longest, (to - from + pages_of_run(s) - 1) / pages_of_run(s));
  }
  for (int64_t run = 0; run < longest; run++)
    for (int head = 0; head < layer.num_kv_heads; head++) {
      const View view{layer, args.cache, seq, head};
      const Span s = span(view);
      int64_t from, to;
      cut(s, unit, &from, &to);
      from += run * pages_of_run(s);
      if (from < to) run_pages(view, s, from, to, work.of(head), state(seq, head, unit));
    }
}

void Call::merge(const View &view, const Work &w) const {
  const Span s = span(view);
  const float *mean = v_mean(layer, view.head);
  const float *exact = state(view.seq, view.head, units - 1);
  for (int g = 0; g < group; g++) {
    const int query_head = view.head * group + g;
    const int64_t index = static_cast<int64_t>(view.seq) * layer.num_heads + query_head;
    float max = kNothing;
    for (int64_t u = 0; u < units; u++) max = std::max(max, state(view.seq, view.head, u)[group * d + g]);

    float packed = 0.0f, total = 0.0f, *sum = w.sums;
    std::fill_n(sum, d, 0.0f);
    for (int64_t u = 0; u < units - 1; u++) {
      const float *x = state(view.seq, view.head, u);
      if (x[group * d + g] == kNothing) continue;
      const float weight = std::exp(x[group * d + g] - max);
      packed += weight * x[group * d + group + g];
      for (int i = 0; i < d; i++) sum[i] += weight * x[g * d + i];
    }
    if (packed > 0 && rotated(layer.v)) ops.hadamard(sum, 1, d);
    if (mean)
      for (int i = 0; i < d; i++) sum[i] += packed * mean[i];
    total = packed;
    if (exact[group * d + g] != kNothing) {
      const float weight = std::exp(exact[group * d + g] - max);
      total += weight * exact[group * d + group + g];
      for (int i = 0; i < d; i++) sum[i] += weight * exact[g * d + i];
    }
    const bool any = max != kNothing;
    const float inverse = any ? 1.0f / total : 0.0f, lse = any ? max + std::log(total) : kNothing;
    for (int i = 0; i < d; i++) sum[i] *= inverse;
    if (rows)
      std::memcpy(rows + index * d, sum, sizeof(float) * static_cast<size_t>(d));
    else
      store_row(sum, args.out, args.dtype, view.seq * args.out_row_stride + query_head * args.out_head_stride, d);
    if (args.lse) args.lse[index] = lse;
    if (args.packed_mass) args.packed_mass[index] = packed * inverse;
    if (key_mass) key_mass[index] = packed * inverse;
    if (!mass) continue;
    float *row = mass_row(view.seq, query_head);
    const int64_t seen[][2] = {{s.sinks_begin, s.sinks_end}, {s.packed_begin, s.packed_end}, {s.tail_begin, s.n}};
    int64_t done = 0;
    for (const auto &[from, to] : seen) {
      if (from >= to || !any) continue;
      std::fill(row + done, row + from, 0.0f);
      ops.exp_sum(row + from, static_cast<int>(to - from), lse);
      done = to;
    }
    std::fill(row + done, row + mass_stride, 0.0f);
  }
}

// Sums of one part of a head's keys for all query heads. Rotation, mean and the stretch of the table are linear in keys:
// they come in once, in finish_keys.
void Call::sum_keys(const View &view, int64_t part, const Work &w) const {
  const int heads = layer.num_heads, kv_heads = layer.num_kv_heads, block = layer.block_size;
  const Span own = span(view);
  float *sums = key_part(view, part);
  std::fill_n(sums, static_cast<int64_t>(heads) * d, 0.0f);
  if (own.packed_begin >= own.packed_end) return;
  const int64_t first_page = own.packed_begin / block, pages = (own.packed_end + block - 1) / block - first_page;
  const int64_t stop_page = first_page + pages * (part + 1) / parts;
  int64_t slot = std::max(own.packed_begin, (first_page + pages * part / parts) * block);
  for (const int64_t end = std::min(own.packed_end, stop_page * block); slot < end;) {
    const int64_t page = slot / block, stop = std::min(end, (page + 1) * block);
    if (sees_some(view, own, slot, stop)) {
      decode_for_sum(view, page, static_cast<int>(slot - page * block), static_cast<int>(stop - page * block), w.keys);
      for (int h = 0; h < kv_heads; h++) {
        // heads may be of unequal length where each has a list of its own
        const Span theirs = span(View{layer, args.cache, view.seq, h});
        const int64_t from = std::max(slot, theirs.packed_begin), to = std::min(stop, theirs.packed_end);
        if (from >= to) continue;
        ops.accumulate_rows(w.keys + (from - slot) * d, KV_F32, d, static_cast<int>(to - from), d,
                            mass_row(view.seq, h * group) + from, static_cast<int>(mass_stride), group,
                            sums + static_cast<int64_t>(h) * group * d);
      }
    }
    slot = stop;
  }
}

// Keys of a page as they are summed: as stored if that is before RoPE, else turned back.
void Call::decode_for_sum(const View &view, int64_t page, int first, int last, float *out) const {
  const uint8_t *slice = view.slice(page, at);
  ops.dequantize(layer.k, slice + at.k_codes, slice + at.k_scales, slice + at.k_zeros, layer.page_dtype, d,
                 layer.block_size, first, last, out);
  if (coded_before_rope(layer)) return;
  const int count = last - first;
  const int64_t slot = page * layer.block_size + first;
  if (rotated(layer.k)) ops.hadamard(out, count, d);
  if (!args.cache.positions) return turn_back(out, rope_row(view, slot), count, d);
  for (int t = 0; t < count; t++) turn_back(out + static_cast<int64_t>(t) * d, rope_row(view, slot + t), 1, d);
}

void Call::finish_keys(const View &view, const Work &w) const {
  const bool before = coded_before_rope(layer);
  // the table's rows are all stretched alike
  const float *row = layer.rope, stretch = before ? 1.0f : row[0] * row[0] + row[half] * row[half];
  const float *mean = k_mean(layer, view.head);
  for (int q = 0; q < layer.num_heads; q++) {
    const int64_t index = static_cast<int64_t>(view.seq) * layer.num_heads + q;
    float *sum = w.sums;
    std::fill_n(sum, d, 0.0f);
    for (int64_t part = 0; part < parts; part++) {
      const float *x = key_part(view, part) + static_cast<int64_t>(q) * d;
      for (int i = 0; i < d; i++) sum[i] += x[i];
    }
    if (before && rotated(layer.k)) ops.hadamard(sum, 1, d);
    for (int i = 0; i < d; i++) sum[i] = sum[i] / stretch + (mean ? key_mass[index] * mean[i] : 0.0f);
    std::memcpy(key_sum + (index * layer.num_kv_heads + view.head) * d, sum, sizeof(float) * static_cast<size_t>(d));
  }
}

void Call::add_predictions(const View &view) const {
  for (int q = view.head * group; q < (view.head + 1) * group; q++) {
    const int64_t index = static_cast<int64_t>(view.seq) * layer.num_heads + q;
    float *out = rows + index * d;
    add_product(layer.v_weight, key_sum + index * kv_width(layer), kv_width(layer), view.head * d, d, out);
    store_row(out, args.out, args.dtype, view.seq * args.out_row_stride + q * args.out_head_stride, d);
  }
}

}  // namespace kvrt
