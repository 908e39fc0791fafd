// Values to codes, in the order of operations of kvcli/quant/quantizer.py: every sum and every rounding is where torch
// has it, so that pages are the same bytes whoever wrote them.
#include "encode.h"

#include <cmath>

#include "half.h"
#include "multiversion.h"

// Inlined into the clones below, so that each is compiled for its instruction set.
#define KVRT_PART static inline __attribute__((always_inline))

namespace kvrt {
namespace {

// Groups are handled as blocks x [n][lanes]: n values that share a scale, for one group (token axis: 1 lane) or for
// neighbouring channels (channel axis).
constexpr int kLanes = 16;
constexpr int kBlock = KV_MAX_BLOCK_SIZE * kLanes;  // also at least KV_MAX_HEAD_DIM
constexpr float kRound = 12582912.0f;               // 1.5 * 2^23: adding it rounds half to even into the lowest bits

enum Fold { kSum, kMax, kMin };

// Fold n rows of `lanes` into the first, second half onto first as long as n is even: quantizer.sum_by_halves.
KVRT_PART void fold(float *y, int n, int lanes, Fold how) {
  while (n % 2 == 0) {
    n /= 2;
    const int run = n * lanes;
    const float *z = y + run;
    if (how == kSum)
      for (int i = 0; i < run; i++) y[i] = y[i] + z[i];
    else if (how == kMax)
      for (int i = 0; i < run; i++) y[i] = z[i] > y[i] ? z[i] : y[i];
    else
      for (int i = 0; i < run; i++) y[i] = z[i] < y[i] ? z[i] : y[i];
  }
  for (int k = 1; k < n; k++)
    for (int c = 0; c < lanes; c++) {
      const float z = y[k * lanes + c];
      y[c] = how == kSum ? y[c] + z : how == kMax ? (z > y[c] ? z : y[c]) : (z < y[c] ? z : y[c]);
    }
}

KVRT_PART float inverse(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }

// scales.encode_scales: store one scale and return what it decodes to.
KVRT_PART float store_scale(const kv_format &f, float scale, bool up, uint8_t *scales, int64_t at) {
  if (f.scale_dtype == KV_SCALE_F16) {
    // + 0: a negative zero, which an empty group on a table has, becomes a positive one
    const float kept = !(scale > 0.0f) ? scale + 0.0f : scale < 0x1p-24f ? 0x1p-24f : scale > 65504.0f ? 65504.0f : scale;
    const uint16_t h = float_to_half(kept);
    std::memcpy(scales + 2 * at, &h, sizeof h);
    return half_to_float(h);
  }
  uint32_t code = 0;
  if (scale > 0.0f) {
    const uint32_t h = float_to_half(scale > 61440.0f ? 61440.0f : scale);
    code = (h + (up ? 127u : 63u + ((h >> 7) & 1u))) >> 7;
    code = code < 1 ? 1 : code;
  }
  scales[at] = static_cast<uint8_t>(code);
  return half_to_float(static_cast<uint16_t>(code << 7));
}

// round((x - less) * inv + more), kept to 0 ... top; a NaN becomes 0
KVRT_PART uint8_t uniform_code(float x, float less, float inv, float more, float top) {
  float y = (x - less) * inv + more;
  y = y > 0.0f ? y : 0.0f;
  y = y < top ? y : top;  // before rounding, which keeps the order and leaves whole numbers alone
  return static_cast<uint8_t>(bits_of(y + kRound));
}

// codes[i] = how many borders lie below x[i] * inv: torch.bucketize
KVRT_PART void nearest(const float *x, int n, int lanes, const float *inv, const float *borders, int count,
                       int32_t *codes) {
  float y[kBlock];
  const int run = n * lanes;
  if (lanes == 1) {
    for (int i = 0; i < n; i++) y[i] = x[i] * inv[0];
  } else {
    for (int i = 0; i < n; i++)
      for (int c = 0; c < lanes; c++) y[i * lanes + c] = x[i * lanes + c] * inv[c];
  }
  for (int i = 0; i < run; i++) codes[i] = 0;
  for (int b = 0; b < count; b++) {
    const float border = borders[b];
    for (int i = 0; i < run; i++) codes[i] += border >= y[i] ? 0 : 1;
  }
}

KVRT_PART void encode_table(const kv_format &f, const float *x, int n, int lanes, uint8_t *codes, uint8_t *scales,
                            int64_t at) {
  const int top = (1 << f.bits) - 1, run = n * lanes;
  float borders[KV_MAX_LEVELS], inv[kLanes], gain[kLanes], y[kBlock], points[kBlock];
  int32_t chosen[kBlock];
  for (int b = 0; b < top; b++) borders[b] = (f.levels[b + 1] + f.levels[b]) / 2;

  for (int i = 0; i < run; i++) y[i] = x[i] * x[i];
  fold(y, n, lanes, kSum);
  for (int c = 0; c < lanes; c++) inv[c] = inverse(std::sqrt(y[c] / static_cast<float>(n)));
  nearest(x, n, lanes, inv, borders, top, chosen);

  // the factor of least squares between the values and the levels they are nearest to
  for (int i = 0; i < run; i++) points[i] = f.levels[chosen[i]];
  for (int i = 0; i < run; i++) y[i] = x[i] * points[i];
  fold(y, n, lanes, kSum);
  for (int c = 0; c < lanes; c++) gain[c] = y[c];
  for (int i = 0; i < run; i++) y[i] = points[i] * points[i];
  fold(y, n, lanes, kSum);
  for (int c = 0; c < lanes; c++) {
    const float g = gain[c] / y[c];
    inv[c] = inverse(store_scale(f, g < 0.0f ? 0.0f : g, false, scales, at + c));
  }
  nearest(x, n, lanes, inv, borders, top, chosen);
  for (int i = 0; i < run; i++) codes[i] = static_cast<uint8_t>(chosen[i]);
}

KVRT_PART void encode_uniform(const kv_format &f, const float *x, int n, int lanes, uint8_t *codes, uint8_t *scales,
                              uint8_t *zeros, int64_t at) {
  const float top = static_cast<float>((1 << f.bits) - 1);
  const int run = n * lanes;
  const bool up = f.bits == 8;
  float less[kLanes], inv[kLanes], low[kLanes], y[kBlock];
  float more = 0.0f;
  if (f.symmetric) {
    for (int i = 0; i < run; i++) y[i] = float_of(bits_of(x[i]) & 0x7fffffffu);
    fold(y, n, lanes, kMax);
    const float step = static_cast<float>(2.0 / ((1 << f.bits) - 1));
    for (int c = 0; c < lanes; c++) {
      less[c] = 0.0f;
      inv[c] = inverse(store_scale(f, y[c] * step, up, scales, at + c));
    }
    more = top / 2;
  } else {
    for (int i = 0; i < run; i++) y[i] = x[i];
    fold(y, n, lanes, kMin);
    for (int c = 0; c < lanes; c++) low[c] = y[c];
    for (int i = 0; i < run; i++) y[i] = x[i];
    fold(y, n, lanes, kMax);
    for (int c = 0; c < lanes; c++) {
      // + 0: which of two zeros is the smaller one depends on their order, so there is one zero only
      const float kept = low[c] < -65504.0f ? -65504.0f : low[c] > 65504.0f ? 65504.0f : low[c] + 0.0f;
      const uint16_t h = float_to_half(kept);
      std::memcpy(zeros + 2 * (at + c), &h, sizeof h);
      less[c] = half_to_float(h);
      const float span = y[c] - less[c];
      inv[c] = inverse(store_scale(f, (span > 0.0f ? span : 0.0f) / top, up, scales, at + c));
    }
  }
  if (lanes == 1) {
    for (int i = 0; i < n; i++) codes[i] = uniform_code(x[i], less[0], inv[0], more, top);
  } else {
    for (int i = 0; i < n; i++)
      for (int c = 0; c < lanes; c++)
        codes[i * lanes + c] = uniform_code(x[i * lanes + c], less[c], inv[c], more, top);
  }
}

KVRT_PART void encode_block(const kv_format &f, const float *x, int n, int lanes, uint8_t *codes, uint8_t *scales,
                            uint8_t *zeros, int64_t at) {
  if (f.table)
    encode_table(f, x, n, lanes, codes, scales, at);
  else
    encode_uniform(f, x, n, lanes, codes, scales, zeros, at);
}

// packing.pack: eight codes of b bits are b bytes, least significant bit first
KVRT_PART void pack_row(const uint8_t *codes, int n, int bits, uint8_t *out) {
  if (bits == 8) {
    std::memcpy(out, codes, static_cast<size_t>(n));
  } else if (bits == 4) {
    for (int i = 0; i < n / 2; i++) out[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
  } else if (bits == 2) {
    for (int i = 0; i < n / 4; i++)
      out[i] = static_cast<uint8_t>(codes[4 * i] | codes[4 * i + 1] << 2 | codes[4 * i + 2] << 4 |
                                    codes[4 * i + 3] << 6);
  } else {
    for (int i = 0; i < n / 8; i++) {
      uint32_t word = 0;
      for (int k = 0; k < 8; k++) word |= static_cast<uint32_t>(codes[8 * i + k]) << (3 * k);
      for (int k = 0; k < 3; k++) out[3 * i + k] = static_cast<uint8_t>(word >> (8 * k));
    }
  }
}

KVRT_CLONES
void encode(const kv_format &f, const float *x, int tokens, int head_dim, uint8_t *codes, uint8_t *scales,
            uint8_t *zeros) {
  const int64_t row_bytes = kv_row_bytes(&f, head_dim);
  if (f.axis == KV_TOKEN) {
    const int groups = head_dim / f.group;
    uint8_t row[KV_MAX_HEAD_DIM];
    for (int t = 0; t < tokens; t++) {
      for (int g = 0; g < groups; g++)
        encode_block(f, x + static_cast<int64_t>(t) * head_dim + g * f.group, f.group, 1, row + g * f.group, scales,
                     zeros, static_cast<int64_t>(t) * groups + g);
      pack_row(row, head_dim, f.bits, codes + t * row_bytes);
    }
    return;
  }
  uint8_t all[KV_MAX_BLOCK_SIZE * KV_MAX_HEAD_DIM], some[kBlock];
  float strip[kBlock];
  for (int g = 0; g < tokens / f.group; g++) {
    for (int c = 0; c < head_dim; c += kLanes) {
      const int lanes = head_dim - c < kLanes ? head_dim - c : kLanes;
      for (int i = 0; i < f.group; i++)
        std::memcpy(strip + i * lanes, x + static_cast<int64_t>(g * f.group + i) * head_dim + c,
                    sizeof(float) * static_cast<size_t>(lanes));
      encode_block(f, strip, f.group, lanes, some, scales, zeros, static_cast<int64_t>(g) * head_dim + c);
      for (int i = 0; i < f.group; i++)
        std::memcpy(all + (g * f.group + i) * head_dim + c, some + i * lanes, static_cast<size_t>(lanes));
    }
  }
  for (int t = 0; t < tokens; t++) pack_row(all + t * head_dim, head_dim, f.bits, codes + t * row_bytes);
}

}  // namespace

void encode_section(const kv_format &f, const float *x, int tokens, int head_dim, uint8_t *codes, uint8_t *scales,
                    uint8_t *zeros) {
  encode(f, x, tokens, head_dim, codes, scales, zeros);
}

}  // namespace kvrt
