// The products of predictors, in loops that vectorise over outputs: no sum is cut into parts.
#include "predict.h"

#include <algorithm>

#include "multiversion.h"

namespace kvrt {
namespace {

constexpr int kOutputs = 64, kRows = 4;  // of sums held at once

KVRT_CLONES
void predict(const float *weight, const float *bias, const float *keys, int count, int width, float *out) {
  for (int t0 = 0; t0 < count; t0 += kRows)
    for (int o0 = 0; o0 < width; o0 += kOutputs) {
      const int rows = std::min(kRows, count - t0), outputs = std::min(kOutputs, width - o0);
      double sum[kRows][kOutputs];
      for (int t = 0; t < rows; t++)
        for (int o = 0; o < outputs; o++) sum[t][o] = bias ? bias[o0 + o] : 0.0;
      for (int c = 0; c < width; c++) {
        const float *w = weight + static_cast<int64_t>(c) * width + o0;
        for (int t = 0; t < rows; t++) {
          const double k = keys[static_cast<int64_t>(t0 + t) * width + c];
          for (int o = 0; o < outputs; o++) sum[t][o] += k * static_cast<double>(w[o]);
        }
      }
      for (int t = 0; t < rows; t++)
        for (int o = 0; o < outputs; o++)
          out[static_cast<int64_t>(t0 + t) * width + o0 + o] = static_cast<float>(sum[t][o]);
    }
}

KVRT_CLONES
void product(const float *weight, const float *x, int width, int first, int n, float *out) {
  float sum[KV_MAX_HEAD_DIM] = {};
  for (int c = 0; c < width; c++) {
    const float *w = weight + static_cast<int64_t>(c) * width + first;
    const float k = x[c];
    for (int o = 0; o < n; o++) sum[o] += k * w[o];
  }
  for (int o = 0; o < n; o++) out[o] += sum[o];
}

KVRT_CLONES
void turn(float *x, const float *table, int count, int head_dim) {
  const int half = head_dim / 2;
  for (int t = 0; t < count; t++, x += head_dim, table += head_dim) {
    float *other = x + half;
    const float *cos = table, *sin = table + half;
#pragma GCC ivdep
    for (int i = 0; i < half; i++) {
      const float a = x[i], b = other[i];
      x[i] = a * cos[i] + b * sin[i];
      other[i] = b * cos[i] - a * sin[i];
    }
  }
}

}  // namespace

void predict_rows(const float *weight, const float *bias, const float *keys, int count, int width, float *out) {
  predict(weight, bias, keys, count, width, out);
}

void add_product(const float *weight, const float *x, int width, int first, int n, float *out) {
  product(weight, x, width, first, n, out);
}

void turn_back(float *x, const float *table, int count, int head_dim) { turn(x, table, count, head_dim); }

}  // namespace kvrt
