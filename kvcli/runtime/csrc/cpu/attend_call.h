// The inside of kvrt_attend: what one call knows, and its three steps.
//
//   units   the pages of a sequence are cut into units; each is a softmax of its own over its tokens. The exact tokens
//           are one unit more. A head's state there is [group][head_dim] sums, then [group] maxima, then [group] masses.
//           A unit takes its kv heads in turn at every run of pages, for their slices lie side by side.
//   merge   the units of a head, in ascending order, become the output, the log-sum-exp and the weights per slot.
//   keys    sums of decoded keys, which need the weights of all heads, in parts that `finish_keys` puts together. Where
//           values are predicted from keys, the sums times the predictor's weight are what the codes leave out:
//           o = W (sum p K^) + m b + sum p R^ + what is exact, m being the mass on packed tokens (its b comes as v_mean).
//
// The sums of packed values stay as stored, rotated and without their mean: rotation and mean come in once, in merge.
#pragma once

#include "predict.h"

namespace kvrt {

constexpr int kChunk = kRunTokens;  // tokens of one softmax step
constexpr int kSteps = kRunTokens / 2;

// Slots that the query of one head sees.
struct Span {
  int64_t n, sinks_begin, sinks_end, packed_begin, packed_end, tail_begin;
  bool masked;  // a sliding window counted in positions, which slots do not tell
};

// Parts of a thread's scratch; the first four and prepared are those of one kv head.
struct Work {
  float *query, *turned, *a, *b, *scores, *keys, *sums;
  uint8_t *prepared;               // PageOps::prepare_query
  int64_t per_head, per_prepared;  // from one kv head's query to the next's, and so on
  Work of(int head) const {
    Work w = *this;
    w.query += head * per_head, w.turned += head * per_head, w.a += head * per_head, w.b += head * per_head;
    w.prepared += head * per_prepared;
    return w;
  }
};

struct Call {
  const kv_layer &layer;
  const kvrt_attend_args &args;
  const PageOps &ops;
  kv_page_layout at;
  int group, d, half;
  bool decoded;           // keys are decoded to after RoPE first, because neither codes nor steps give their scores
  bool means;             // the keys' mean is added to the scores of codes: PageOps::add_mean_scores
  const float *steps;     // its steps, then [half] cosines and [half] sines of half a run
  float *mass;  // scores, then weights: the caller's, or scratch where only the keys' sums need it
  int64_t mass_stride;
  float *states;
  int64_t unit_floats, units;  // of one head; the last is the exact one
  float *rows;      // [num_seqs][num_heads][head_dim]: the output but for what keys tell of values; null: goes out at once
  float *key_sum;   // the caller's, or scratch where only predictions need it; null: nobody does
  float *key_mass;  // packed_mass likewise
  float *key_parts; // [num_seqs * num_kv_heads * parts][num_heads][head_dim]
  int64_t parts;    // in which a head's keys are summed

  static int64_t unit_size(const kv_layer &l) {
    const int64_t group = l.num_heads / l.num_kv_heads;
    return (group * l.head_dim + 2 * group + 15) / 16 * 16;
  }
  int64_t work_floats() const;
  Work work_at(float *scratch) const;
  Span span(const View &view) const;
  bool sees(const View &view, int64_t slot) const;
  bool sees_some(const View &view, const Span &span, int64_t first, int64_t last) const;
  float *state(int s, int head, int64_t unit) const {
    return states + ((static_cast<int64_t>(s) * layer.num_kv_heads + head) * units + unit) * unit_floats;
  }
  float *mass_row(int s, int query_head) const {
    return mass + (static_cast<int64_t>(s) * layer.num_heads + query_head) * mass_stride;
  }
  // a run that may have holes, because a window is counted in positions, is a single page
  int64_t pages_of_run(const Span &span) const { return span.masked ? 1 : kChunk / layer.block_size; }
  // pages of a unit
  void cut(const Span &span, int64_t unit, int64_t *from, int64_t *to) const;

  void run_unit(int seq, int64_t unit, const Work &work) const;
  void merge(const View &view, const Work &work) const;
  void sum_keys(const View &view, int64_t part, const Work &work) const;
  void finish_keys(const View &view, const Work &work) const;  // of one kv head's keys
  void add_predictions(const View &view) const;

 private:
  void load_query(const View &view, const Work &work) const;
  void score_run(const View &view, int64_t page, const uint8_t *const *slices, int first, int last,
                 const Work &work) const;
  void score_page(const View &view, int64_t page, const uint8_t *slice, int first, int last, const Work &work,
                  float *scores) const;
  void finish(const View &view, const Span &span, int64_t slot, int from, int to, float *scores) const;
  void absorb(float *scores, int from, int to, float *state) const;
  void prepare(const View &view, const Work &work) const;
  void run_pages(const View &view, const Span &span, int64_t page, int64_t to, const Work &work, float *state) const;
  void run_rows(const View &view, const Span &span, bool sinks, const Work &work, float *state) const;
  void decode_for_sum(const View &view, int64_t page, int first, int last, float *out) const;
  float *key_part(const View &view, int64_t part) const {
    const int64_t owner = static_cast<int64_t>(view.seq) * layer.num_kv_heads + view.head;
    return key_parts + (owner * parts + part) * layer.num_heads * d;
  }
};

}  // namespace kvrt
