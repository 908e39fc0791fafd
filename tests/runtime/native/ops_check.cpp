// Holds every instruction set's PageOps against scalar loops written here, and times them.
//
//   ops_check          all formats and shapes; PASS, or the first mismatch and exit 1
//   ops_check bench    ns a page and GB/s of packed bytes, hot (in L2) and streamed (64 MiB)
//
// Sections lie at the ends of mappings with a forbidden page behind them, so a read past a section is a crash. The ops
// are weak, so that the check links with any of them missing:
//   g++ -std=c++17 -O2 -I kvcli/runtime/csrc -I kvcli/runtime/csrc/cpu ops_check.cpp avx512_ops.o ...
#include "ops_case.h"

namespace {

bool fail(const PageOps &ops, const char *op, const Case *k, const char *detail) {
  printf("FAIL %s %s: %s: %s\n", ops.name, op, k ? k->name().c_str() : "", detail);
  return false;
}

constexpr float kUntouched = 12345.f;

bool check_scores(const PageOps &ops, const Case &k, int group, int first, int last, bool rows) {
  const int d = k.layer.head_dim, b = k.layer.block_size, stride = b + 3;
  std::vector<float> query(size_t(group) * d), scores(size_t(group) * stride, kUntouched);
  const bool spiky = below(3) == 0;
  double mean = 0;  // square of a token's length; a channel's scale is the page's, so errors there are relative to it
  std::vector<double> top(d);
  for (int i = 0; i < d * b && k.f.axis == KV_CHANNEL; ++i)
    mean += k.value[i] * k.value[i] / b, top[i % d] = std::max(top[i % d], fabs(k.value[i]));
  for (auto &x : query) x = normal() * (spiky && below(8) == 0 ? 20 : 1);
  if (rows) {
    const int dtype = k.f.bits == 32 ? KV_F32 : k.layer.page_dtype;
    ops.score_rows(k.c + first * kv_row_bytes(&k.f, d), dtype, d, last - first, d, query.data(), group,
                   scores.data() + first, stride);
  } else {
    const uint8_t *slices[2 * (kvrt::kRunTokens / 16)] = {k.c};
    alignas(64) static uint8_t prepared[4 * kvrt::kPrepared];
    ops.prepare_query(k.layer, query.data(), group, prepared);
    ops.score_pages(k.layer, k.at, slices, query.data(), prepared, group, first, last, scores.data(), stride);
  }
  for (int g = 0; g < group; ++g)
    for (int t = 0; t < stride; ++t) {
      const float got = scores[size_t(g) * stride + t];
      char detail[200];
      if (t < first || t >= last) {
        if (got == kUntouched) continue;
        snprintf(detail, sizeof detail, "group %d tokens %d..%d wrote head %d token %d", group, first, last, g, t);
        return fail(ops, rows ? "score_rows" : "score_pages", &k, detail);
      }
      double want = 0, qq = 0, kk = 0, peak = 0;  // peak: what one channel can add; integers are relative to it
      for (int c = 0; c < d; ++c) {
        const double q = query[size_t(g) * d + c], v = k.value[t * d + c];
        want += q * v, qq += q * q, kk += v * v, peak = std::max(peak, fabs(q) * top[c]);
      }
      if (fabs(got - want) <= 1e-4 * sqrt(qq * std::max(kk, mean)) + 5e-5 * peak * sqrt(double(d)) + 1e-6) continue;
      snprintf(detail, sizeof detail, "group %d tokens %d..%d head %d token %d: %g, not %g (|q||k| %g)", group, first,
               last, g, t, got, want, sqrt(qq * kk));
      return fail(ops, rows ? "score_rows" : "score_pages", &k, detail);
    }
  return true;
}

bool check_sums(const PageOps &ops, const Case &k, int group, int first, int last, bool rows) {
  const int d = k.layer.head_dim, b = k.layer.block_size, stride = b + 5;
  std::vector<float> weights(size_t(group) * stride, NAN), sums(size_t(group) * d), before;
  for (int g = 0; g < group; ++g)
    for (int t = first; t < last; ++t)
      weights[size_t(g) * stride + t] = below(10) ? expf(normal() * 2) * (below(4) ? 1 : -1) : 0;
  for (auto &x : sums) x = normal();
  before = sums;
  if (rows) {
    const int dtype = k.f.bits == 32 ? KV_F32 : k.layer.page_dtype;
    ops.accumulate_rows(k.c + first * kv_row_bytes(&k.f, d), dtype, d, last - first, d, weights.data() + first, stride,
                        group, sums.data());
  } else {
    const uint8_t *slices[2 * (kvrt::kRunTokens / 16)] = {k.c};
    ops.accumulate_pages(k.layer, k.at, slices, weights.data(), stride, group, first, last, sums.data());
  }
  for (int g = 0; g < group; ++g) {
    double most = 0, top = 0;  // the longest weighted token, the largest weight
    for (int t = first; t < last; ++t) {
      double vv = 0;
      for (int c = 0; c < d; ++c) vv += k.value[t * d + c] * k.value[t * d + c];
      most = std::max(most, fabs(weights[size_t(g) * stride + t]) * sqrt(vv));
      top = std::max(top, double(fabs(weights[size_t(g) * stride + t])));
    }
    for (int c = 0; c < d; ++c) {
      double want = before[size_t(g) * d + c], size = 0;
      for (int t = first; t < last; ++t) {
        const double w = weights[size_t(g) * stride + t], v = k.value[t * d + c];
        want += w * v, size += fabs(w * v);
      }
      // integers are relative to the largest weight of a page, times a channel's scale on the channel axis
      double peak = 0;
      for (int t = 0; t < b; ++t) peak = std::max(peak, fabs(k.value[t * d + c]));
      const double unit = k.f.axis == KV_CHANNEL ? std::max(most, top * peak) : most;
      const float got = sums[size_t(g) * d + c];
      if (fabs(got - want) <= 1e-4 * size + 3e-4 * unit + 1e-6) continue;
      char detail[200];
      snprintf(detail, sizeof detail, "group %d tokens %d..%d head %d channel %d: %g, not %g (size %g, most %g)", group,
               first, last, g, c, got, want, size, most);
      return fail(ops, rows ? "accumulate_rows" : "accumulate_pages", &k, detail);
    }
  }
  return true;
}

bool check_decoded(const PageOps &ops, const Case &k, int first, int last) {
  const int d = k.layer.head_dim;
  std::vector<float> out(size_t(last - first) * d + 1, kUntouched);
  ops.dequantize(k.f, k.c, k.s, k.z, k.layer.page_dtype, d, k.layer.block_size, first, last, out.data());
  for (int i = 0; i < (last - first) * d; ++i)
    if (out[i] != k.exact[first * d + i]) {
      char detail[200];
      snprintf(detail, sizeof detail, "tokens %d..%d value %d: %.9g, not %.9g", first, last, i, out[i],
               k.exact[first * d + i]);
      return fail(ops, "dequantize", &k, detail);
    }
  return out[size_t(last - first) * d] == kUntouched || fail(ops, "dequantize", &k, "wrote past the end");
}

bool check_hadamard(const PageOps &ops, int d, int rows) {
  std::vector<float> x(size_t(rows) * d + 1), y;
  for (auto &v : x) v = normal();
  y = x;
  const int block = d & -d;
  const float norm = float(pow(double(block), -0.5));
  for (int at = 0; at < rows * d; at += block) {
    for (int step = 1; step < block; step *= 2)
      for (int i = 0; i < block; ++i)
        if (!(i & step)) {
          const float a = y[at + i], b = y[at + i + step];
          y[at + i] = a + b, y[at + i + step] = a - b;
        }
    for (int i = 0; i < block; ++i) y[at + i] *= norm;
  }
  ops.hadamard(x.data(), rows, d);
  if (!memcmp(x.data(), y.data(), x.size() * 4)) return true;
  return fail(ops, "hadamard", nullptr, ("head_dim " + std::to_string(d)).c_str());
}

bool check_softmax(const PageOps &ops) {
  if (ops.max_of(nullptr, 0) != -INFINITY) return fail(ops, "max_of", nullptr, "n = 0");
  for (int n = 1; n < 100; ++n) {
    std::vector<float> x(n + 1);
    for (auto &v : x) v = below(6) ? normal() * 20 : -INFINITY;
    x[below(n)] = 1.5f;
    const float max = *std::max_element(x.begin(), x.begin() + n);
    if (ops.max_of(x.data(), n) != max) return fail(ops, "max_of", nullptr, std::to_string(n).c_str());
    std::vector<float> y = x;
    double sum = 0;
    const float got = ops.exp_sum(y.data(), n, max);
    for (int i = 0; i < n; ++i) {
      const float v = x[i] - max;
      const double want = exp(double(v));
      sum += want;
      if (fabs(y[i] - want) > 1e-6 * want + 1e-37 || (x[i] == -INFINITY && y[i] != 0))
        return fail(ops, "exp_sum", nullptr, (std::to_string(v) + " " + std::to_string(y[i])).c_str());
    }
    if (fabs(got - sum) > 2e-6 * sum) return fail(ops, "exp_sum", nullptr, "sum");
    if (y[n] != x[n] && !(y[n] == -INFINITY)) return fail(ops, "exp_sum", nullptr, "wrote past the end");
  }
  return true;
}

bool check_mean(const PageOps &ops, int half, int group, int first, int last) {
  constexpr int kSteps = kvrt::kRunTokens / 2;
  const int stride = last + 1;
  std::vector<float> a(group * half), b(a), steps(size_t(half) * 2 * kSteps), x(group * stride), y, row(2 * half), packed;
  for (auto *v : {&a, &b, &x, &row})
    for (auto &e : *v) e = normal();
  for (int i = 0; i < half; ++i)
    for (int m = 0; m < kSteps; ++m) {
      steps[2 * kSteps * i + m] = float(cos((m + 0.5) / (i + 1)));
      steps[2 * kSteps * i + kSteps + m] = float(sin((m + 0.5) / (i + 1)));
    }
  y = x, packed = steps;
  ops.pack_mean_steps(packed.data(), half);
  ops.add_mean_scores(a.data(), b.data(), row.data(), packed.data(), half, group, first, last, x.data(), stride);
  for (int g = 0; g < group; ++g) {
    double size = 0;  // of everything that could be added up
    for (int i = 0; i < half; ++i)
      size += hypot(a[g * half + i], b[g * half + i]) * hypot(row[i], row[half + i]);
    for (int t = 0; t < stride; ++t) {
      double want = y[g * stride + t];
      for (int i = 0; t >= first && t < last && i < half; ++i) {
        const double p = a[g * half + i], q = b[g * half + i], c = row[i], s = row[half + i];
        const int m = t < kSteps ? kSteps - 1 - t : t - kSteps, sign = t < kSteps ? -1 : 1;
        const float *step = &steps[2 * kSteps * i + m];
        want += (p * c + q * s) * step[0] + sign * (q * c - p * s) * step[kSteps];
      }
      const double rounding = strcmp(ops.name, "avx512") ? 1e-6 : 1e-4;  // words
      if (fabs(x[g * stride + t] - want) <= rounding * size + 1e-6) continue;
      return fail(ops, "add_mean_scores", nullptr, (std::to_string(x[g * stride + t] - want) + " off " + std::to_string(size)).c_str());
    }
  }
  return true;
}

bool check_all(const PageOps &ops) {
  for (int d : {8, 16, 24, 64, 80, 96, 128, 192, 256})
    if (!check_hadamard(ops, d, 1) || !check_hadamard(ops, d, 5)) return false;
  if (!check_softmax(ops)) return false;
  for (int i = 0; i < 40; ++i) {
    const int first = below(kvrt::kRunTokens), half = 4 * (1 + below(32));
    if (!check_mean(ops, half, 1 + below(16), first, first + 1 + below(kvrt::kRunTokens - first))) return false;
    if (!check_mean(ops, half, 1 + below(16), 0, kvrt::kRunTokens)) return false;
  }
  Case k;
  long cases = 0;
  for (int d : {8, 16, 40, 64, 80, 96, 128, 256})
    for (int block : {16, 32, 64, 128})
      for (int bits : {2, 3, 4, 8, 16, 32})
        for (int kind = 0; kind < 3; ++kind)  // symmetric, asymmetric, table
          for (int axis = 0; axis < 2; ++axis)
            for (int scale = 0; scale < 2; ++scale)
              for (int group = 8; group <= (axis ? block : d); group += 8) {
                if ((axis ? block : d) % group || (kind == 2 && bits > 4)) continue;
                if (bits >= 16 && (kind || axis || group > 8)) continue;
                k.f = kv_format{};
                k.f.bits = bits, k.f.axis = axis, k.f.group = group, k.f.scale_dtype = scale;
                k.f.symmetric = kind != 1, k.f.table = kind == 2;
                const int two[] = {24, 80}, three[] = {13, 40, 71, 114}, four[] = {4, 12, 20, 29, 39, 50, 64, 127};
                const int *positive = bits == 2 ? two : bits == 3 ? three : four;
                const float any = below(4) ? 0 : 0.001f;  // now and then levels that are no whole steps
                if (k.f.table && !any) k.f.level_steps = 50;
                for (int i = 0; k.f.table && i < 1 << bits >> 1; ++i) {
                  const float level = float(positive[i]) / 50 + any * float(i);
                  k.f.levels[(1 << bits >> 1) + i] = level;
                  k.f.levels[(1 << bits >> 1) - 1 - i] = -level;
                }
                k.layer.k = k.layer.v = k.f;
                k.layer.head_dim = d, k.layer.block_size = block;
                k.layer.page_dtype = bits == 16 ? 1 + scale : KV_F32;
                for (int whole = 0; whole < 2; ++whole) {
                  const int first = whole ? 0 : below(block);
                  const int last = whole ? block : first + 1 + below(block - first);
                  const int heads = whole && below(2) ? 3 + below(2) : 1 + below(16);
                  k.fill(first, last);
                  ++cases;
                  if (!check_scores(ops, k, heads, first, last, false)) return false;
                  if (!check_sums(ops, k, heads, first, last, false)) return false;
                  if (!check_decoded(ops, k, first, last)) return false;
                  if (bits < 16) continue;
                  if (!check_scores(ops, k, heads, first, last, true)) return false;
                  if (!check_sums(ops, k, heads, first, last, true)) return false;
                }
              }
  printf("PASS %s: %ld pages\n", ops.name, cases);
  return true;
}

double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);  // others may share the machine
  return double(t.tv_sec) * 1e9 + double(t.tv_nsec);
}

struct Times {
  double score = 1e30, sum = 1e30;
};

// ns a page: the best of several passes over pages of `total` bytes.
Times time_pages(const PageOps &ops, const kv_layer &l, const std::vector<uint8_t> &memory, size_t total, int group) {
  const kv_page_layout at = kv_layout_of(&l);
  const int d = l.head_dim, b = l.block_size;
  const int pages = int(total / size_t(at.head_bytes)), passes = total > (8u << 20) ? 4 : 60;
  const int run = kvrt::kRunTokens / b;
  std::vector<float> query(size_t(group) * d), scores(size_t(group) * run * b), sums(query), weights(scores);
  for (auto &x : query) x = normal();
  for (auto &x : weights) x = expf(normal());
  const uint8_t *base = memory.data() + (64 - uintptr_t(memory.data()) % 64);
  std::vector<const uint8_t *> slices;
  for (int p = 0; p < pages + 2 * run; ++p) slices.push_back(p < pages ? base + int64_t(p) * at.head_bytes : nullptr);
  alignas(64) static uint8_t prepared[kvrt::kPrepared];
  ops.prepare_query(l, query.data(), group, prepared);
  Times best;
  for (int pass = 0; pass < passes; ++pass) {
    double start = now();
    for (int p = 0; p + run <= pages; p += run)
      ops.score_pages(l, at, &slices[p], query.data(), prepared, group, 0, run * b, scores.data(), run * b);
    best.score = std::min(best.score, (now() - start) / (pages / run * run));
    start = now();
    for (int p = 0; p + run <= pages; p += run)
      ops.accumulate_pages(l, at, &slices[p], weights.data(), run * b, group, 0, run * b, sums.data());
    best.sum = std::min(best.sum, (now() - start) / (pages / run * run));
  }
  return best;
}

void bench(const PageOps &ops, int block) {
  std::vector<uint8_t> memory(64 << 20);
  for (size_t i = 0; i + 4 <= memory.size(); i += 4) {  // also as float16: nothing huge, nothing subnormal
    const uint32_t x = (rng() & 0x3BFF3BFF) | 0x10001000;
    memcpy(&memory[i], &x, 4);
  }
  printf("%s, block %d, e5m3 scales       hot: score  GB/s    sum  GB/s   streamed: score  GB/s    sum  GB/s\n",
         ops.name, block);
  for (int d : {64, 128})
    for (int bits : {16, 8, 4, 3, 2})
      for (int axis = 0; axis < 2; ++axis)
        for (int table = 0; table < 2; ++table) {
          if ((bits > 4 && table) || (bits == 16 && axis)) continue;
          kv_layer l{};
          kv_format f{};
          f.bits = bits, f.axis = axis, f.group = axis ? block : d, f.symmetric = 1, f.table = table;
          f.scale_dtype = KV_SCALE_E5M3;
          for (int i = 0; i < 1 << bits && i < 16; ++i) f.levels[i] = 0.1f * float(i) - 0.05f * float((1 << bits) - 1);
          f.level_steps = 20;
          l.k = l.v = f;
          l.head_dim = d, l.block_size = block, l.page_dtype = KV_F16;
          const double bytes = double(kv_row_bytes(&f, d) * block + kv_scale_bytes(&f, d, block));
          const int group = d == 64 ? 3 : 4;
          const Times hot = time_pages(ops, l, memory, 256 << 10, group);
          const Times cold = time_pages(ops, l, memory, (64 << 20) - 64, group);
          printf("d %3d x%d bits %2d %-7s %-7s %6.0f B %7.1f %5.1f %7.1f %5.1f %14.1f %5.1f %7.1f %5.1f\n", d, group, bits,
                 axis ? "channel" : "token", table ? "table" : "", bytes, hot.score, bytes / hot.score, hot.sum,
                 bytes / hot.sum, cold.score, bytes / cold.score, cold.sum, bytes / cold.sum);
          fflush(stdout);
        }
}

}  // namespace

int main(int argc, char **argv) {
  std::vector<const PageOps *> all;
  if (kvrt::portable_ops) all.push_back(&kvrt::portable_ops());
  if (kvrt::avx2_ops && kvrt::avx2_ops() && __builtin_cpu_supports("avx2")) all.push_back(kvrt::avx2_ops());
  if (kvrt::avx512_ops && kvrt::avx512_ops() && __builtin_cpu_supports("avx512vbmi"))
    all.push_back(kvrt::avx512_ops());
  const bool timing = argc > 1 && !strcmp(argv[1], "bench");
  for (const PageOps *ops : all) {
    if (timing && argc > 2 && strcmp(argv[2], ops->name)) continue;
    if (timing) bench(*ops, argc > 3 ? atoi(argv[3]) : 16);
    else if (!check_all(*ops)) return 1;
  }
  return 0;
}
