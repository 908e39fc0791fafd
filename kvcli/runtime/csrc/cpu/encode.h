// The quantiser: kvcli.quant.quantizer.to_bytes, bit for bit.
#pragma once

#include "kv_layout.h"

namespace kvrt {

// Encode x [tokens][head_dim], as stored (turned, centred, rotated), into a section whose first token is at codes,
// scales and zeros. Whole groups: any number of tokens on the token axis, a multiple of the group on the channel axis,
// at most KV_MAX_BLOCK_SIZE. Coded formats only.
void encode_section(const kv_format &format, const float *x, int tokens, int head_dim, uint8_t *codes, uint8_t *scales,
                    uint8_t *zeros);

}  // namespace kvrt
