"""Scale dtypes: float16, and e5m3, which is a positive float16 kept to its upper eight bits.

A scale is never negative, so its sign bit is free, and three mantissa bits are enough when the codes are chosen after
the scale was rounded. e5m3 keeps float16's five exponent bits, hence its whole range, and decodes by one shift.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcli.quant.format import ScaleDtype

_E5M3_SHIFT = 7  # mantissa bits of float16 that e5m3 drops
_FLOAT16_MAX = 65504.0
_E5M3_MAX = 61440.0  # 0b11110_111: the largest finite value with three mantissa bits
_FLOAT16_MIN = 2.0**-24


def encode_scales(scales: Tensor, dtype: ScaleDtype, *, up: bool = False) -> Tensor:
    """Round non-negative float32 scales [...] to storage: float16 [...], or uint8 [...] for e5m3.

    Scales saturate at the largest finite value. A positive scale never becomes zero, so a group that has content keeps
    some. e5m3 is reached through float16; ``up`` rounds it up, for codes so fine that a scale cut short would clip the
    largest values by many steps.
    """
    scales = scales + 0.0  # no negative zeros: a group on a table that is all zeros has one
    if dtype == "float16":
        return torch.where(scales > 0, scales.clamp(_FLOAT16_MIN, _FLOAT16_MAX), scales).to(torch.float16)
    bits = scales.clamp(max=_E5M3_MAX).to(torch.float16).view(torch.int16).to(torch.int32)
    half = 1 << (_E5M3_SHIFT - 1)
    odd = (bits >> _E5M3_SHIFT) & 1
    add = 2 * half - 1 if up else half - 1 + odd  # else round half to even on the kept bits
    rounded = (bits + add) >> _E5M3_SHIFT
    return torch.where(scales > 0, rounded.clamp(min=1), rounded).to(torch.uint8)


def decode_scales(stored: Tensor, dtype: ScaleDtype) -> Tensor:
    """Return float32 scales from :func:`encode_scales`'s storage."""
    if dtype == "float16":
        return stored.to(torch.float32)
    return (stored.to(torch.int16) << _E5M3_SHIFT).view(torch.float16).to(torch.float32)
