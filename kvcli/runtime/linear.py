"""Linear layers of the model runner: weights as they are, or in 4 bits.

A layer is bound once to the buffers it reads and writes; what :meth:`bind` returns then costs one call a step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Protocol

import torch
from torch import Tensor

from kvcli.errors import InputError, UsageError

GROUP = 32  # weights that share a scale and a zero point
PANEL = 64  # output rows that torch interleaves in its packing for AVX-512; 32 for AVX2
# Torch's int4 kernel is made for a few rows. On one AVX-512 core, 576 x 3072: 0.043 ms a row, against 0.95 ms to decode
# the weights and multiply in bf16, plus 0.018 ms a row: they meet at 39 rows.
FEW_ROWS = 40
SCRATCH = 1 << 21  # weights decoded at a time: 4 MB of bf16, so that they stay in the cache until they are multiplied


class Linear(Protocol):
    """``y = x W^T + b`` for W of [out, in]."""

    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""

    def bind(self, x: Tensor, out: Tensor) -> Callable[[], object]:
        """Return what computes ``out`` [rows, out features] from ``x`` [rows, in features]."""


class Dense:
    """Weights as they are.

    Parameters
    ----------
    weight
        [out features, in features].
    bias
        [out features], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.shape = (weight.shape[0], weight.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def bind(self, x: Tensor, out: Tensor) -> Callable[[], object]:
        """Return what computes ``out`` [rows, out features] from ``x`` [rows, in features]."""
        if self.bias is None:
            return partial(torch.mm, x, self.weight.t(), out=out)
        return partial(torch.addmm, self.bias, x, self.weight.t(), out=out)


class Scratch:
    """Where all int4 layers decode their weights, one after the other."""

    def __init__(self) -> None:
        self.weights = torch.empty(0, dtype=torch.bfloat16)
        self.codes = torch.empty(0, dtype=torch.uint8)

    def reserve(self, weights: int) -> None:
        """Make room for so many."""
        if self.weights.numel() < weights:
            self.weights = torch.empty(weights, dtype=torch.bfloat16)
            self.codes = torch.empty(weights // 2, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.weights.nbytes + self.codes.nbytes


class Int4:
    """Weights in 4 bits: ``(code - 8) * scale + zero``, with a bf16 scale and zero for 32 inputs of an output.

    Codes are the nearest ones between the group's minimum and maximum. They are kept only in torch's own packing.

    Parameters
    ----------
    weight
        [out features, in features], any float dtype.
    bias
        [out features], or None.
    scratch
        Shared by all layers of a model.
    few_rows
        Rows up to which torch's int4 kernel is used rather than decoded weights.

    Raises
    ------
    InputError
        If the inputs do not divide into groups.
    UsageError
        If the weights are not on the CPU.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, scratch: Scratch | None = None, few_rows: int = FEW_ROWS
    ) -> None:
        if weight.device.type != "cpu":
            raise UsageError("int4 weights run on the CPU only; leave out --weights int4 on a GPU.")
        n, k = self.shape = (weight.shape[0], weight.shape[1])
        if k % GROUP:
            raise InputError(f"a layer of {k} inputs does not divide into groups of {GROUP} for int4 weights.")
        self.scratch = scratch or Scratch()
        # without a packing that is understood the kernel has to serve any number of rows
        self.few_rows = few_rows if interleaves_halves() else 1 << 30
        self.bias = None if bias is None else bias.to(torch.bfloat16)
        rows = -(-n // PANEL) * PANEL
        self.packed = torch.empty(0, dtype=torch.uint8)
        packed, scales = [], []
        for part in weight.split(max(PANEL, SCRATCH // k // PANEL * PANEL)):  # float32 and int32 copies of a part only
            full = torch.zeros(-(-part.shape[0] // PANEL) * PANEL, k)
            full[: part.shape[0]] = part
            codes, scale, zero = quantise(full)
            packed.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
            scales.append(torch.stack((scale.t(), zero.t()), -1))
        self.packed = torch.cat(packed)
        self.scales = torch.cat(scales, 1).contiguous()
        assert self.packed.shape[0] == rows

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zeros and bias."""
        return self.packed.nbytes + self.scales.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def bind(self, x: Tensor, out: Tensor) -> Callable[[], object]:
        """Return what computes ``out`` from ``x``: bf16 [rows, out features] and [rows, in features]."""
        return partial(self._few if x.shape[0] <= self.few_rows else self._many, x, out)

    def _few(self, x: Tensor, out: Tensor) -> None:
        found = torch.ops.aten._weight_int4pack_mm_for_cpu.default(x, self.packed, GROUP, self.scales)
        if found.shape[1] != out.shape[1]:
            found = found[:, : out.shape[1]]
        if self.bias is None:
            out.copy_(found)
        else:
            torch.add(found, self.bias, out=out)

    def _many(self, x: Tensor, out: Tensor) -> None:
        for first, last in self._pieces():
            torch.mm(x, self._decode(first, last)[:, : self.shape[0] - first], out=out[:, first:last])
        if self.bias is not None:
            out.add_(self.bias)

    def _pieces(self) -> list[tuple[int, int]]:
        step = max(PANEL, SCRATCH // self.shape[1] // PANEL * PANEL)
        rows = self.packed.shape[0]
        return [(first, min(first + step, rows)) for first in range(0, rows, step)]

    def _decode(self, first: int, last: int) -> Tensor:
        """Decode output features ``first`` … ``last`` into the scratch: bf16 [in features, last - first]."""
        n, k, half = last - first, self.shape[1], panel() // 2
        self.scratch.reserve(n * k)
        out = self.scratch.weights[: n * k].view(k, n)
        panels = self.packed[first:last].view(-1, k, half)
        codes = self.scratch.codes[: n * k // 2].view(panels.shape)
        halves = out.view(k, -1, 2, half).permute(2, 1, 0, 3)  # [2, panels, in features, half a panel]
        for i, target in enumerate(halves):
            _ = torch.bitwise_right_shift(panels, 4, out=codes) if i else torch.bitwise_and(panels, 15, out=codes)
            codes.sub_(8)  # wraps around, as a signed byte wants it
            target.copy_(codes.view(torch.int8))
        scale, zero = self.scales[:, None, first:last].unbind(-1)
        grouped = out.view(k // GROUP, GROUP, n)
        torch.addcmul(zero.contiguous(), grouped, scale.contiguous(), out=grouped)
        return out

    def dense(self) -> Tensor:
        """Return the weights that this layer computes with, float32 [out features, in features]."""
        eye = torch.eye(self.shape[1], dtype=torch.bfloat16)
        found: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu.default(eye, self.packed, GROUP, self.scales)
        return found.t()[: self.shape[0]].float()


def quantise(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round weights to 16 levels between the minimum and the maximum of each group.

    Parameters
    ----------
    weight
        float32 [out features, in features].

    Returns
    -------
    tuple
        Codes int32 [out, in], 0 … 15; scales and zero points bf16 [out, in / group].
    """
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=-1)
    flat = low == high
    scale = torch.where(flat, 1.0, (high - low) / 15).to(torch.bfloat16)
    zero = torch.where(flat, low, low + 8 * scale.float()).to(torch.bfloat16)
    codes = ((groups - zero.float()[..., None]) / scale.float()[..., None]).round() + 8
    return codes.clamp(0, 15).to(torch.int32).flatten(1), scale, zero


@cache
def panel() -> int:
    """Output features that torch interleaves on this machine."""
    return {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 64)


@cache
def interleaves_halves() -> bool:
    """Whether torch packs int4 as :meth:`Int4._decode` reads it: a panel's first half in the low bits of its bytes."""
    codes = torch.randint(0, 16, (2 * PANEL, 64), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    if packed.numel() != codes.numel() // 2 or packed.dtype != torch.uint8:
        return False
    panels = packed.view(-1, 64, panel() // 2)
    read = torch.cat((panels & 15, panels >> 4), -1).permute(0, 2, 1).reshape(codes.shape)
    return torch.equal(read.to(torch.int32), codes)


class Blocks:
    """A linear layer computed in blocks of one size, so that no row depends on how many there are.

    Parameters
    ----------
    linear
        The layer.
    size
        Rows of a block; ``x`` and ``out`` have a multiple of it.
    """

    def __init__(self, linear: Linear, size: int) -> None:
        self.linear, self.size, self.shape = linear, size, linear.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self.linear.nbytes

    def bind(self, x: Tensor, out: Tensor) -> Callable[[], object]:
        """Return what computes ``out`` [rows, out features] from ``x`` [rows, in features]."""
        steps = [self.linear.bind(a, b) for a, b in zip(x.split(self.size), out.split(self.size), strict=True)]

        def run() -> None:
            for step in steps:
                step()

        return steps[0] if len(steps) == 1 else run
