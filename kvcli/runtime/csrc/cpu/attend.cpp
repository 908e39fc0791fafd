// kvrt_attend: checks, memory and threads. What is computed stands in attend_call.cpp.
#include <cmath>
#include <limits>
#include <memory>
#include <new>

#include "attend_call.h"

namespace kvrt {
namespace {

constexpr int64_t kKeyJobs = 16;  // into which summing keys is cut, roughly: enough for some threads to share

// Refuses before anything is written. *most: the longest sequence; *pages: most pages of one; *work: operations.
int check(const Call &c, int64_t *most, int64_t *pages, double *work) {
  const kv_layer &l = c.layer;
  const kvrt_cache &cache = c.args.cache;
  const bool alike = !cache.block_table_head_stride && !cache.length_head_stride;
  *most = *pages = 0;
  *work = 0;
  for (int s = 0; s < cache.num_seqs; s++)
    for (int h = 0; h < (alike ? 1 : l.num_kv_heads); h++) {
      const View view{l, cache, s, h};
      if (view.length() < -1) return KVRT_INVALID;
      const Span span = c.span(view);
      *most = std::max(*most, span.n);
      const int64_t block = l.block_size, last = (span.packed_end + block - 1) / block;
      *pages = std::max(*pages, last);
      const double seen = static_cast<double>(span.packed_end - span.packed_begin + span.n - span.tail_begin);
      *work += seen * l.head_dim * l.num_heads * 2 / (alike ? 1 : l.num_kv_heads);
      if (span.packed_begin >= span.packed_end) continue;
      for (int64_t p = span.packed_begin / block; p < last; p++)
        if (!view.has_page(p) && c.sees_some(view, span, std::max(span.packed_begin, p * block),
                                             std::min(span.packed_end, (p + 1) * block)))
          return KVRT_INVALID;
      const bool turns = c.means || c.decoded || (c.parts && !coded_before_rope(l));
      if (turns && !rope_reaches(view, span.packed_begin, span.packed_end)) return KVRT_INVALID;
      if (c.means && l.rope_positions < 2) return KVRT_INVALID;
    }
  return KVRT_OK;
}

// Cosines and sines of (m + 1/2) theta for m < kSteps, [half][cos, sin][kSteps], from the table's row of position 1; then
// [half] cosines and [half] sines of half a run.
void fill_steps(const kv_layer &l, float *steps) {
  const int half = l.head_dim / 2;
  float *middle = steps + 2 * kSteps * half;
  for (int i = 0; i < half; i++) {
    const float *first = l.rope + l.head_dim;
    const double size = std::hypot(first[i], first[i + half]);  // the table's rows may be stretched
    double c = first[i] / size, s = first[i + half] / size;
    float *x = steps + 2 * kSteps * i, *y = x + kSteps;
    // of theta / 2, which lies in the right half plane for every theta below pi
    const double half_cos = std::sqrt(0.5 * (1 + c)), half_sin = half_cos > 0 ? 0.5 * s / half_cos : 1;
    x[0] = static_cast<float>(half_cos), y[0] = static_cast<float>(half_sin);
    for (int m = 1; m < kSteps; m *= 2) {  // what there is, turned by m theta
      const float turn_c = static_cast<float>(c), turn_s = static_cast<float>(s);
      for (int k = 0; k < m; k++) {
        x[m + k] = x[k] * turn_c - y[k] * turn_s;
        y[m + k] = y[k] * turn_c + x[k] * turn_s;
      }
      const double twice = 2 * c * s;
      c = c * c - s * s, s = twice;
    }
    middle[i] = x[kSteps - 1];
    middle[i + half] = y[kSteps - 1];
  }
}

int attend(const kv_layer *layer, const kvrt_attend_args *args, const kvrt_exec *exec) {
  if (!args) return KVRT_INVALID;
  int status = check_layer(layer);
  if (status != KVRT_OK) return status;
  const kv_layer &l = *layer;
  const kvrt_cache &cache = args->cache;
  if (!is_dtype(args->dtype) || args->parts < 1 || args->parts > KVRT_ALL) return KVRT_INVALID;
  if (args->splits < 1 || args->split_pages < 0) return KVRT_INVALID;
  status = check_cache(l, cache, false);
  if (status != KVRT_OK || !cache.num_seqs) return status;
  if (!args->q || !args->out || !cache.lengths) return KVRT_INVALID;
  if ((args->parts & KVRT_EXACT) && !l.portable && (!cache.tail || (l.sink_tokens && !cache.sinks)))
    return KVRT_INVALID;
  if (args->key_sum && !l.rope && !coded_before_rope(l)) return KVRT_INVALID;
  const int64_t asked = kvrt_attend_workspace(layer, cache.num_seqs, args->splits);
  if (!args->workspace || args->workspace_bytes < asked || reinterpret_cast<uintptr_t>(args->workspace) % 16)
    return KVRT_INVALID;

  Call c{l, *args, current_ops(), kv_layout_of(layer), l.num_heads / l.num_kv_heads, l.head_dim, l.head_dim / 2,
         false, false, nullptr, args->mass, args->mass_stride, nullptr, Call::unit_size(l), 0,
         nullptr, args->key_sum, nullptr, nullptr, 0};
  const int64_t owners = static_cast<int64_t>(cache.num_seqs) * l.num_kv_heads;
  // With split_pages sums are in one order, whatever the batch.
  if (args->key_sum || l.v_weight) c.parts = args->split_pages ? 1 : std::max<int64_t>(1, std::min<int64_t>(args->splits, kKeyJobs / owners));
  c.decoded = coded_before_rope(l) || (k_mean(l, 0) && cache.positions);
  c.means = k_mean(l, 0) && !c.decoded;
  int64_t most, pages;
  double work;
  status = check(c, &most, &pages, &work);
  if (status != KVRT_OK) return status;
  const int64_t widest = std::numeric_limits<int32_t>::max();
  if (args->mass && (args->mass_stride < most || args->mass_stride > widest)) return KVRT_INVALID;

  // With split_pages each unit keeps a state of its own, however many splits the caller made room for.
  c.units = 1 + (args->split_pages ? (pages + args->split_pages - 1) / args->split_pages : args->splits);
  const int64_t jobs = cache.num_seqs * c.units, states = owners * c.units;
  c.states = static_cast<float *>(args->workspace);
  std::unique_ptr<Scratch> own_states, own_mass, own_keys, steps;
  if (states * c.unit_floats * static_cast<int64_t>(sizeof(float)) > args->workspace_bytes) {
    own_states.reset(new Scratch(states * c.unit_floats, 1));
    c.states = own_states->data();
  }
  const int64_t queries = static_cast<int64_t>(cache.num_seqs) * l.num_heads;
  if (c.parts && !args->mass) {
    c.mass_stride = most;
    own_mass.reset(new Scratch(queries * most, 1));
    c.mass = own_mass->data();
  }
  if (c.parts) {
    const int64_t sums = queries * kv_width(l), parts = sums * c.parts, out = queries * c.d;
    own_keys.reset(new Scratch(parts + sums + out + queries, 1));
    c.key_parts = own_keys->data();
    if (!c.key_parts) return KVRT_NO_MEMORY;
    if (!c.key_sum) c.key_sum = c.key_parts + parts;
    if (l.v_weight) c.rows = c.key_parts + parts + sums;
    c.key_mass = c.key_parts + parts + sums + out;
  }
  if (c.means) {
    steps.reset(new Scratch((2 * kSteps + 2) * c.half, 1));
    if (!steps->data()) return KVRT_NO_MEMORY;
    fill_steps(l, steps->data());
    c.ops.pack_mean_steps(steps->data(), c.half);
    c.steps = steps->data();
  }
  const int threads = threads_for(exec, jobs, work);
  const Scratch scratch(c.work_floats(), threads);
  if (!scratch.data() || !c.states || (own_mass && !c.mass)) return KVRT_NO_MEMORY;

  const int heads = l.num_kv_heads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Work mine = c.work_at(scratch.mine());
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < jobs; i++) c.run_unit(static_cast<int>(i / c.units), i % c.units, mine);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < owners; i++)
      c.merge(View{l, cache, static_cast<int>(i / heads), static_cast<int>(i % heads)}, mine);
    if (c.parts) {
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < owners * c.parts; i++) {
        const int64_t owner = i / c.parts;
        const View view{l, cache, static_cast<int>(owner / heads), static_cast<int>(owner % heads)};
        c.sum_keys(view, i % c.parts, mine);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < owners; i++)
        c.finish_keys(View{l, cache, static_cast<int>(i / heads), static_cast<int>(i % heads)}, mine);
    }
    if (c.rows) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < owners; i++)
        c.add_predictions(View{l, cache, static_cast<int>(i / heads), static_cast<int>(i % heads)});
    }
  }
  return KVRT_OK;
}

}  // namespace
}  // namespace kvrt

extern "C" {

int64_t kvrt_attend_workspace(const kv_layer *layer, int32_t num_seqs, int32_t splits) {
  if (kvrt::check_layer(layer) != KVRT_OK || num_seqs < 0 || splits < 1) return -1;
  const int64_t jobs = static_cast<int64_t>(num_seqs) * layer->num_kv_heads * (static_cast<int64_t>(splits) + 1);
  return jobs * kvrt::Call::unit_size(*layer) * static_cast<int64_t>(sizeof(float));
}

int kvrt_attend(const kv_layer *layer, const kvrt_attend_args *args, const kvrt_exec *exec) {
  try {
    return kvrt::attend(layer, args, exec);
  } catch (const std::bad_alloc &) {
    return KVRT_NO_MEMORY;
  }
}

}  // extern "C"
