"""Dense packing of codes into bytes: 3 bits take 3 bits.

Codes form one little-endian bit stream: code i occupies bits [i*bits, (i+1)*bits) counted from the least significant
bit of the first byte. Eight codes of b bits fill b bytes, so a run of a multiple of eight codes is whole bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last axis.

    Parameters
    ----------
    codes
        [..., n] uint8, each below ``2**bits``; n a multiple of 8 (for 1, 2, 4 and 8 bits, ``n * bits`` is enough).
    bits
        1 … 8.

    Returns
    -------
    Tensor
        [..., n * bits / 8] uint8.
    """
    if bits == 8:
        return codes.contiguous()
    if bits in (1, 2, 4):  # no code straddles a byte
        per_byte = 8 // bits
        lanes = codes.unflatten(-1, (-1, per_byte))
        shifts = torch.arange(per_byte, dtype=torch.uint8, device=codes.device) * bits
        bytes_: Tensor = (lanes << shifts).sum(-1, dtype=torch.int32)
        return bytes_.to(torch.uint8)
    lanes = codes.unflatten(-1, (-1, 8)).to(torch.int64)
    shifts = torch.arange(8, device=codes.device) * bits
    words = (lanes << shifts).sum(-1)
    bytes_ = (words.unsqueeze(-1) >> (torch.arange(bits, device=codes.device) * 8)) & 0xFF
    return bytes_.to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo :func:`pack`: [..., n * bits / 8] uint8 to [..., n] uint8."""
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    if bits in (1, 2, 4):
        shifts = torch.arange(8 // bits, dtype=torch.uint8, device=packed.device) * bits
        codes: Tensor = (packed.unsqueeze(-1) >> shifts) & mask
        return codes.flatten(-2)
    lanes = packed.unflatten(-1, (-1, bits)).to(torch.int64)
    words = (lanes << (torch.arange(bits, device=packed.device) * 8)).sum(-1)
    codes = (words.unsqueeze(-1) >> (torch.arange(8, device=packed.device) * bits)) & mask
    return codes.to(torch.uint8).flatten(-2)
