// Codes straight into registers as pairs of halves: what the tensor cores multiply.
//
// Two chunks of eight channels are decoded side by side, pair k being channel k of one and channel k of the other. For
// keys these are two chunks of a token, for values the same chunk of two tokens; everything else is alike.
#pragma once

#include "tile.cuh"

namespace kvrt {

using Half2Bits = uint32_t;  // lower half first

__device__ __forceinline__ __half2 as_half2(uint32_t bits) {
  return __halves2half2(__ushort_as_half(static_cast<unsigned short>(bits & 0xFFFF)),
                        __ushort_as_half(static_cast<unsigned short>(bits >> 16)));
}
__device__ __forceinline__ uint32_t bits_of(__half2 pair) {
  return static_cast<uint32_t>(__half_as_ushort(__low2half(pair))) |
         static_cast<uint32_t>(__half_as_ushort(__high2half(pair))) << 16;
}
__device__ __forceinline__ uint32_t pair_bits(float low, float high) { return bits_of(__floats2half2_rn(low, high)); }

// The part of a float that its half leaves out, for products in two terms.
__device__ __forceinline__ float rest_of(float x) { return x - __half2float(__float2half_rn(x)); }

constexpr uint32_t LOW_HALVES = 0x5410, HIGH_HALVES = 0x7632, MIDDLE_HALVES = 0x6521;  // prmt: of each of two words

// Code k of two chunks, at bits 2 ... b+1 of each half. The other bits are whatever lies beside them.
//
// A half with the exponent of 256 counts in quarters, so code << 2 in its mantissa is 256 + code exactly, and so is
// 256 + (2^b - 1) / 2, which is taken off symmetric codes.
template <int BITS>
__device__ __forceinline__ uint32_t placed_codes(const uint64_t (&codes)[2], int k) {
  const uint32_t a = static_cast<uint32_t>(codes[0]), b = static_cast<uint32_t>(codes[1]);
  if (BITS == 8) {
    const uint32_t c = k < 4 ? a : static_cast<uint32_t>(codes[0] >> 32);
    const uint32_t d = k < 4 ? b : static_cast<uint32_t>(codes[1] >> 32);
    const uint32_t byte = k % 4;
    return ptx::prmt(c, d, byte | byte << 4 | (byte + 4) << 8 | (byte + 4) << 12) << 2;
  }
  uint32_t both;
  int at = k * BITS;
  if (BITS == 4 && k >= 4) both = ptx::prmt(a, b, HIGH_HALVES), at -= 16;
  else if (BITS == 3 && k >= 5) both = ptx::prmt(a, b, MIDDLE_HALVES), at -= 8;
  else both = ptx::prmt(a, b, LOW_HALVES);
  return at >= 2 ? both >> (at - 2) : both << 2;
}

template <int BITS>
__device__ __forceinline__ void decode_codes(const kv_format& format, const uint64_t (&codes)[2],
                                             const Half2Bits* table, uint32_t (&out)[8]) {
  constexpr uint32_t mask = ((1u << BITS) - 1) * 0x00040004u;
  const float top = static_cast<float>((1 << BITS) - 1);
  const __half2 shift = __float2half2_rn(256.0f + (format.symmetric ? top / 2 : 0.0f));
#pragma unroll
  for (int k = 0; k < 8; k++) {
    const uint32_t placed = placed_codes<BITS>(codes, k) & mask;
    if (format.table) out[k] = table[(placed >> 2 | placed >> (18 - BITS)) & ((1u << 2 * BITS) - 1)];
    else out[k] = bits_of(__hsub2(as_half2(placed | 0x5C005C00u), shift));
  }
}

// Levels of every two codes, for decode_codes: `second << bits | first` gives both. The block fills
// table[1 << 2 * bits].
__device__ __forceinline__ void fill_table(const kv_format& format, Half2Bits* table) {
  const int codes = 1 << format.bits;
  for (int i = threadIdx.x; i < codes * codes; i += blockDim.x)
    table[i] = pair_bits(format.levels[i % codes], format.levels[i / codes]);
}
constexpr int TABLE_ENTRIES = KV_MAX_LEVELS * KV_MAX_LEVELS;

struct Chunks {
  int token[2], chunk[2];  // token counts from the tile's beginning
};

// Eight scales or zero points of the channel axis, as floats16, for each of two chunks.
__device__ __forceinline__ void pair_channels(const uint8_t* base, bool bytes, const int64_t (&index)[2],
                                              uint32_t (&out)[8]) {
  if (bytes) {
    const uint2 a = *reinterpret_cast<const uint2*>(base + index[0]);
    const uint2 b = *reinterpret_cast<const uint2*>(base + index[1]);
#pragma unroll
    for (uint32_t k = 0; k < 8; k++) {
      const uint32_t byte = k % 4;
      const uint32_t selector = byte | byte << 4 | (byte + 4) << 8 | (byte + 4) << 12;
      const uint32_t both = ptx::prmt(k < 4 ? a.x : a.y, k < 4 ? b.x : b.y, selector);
      out[k] = (both & 0x00FF00FF) << E5M3_SHIFT;
    }
    return;
  }
  const uint4 a = *reinterpret_cast<const uint4*>(base + 2 * index[0]);
  const uint4 b = *reinterpret_cast<const uint4*>(base + 2 * index[1]);
  const uint32_t first[4] = {a.x, a.y, a.z, a.w}, second[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int k = 0; k < 8; k++) out[k] = ptx::prmt(first[k / 2], second[k / 2], k % 2 ? HIGH_HALVES : LOW_HALVES);
}

// Decode two chunks of a tile. Where one scale serves a whole token (`folded`) it is left out, zero point too: the
// caller puts it on the score or the weight. Tokens from `valid` on count as zero.
__device__ __forceinline__ void decode_pairs(const kv_format& format, int page_dtype, int head_dim, const Sections& at,
                                             const Chunks& what, bool folded, const Half2Bits* table, int valid,
                                             uint32_t (&out)[8]) {
  const uint8_t* rows[2] = {at.codes + what.token[0] * at.pitch, at.codes + what.token[1] * at.pitch};
  if (format.bits == 16) {
    const uint4 a = reinterpret_cast<const uint4*>(rows[0])[what.chunk[0]];
    const uint4 b = reinterpret_cast<const uint4*>(rows[1])[what.chunk[1]];
    const uint32_t first[4] = {a.x, a.y, a.z, a.w}, second[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int k = 0; k < 8; k++) {
      out[k] = ptx::prmt(first[k / 2], second[k / 2], k % 2 ? HIGH_HALVES : LOW_HALVES);
      // a bfloat16 of the size that keys and values have is a half too
      if (page_dtype == KV_BF16)
        out[k] = pair_bits(bfloat_bits_to_float(out[k] & 0xFFFF), bfloat_bits_to_float(out[k] >> 16));
    }
    return;
  }
  const uint64_t codes[2] = {load_eight_codes(rows[0] + what.chunk[0] * format.bits, format.bits),
                             load_eight_codes(rows[1] + what.chunk[1] * format.bits, format.bits)};
  switch (format.bits) {  // the same for a whole launch: no divergence
    case 2: decode_codes<2>(format, codes, table, out); break;
    case 3: decode_codes<3>(format, codes, table, out); break;
    case 4: decode_codes<4>(format, codes, table, out); break;
    default: decode_codes<8>(format, codes, table, out);
  }
  if (folded) return;
  uint32_t scales[8], zeros[8];
  int64_t index[2];
  if (format.axis == KV_CHANNEL) {
    for (int i = 0; i < 2; i++) index[i] = what.token[i] / format.group * head_dim + what.chunk[i] * 8;
    pair_channels(at.scales, format.scale_dtype == KV_SCALE_E5M3, index, scales);
    if (!format.symmetric) pair_channels(at.zeros, false, index, zeros);
  } else {  // groups are a multiple of eight channels
    const bool written[2] = {what.token[0] < valid, what.token[1] < valid};
    for (int i = 0; i < 2; i++)
      index[i] = what.token[i] * (head_dim / format.group) + what.chunk[i] * 8 / format.group;
    uint32_t scale = 0, zero = 0;
    for (int i = 0; i < 2; i++) {
      if (!written[i]) continue;
      scale |= load_scale_bits(at.scales, index[i], format.scale_dtype) << (16 * i);
      if (!format.symmetric)
        zero |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(at.zeros)[index[i]]) << (16 * i);
    }
#pragma unroll
    for (int k = 0; k < 8; k++) scales[k] = scale, zeros[k] = zero;
  }
#pragma unroll
  for (int k = 0; k < 8; k++)
    out[k] = bits_of(format.symmetric ? __hmul2(as_half2(out[k]), as_half2(scales[k]))
                                      : __hfma2(as_half2(out[k]), as_half2(scales[k]), as_half2(zeros[k])));
}

}  // namespace kvrt
