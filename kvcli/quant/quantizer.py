"""Reference quantisers in plain torch: values to codes and scales, and back.

Everything is computed in float32 whatever the compute dtype, codes round half to even, and scales are rounded to their
storage dtype *before* the codes are chosen, so that a stored page is a fixed point: quantising what it decodes to with
the same scales gives the same codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcli.quant import grids
from kvcli.quant.format import KVFormat
from kvcli.quant.packing import pack, unpack
from kvcli.quant.scales import decode_scales, encode_scales


@dataclass(frozen=True)
class Quantized:
    """One tensor's codes with what is needed to decode them.

    Attributes
    ----------
    codes
        [..., tokens, head_dim] uint8.
    scales
        [..., tokens, head_dim / group] (token axis) or [..., tokens / group, head_dim] (channel axis), in the scale
        dtype's storage.
    zeros
        Like scales, float16; None for symmetric formats.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


def _grouped(x: Tensor, fmt: KVFormat) -> tuple[Tensor, int]:
    """View [..., tokens, head_dim] with the group on an axis of its own; return the view and that axis."""
    if fmt.axis == "token":
        return x.unflatten(-1, (-1, fmt.group)), -1
    return x.unflatten(-2, (-1, fmt.group)), -2


def _ungrouped(x: Tensor, fmt: KVFormat) -> Tensor:
    return x.flatten(-2) if fmt.axis == "token" else x.flatten(-3, -2)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))


def _uniform(x: Tensor, axis: int, fmt: KVFormat) -> tuple[Tensor, Tensor, Tensor | None]:
    top = 2**fmt.bits - 1
    up = fmt.bits == 8
    if fmt.symmetric:  # mid-rise: levels at ±s/2, ±3s/2, …, so that two bits are four useful levels
        stored = encode_scales(x.abs().amax(axis, keepdim=True) * (2.0 / top), fmt.scale_dtype, up=up)
        codes = torch.round(x * _inverse(decode_scales(stored, fmt.scale_dtype)) + top / 2)
        return codes.clamp(0, top).to(torch.uint8), stored, None
    low = x.amin(axis, keepdim=True) + 0.0  # of two zeros the smaller depends on their order: keep no negative one
    zeros = low.clamp(-65504.0, 65504.0).to(torch.float16)
    span = x.amax(axis, keepdim=True) - zeros.to(torch.float32)
    stored = encode_scales(span.clamp(min=0) / top, fmt.scale_dtype, up=up)
    codes = torch.round((x - zeros.to(torch.float32)) * _inverse(decode_scales(stored, fmt.scale_dtype)))
    return codes.clamp(0, top).to(torch.uint8), stored, zeros


def _nearest(x: Tensor, table: Tensor) -> Tensor:
    borders = (table[1:] + table[:-1]) / 2
    return torch.bucketize(x.contiguous(), borders.to(x.device))


def sum_by_halves(x: Tensor, axis: int) -> Tensor:
    """Sum over an axis in one fixed order, so that every backend rounds alike: [..., n, ...] to [..., 1, ...].

    As long as n is even the second half is added to the first; what is left is added up from its beginning.
    """
    while x.shape[axis] % 2 == 0:
        first, second = x.chunk(2, axis)
        x = first + second
    total, *others = x.split(1, axis)
    for part in others:
        total = total + part
    sums: Tensor = total
    return sums


def nearest_root(x: Tensor) -> Tensor:
    """Return the float32 nearest to the square root, as other backends have it; torch's own may be the next but one."""
    return x.double().sqrt().float()


def _table(x: Tensor, axis: int, fmt: KVFormat) -> tuple[Tensor, Tensor, None]:
    """Choose codes on a table, with the least-squares gain folded into the stored scale."""
    table = grids.levels(fmt.grid, fmt.bits).to(x.device)
    sigma = nearest_root(sum_by_halves(x.square(), axis) / x.shape[axis])
    points = table[_nearest(x * _inverse(sigma), table)]
    gain = sum_by_halves(x * points, axis) / sum_by_halves(points.square(), axis)
    stored = encode_scales(gain.clamp(min=0), fmt.scale_dtype)
    codes = _nearest(x * _inverse(decode_scales(stored, fmt.scale_dtype)), table)
    return codes.to(torch.uint8), stored, None


def quantize(x: Tensor, fmt: KVFormat) -> Quantized:
    """Quantise [..., tokens, head_dim] of any float dtype; tokens a multiple of the group on the channel axis."""
    grouped, axis = _grouped(x.to(torch.float32), fmt)
    codes, scales, zeros = (_uniform if fmt.grid == "uniform" else _table)(grouped, axis, fmt)
    return Quantized(_ungrouped(codes, fmt), scales.squeeze(axis), None if zeros is None else zeros.squeeze(axis))


def dequantize(q: Quantized, fmt: KVFormat) -> Tensor:
    """Return float32 values [..., tokens, head_dim]."""
    codes, axis = _grouped(q.codes, fmt)
    scale = decode_scales(q.scales, fmt.scale_dtype).unsqueeze(axis)
    if fmt.grid != "uniform":
        points = grids.levels(fmt.grid, fmt.bits).to(codes.device)[codes.long()]
        return _ungrouped(points * scale, fmt)
    if q.zeros is None:
        return _ungrouped((codes.to(torch.float32) - (2**fmt.bits - 1) / 2) * scale, fmt)
    return _ungrouped(codes.to(torch.float32) * scale + q.zeros.to(torch.float32).unsqueeze(axis), fmt)


def to_bytes(x: Tensor, fmt: KVFormat, exact_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Encode [..., tokens, head_dim] into the bytes of a page's sections: codes, scales and zeros, each [..., bytes].

    Exact formats put the values themselves, in ``exact_dtype`` (float32 for 32 bits), into the first section.
    """
    empty = torch.empty((*x.shape[:-2], 0), dtype=torch.uint8, device=x.device)
    if fmt.is_exact:
        values = x.to(torch.float32 if fmt.bits == 32 else exact_dtype).contiguous()
        return values.view(torch.uint8).flatten(-2), empty, empty
    q = quantize(x, fmt)
    zeros = empty if q.zeros is None else q.zeros.contiguous().view(torch.uint8).flatten(-2)
    return pack(q.codes.flatten(-2), fmt.bits), q.scales.contiguous().view(torch.uint8).flatten(-2), zeros


def from_bytes(
    codes: Tensor, scales: Tensor, zeros: Tensor, fmt: KVFormat, exact_dtype: torch.dtype, head_dim: int
) -> Tensor:
    """Undo :func:`to_bytes`: [..., tokens, head_dim], float32, or the exact dtype for exact formats."""
    if fmt.is_exact:
        dtype = torch.float32 if fmt.bits == 32 else exact_dtype
        values: Tensor = codes.contiguous().view(dtype).unflatten(-1, (-1, head_dim))
        return values
    rows = head_dim // fmt.group if fmt.axis == "token" else head_dim
    scales = scales.contiguous()
    if fmt.scale_dtype == "float16":
        scales = scales.view(torch.float16)
    q = Quantized(
        unpack(codes, fmt.bits).unflatten(-1, (-1, head_dim)),
        scales.unflatten(-1, (-1, rows)),
        None if fmt.symmetric else zeros.contiguous().view(torch.float16).unflatten(-1, (-1, rows)),
    )
    return dequantize(q, fmt)
