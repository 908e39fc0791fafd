"""The 4-bit codes of a checkpoint's layers, as the native runtime multiplies them: the very same weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcli.quant.stored import BnbLinear, GptqLinear, StoredLinear
from kvcli.runtime.linear import Codes, Grid

LARGEST_GROUP = 1024
# QLoRA's levels (arXiv:2305.14314), as csrc/cpu/int4.h has them.
NF4 = (
    -1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.07958030, 0.16093020,
    0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0,
)  # fmt: skip


def codes_of(layers: Sequence[StoredLinear]) -> Codes | None:
    """Return the codes of layers that read the same input, one on top of the other.

    None for what the kernels do not read, which is then computed in 16 bits: 8-bit weights, FP4, groups that are no
    multiple of 8, scales that are no float16, and layers that read their input in different orders.
    """
    if not layers:
        return None
    parts = [_gptq(x) if isinstance(x, GptqLinear) else _nf4(x) if isinstance(x, BnbLinear) else None for x in layers]
    found = [x for x in parts if x is not None]
    if len(found) < len(parts) or len({x.grid for x in found}) > 1 or not _same(found):
        return None
    group = math.gcd(*(x.group for x in found))
    scale, zero = (
        torch.cat([getattr(x, name).repeat_interleave(x.group // group, 1) for x in found])
        for name in ("scale", "zero")
    )
    return Codes(torch.cat([x.codes for x in found]), scale, zero, group, found[0].grid, found[0].order)


def _same(parts: Sequence[Codes]) -> bool:
    """Whether all read their input in the same order."""
    first = parts[0].order
    if first is None:
        return all(x.order is None for x in parts)
    return all(x.order is not None and torch.equal(x.order, first) for x in parts)


def _gptq(layer: GptqLinear) -> Codes | None:
    if layer.fmt.bits > 4:
        return None
    codes, scale, zero, at = layer.parts()
    order: Tensor | None = None
    if bool((at.diff() < 0).any()):  # act-order: columns are taken group by group
        order = at.argsort(stable=True)
        codes, at = codes[:, order], at[order]
    ends = [*(at.diff().nonzero().flatten() + 1).tolist(), len(at)]
    group = math.gcd(*ends)  # of a short last group, or of act-order's: the largest stretch that shares a scale
    group = max((x for x in range(8, LARGEST_GROUP + 1, 8) if group % x == 0), default=0)
    half = scale.half()
    if not group or not torch.equal(half.float(), scale):
        return None
    at = at[::group]
    return Codes(codes, half[:, at], zero.half()[:, at], group, Grid.ZERO_CODE, order)


def _nf4(layer: BnbLinear) -> Codes | None:
    if layer.is_int8:
        return None
    table, codes, scale = layer.parts()
    out, width = layer.shape
    group = codes.numel() // scale.numel()
    if group % 8 or group > LARGEST_GROUP or width % group or not torch.allclose(table, torch.tensor(NF4), atol=1e-6):
        return None
    scale = scale.view(out, -1).half()
    return Codes(codes.view(out, width), scale, torch.zeros_like(scale), group, Grid.NF4)
