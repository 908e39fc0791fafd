"""Linear layers of the model runner: weights as they are, or in 4 bits.

A layer is bound once to the buffers it reads and writes; what :meth:`bind` returns then costs one call a step.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from kvcli.errors import InputError, UsageError
from kvcli.runtime import kvrt

GROUP = 32  # weights that share a scale and a zero point, where the runtime rounds them itself
TILE = 16  # outputs that lie side by side
# One AVX-512 core writes 3072 x 576 weights out in 0.57 ms and multiplies them in bf16 in 0.016 ms a row; it multiplies
# their codes in 0.024 ms a row. From 64 rows on writing out is the faster.
FEW_ROWS = 64
SCRATCH = 1 << 21  # weights written out at a time: 4 MB of bf16, so that they stay in the cache until they are read


Activations = Literal[8, 16]


class Grid(IntEnum):
    """How a code becomes a weight, as ``kvrt.h`` numbers it."""

    ZERO_WEIGHT = 0  # code * scale + zero
    ZERO_CODE = 1  # (code - zero) * scale
    NF4 = 2  # NF4[code] * scale


@dataclass(frozen=True)
class Codes:
    """Weights in 4 bits.

    Attributes
    ----------
    codes
        [out, in], 0 … 15.
    scale, zero
        float16 [out, in / group].
    group
        Inputs that share them: a multiple of 8, 1024 at the most.
    grid
        What they mean.
    order
        int64 [in], the input that each column reads; None where columns are in order.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group: int = GROUP
    grid: Grid = Grid.ZERO_WEIGHT
    order: Tensor | None = None


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
    """Where all int4 layers write their weights out, one after the other."""

    def __init__(self) -> None:
        self.weights = torch.empty(0, dtype=torch.bfloat16)

    def reserve(self, weights: int) -> Tensor:
        """Return room for so many."""
        if self.weights.numel() < weights:
            self.weights = torch.empty(weights, dtype=torch.bfloat16)
        return self.weights[:weights]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.weights.nbytes


class Int4:
    """Weights in 4 bits, with a float16 scale and zero for a group of inputs of an output.

    They are kept only as the kernels read them. Activations and results are bf16, results also float32. Products round
    each group of activations to integers with a scale of its own. With 16 bits that costs nothing that could be
    measured, and many rows are faster multiplied in bf16, by weights written out; with 8, as in llama.cpp's Q8_0, the
    integers are the fastest for any number of rows.

    Parameters
    ----------
    weight
        Codes as they are stored; or weights [out features, in features] of any float dtype, which are rounded to the
        nearest of 16 levels between the minimum and the maximum of 32 inputs.
    bias
        [out features], or None.
    scratch
        Shared by all layers of a model.
    threads
        Of the kernels; 0 for as many as torch uses.
    activations
        Bits of them in products of integers.
    few_rows
        Rows up to which codes are multiplied rather than weights written out, with activations of 16 bits.

    Attributes
    ----------
    rows_alone
        Whether the result of no row depends on how many there are.

    Raises
    ------
    InputError
        If the inputs do not divide into groups.
    UsageError
        If the weights are not on the CPU.
    """

    def __init__(
        self,
        weight: Tensor | Codes,
        bias: Tensor | None = None,
        *,
        scratch: Scratch | None = None,
        threads: int = 0,
        activations: Activations = 16,
        few_rows: int = FEW_ROWS,
    ) -> None:
        given = weight.codes if isinstance(weight, Codes) else weight
        if given.device.type != "cpu":
            raise UsageError("int4 weights run on the CPU only; leave out --weights int4 on a GPU.")
        self.shape = (given.shape[0], given.shape[1])
        self.scratch, self.few_rows, self.activations = scratch or Scratch(), few_rows, activations
        self.rows_alone = activations == 8
        self.bias = None if bias is None else bias.to(torch.bfloat16)
        self.exec = kvrt.Exec(threads or torch.get_num_threads(), 0, None)
        self.library = kvrt.library("cpu")
        if isinstance(weight, Codes):
            self.group, self.grid, self.order = weight.group, weight.grid, weight.order
            self.packed = pack(weight.codes, weight.scale, weight.zero, weight.group)
            return
        check_width(weight.shape[1])
        self.group, self.grid, self.order = GROUP, Grid.ZERO_WEIGHT, None
        rows = max(TILE, SCRATCH // weight.shape[1] // TILE * TILE)  # float32 and int32 copies of a part only
        self.packed = torch.cat([pack(*quantise(part.float())) for part in weight.split(rows)])

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zeros and bias."""
        return self.packed.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def bind(self, x: Tensor, out: Tensor) -> Callable[[], object]:
        """Return what computes ``out`` [rows, out features] from ``x``, bf16 [rows, in features]."""
        order = self.order
        if order is None:
            return self._bind(x, out)
        ordered = torch.empty_like(x)
        run = self._bind(ordered, out)

        def gather() -> None:
            torch.index_select(x, 1, order, out=ordered)
            run()

        return gather

    def _bind(self, x: Tensor, out: Tensor) -> Callable[[], object]:
        if x.shape[0] > self.few_rows and not self.rows_alone:
            return partial(self._many, x, out)
        return self.library.bind(
            "int4_matmul", out.data_ptr(), x.data_ptr(), self.packed.data_ptr(),
            kvrt.pointer(self.bias), x.shape[0], *self.shape, self.group, self.grid, kvrt.DTYPES[x.dtype],
            kvrt.DTYPES[out.dtype], self.activations, byref(self.exec), kept=(x, out),
        )  # fmt: skip

    def _many(self, x: Tensor, out: Tensor) -> None:
        step = max(TILE, SCRATCH // self.shape[1] // TILE * TILE)
        for first in range(0, self.shape[0], step):
            piece = out[:, first : first + step]
            weights = self._expand(first, min(step, TILE * len(self.packed) - first))[:, : piece.shape[1]]
            if out.dtype == x.dtype:
                torch.mm(x, weights, out=piece)
            else:
                piece.copy_(torch.mm(x, weights))
        if self.bias is not None:
            out.add_(self.bias)

    def _expand(self, first: int, count: int) -> Tensor:
        """Write the weights of outputs from ``first`` on into the scratch: bf16 [in features, count]."""
        out = self.scratch.reserve(count * self.shape[1]).view(self.shape[1], count)
        self.library.call(
            "int4_expand", out.data_ptr(), self.packed.data_ptr(), first, count, self.shape[1], self.group, self.grid,
            byref(self.exec),
        )  # fmt: skip
        return out


def check_width(width: int) -> None:
    """Raise :class:`InputError` unless inputs divide into groups."""
    if width % GROUP:
        raise InputError(f"a layer of {width} inputs does not divide into groups of {GROUP} for int4 weights.")


def pack(codes: Tensor, scale: Tensor, zero: Tensor, group: int = GROUP) -> Tensor:
    """Lay codes [out, in], scales and zeros [out, in / group] out in tiles, as ``csrc/cpu/int4.h`` shows.

    Returns
    -------
    Tensor
        uint8 [tiles, groups, 64 + 8 * group]; outputs are padded with zeros to a multiple of 16.
    """
    padding = (0, 0, 0, -codes.shape[0] % TILE)
    codes = torch.nn.functional.pad(codes.to(torch.uint8), padding)
    tiles = codes.view(-1, TILE, codes.shape[1] // group, group // 8, 2, 4)  # output, group, vector, half, byte
    low, high = tiles.permute(0, 2, 3, 4, 1, 5).unbind(3)
    scales = torch.stack([torch.nn.functional.pad(x, padding) for x in (scale, zero)])
    rows = scales.view(2, -1, TILE, scale.shape[1]).permute(1, 3, 0, 2).contiguous().view(torch.uint8)
    return torch.cat((rows.flatten(2), (low | high << 4).flatten(2)), -1)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round weights to 16 levels between the minimum and the maximum of each group.

    Parameters
    ----------
    weight
        float32 [out features, in features].

    Returns
    -------
    tuple
        Codes int32 [out, in], 0 … 15; scales and zero points float16 [out, in / group].
    """
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=-1)
    # weights that are all alike need any scale but none that is zero
    scale, zero = ((high - low) / 15).to(torch.float16).clamp(min=2.0**-24), low.to(torch.float16)
    codes = ((groups - zero.float()[..., None]) / scale.float()[..., None]).round()
    return codes.clamp(0, 15).to(torch.int32).flatten(1), scale, zero


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
