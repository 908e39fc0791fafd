// Scales and zero points of a token's row, by F16C: what the AVX2 and the AVX-512 loops have in common.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "kv_layout.h"

namespace kvrt {
namespace {

inline float half_at(const uint8_t *from, int64_t at, bool e5m3) {
  uint16_t h;
  if (e5m3) {
    h = uint16_t(from[at] << 7);
  } else {
    memcpy(&h, from + 2 * at, 2);
  }
  return _cvtsh_ss(h);
}

// Scale (or zero) of every channel of row t.
inline void row_scales(const kv_format &f, const uint8_t *from, bool e5m3, int head_dim, int t, float *out) {
  if (f.axis == KV_TOKEN) {
    const int groups = head_dim / f.group;
    for (int i = 0; i < groups; ++i) {
      const float x = half_at(from, (int64_t)t * groups + i, e5m3);
      for (int c = 0; c < f.group; ++c) out[i * f.group + c] = x;
    }
    return;
  }
  const int64_t at = (int64_t)(t / f.group) * head_dim;
  for (int c = 0; c < head_dim; c += 8) {
    __m128i h;
    if (e5m3) {
      h = _mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)(from + at + c))), 7);
    } else {
      h = _mm_loadu_si128((const __m128i *)(from + 2 * (at + c)));
    }
    _mm256_storeu_ps(out + c, _mm256_cvtph_ps(h));
  }
}

}  // namespace
}  // namespace kvrt
