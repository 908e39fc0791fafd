"""How a linear layer's weights are stored in few bits, and the checkpoint layout that others read.

The layout is AutoGPTQ's: codes of a run of inputs share a scale and a whole zero point, ``w = scale * (code - zero)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcli.errors import InputError
from kvcli.quant import packing

BITS = (3, 4, 8)
TENSORS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class WeightFormat:
    """Bits of a weight matrix, and how many inputs of an output share a scale and a zero point.

    Attributes
    ----------
    bits
        3, 4 or 8.
    group
        Inputs that share a scale (float16) and a zero point (``bits``).
    symmetric
        Zero points are all the middle code, which some readers ask for.
    """

    bits: int = 4
    group: int = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(f"weights of {self.bits} bits are not stored; use one of {BITS}.")
        if self.group < 8 or self.group % 8:
            raise InputError(f"a group of {self.group} weights is not a multiple of 8.")

    @property
    def levels(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    def check(self, shape: tuple[int, int], name: str = "a layer") -> None:
        """Raise :class:`InputError` unless a matrix [out, in] divides into groups and words."""
        out, width = shape
        if width % self.group:
            raise InputError(f"{name}: {width} inputs do not divide into groups of {self.group}.")
        if width * self.bits % 32 or out * self.bits % 32:
            raise InputError(f"{name}: {out} x {width} codes of {self.bits} bits are not whole 32-bit words.")

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Every byte a matrix [out, in] takes: codes, scales, zero points, and the index of each input's group."""
        out, width = shape
        groups = width // self.group
        return out * width * self.bits // 8 + groups * out * 2 + groups * out * self.bits // 8 + 4 * width

    def groups(self, weight: Tensor) -> Tensor:
        """Return [..., in] as [..., groups, group]."""
        out: Tensor = weight.unflatten(-1, (-1, self.group))
        return out

    def grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return scales, rounded to float16, and whole zero points for levels from about ``low`` to ``high``.

        Zero lies on the grid. The zero point is at least 1, because the layout keeps it less one.
        """
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.symmetric:
            scale = (2 * torch.maximum(high, -low) / self.levels).clamp(min=2.0**-14).half().float()
            return scale, torch.full_like(scale, (self.levels + 1) // 2)
        scale = ((high - low) / self.levels).clamp(min=2.0**-14).half().float()
        return scale, (-low / scale).round().clamp(1, self.levels)

    def encode(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the nearest codes of grouped weights [..., group]; scale and zero are [..., 1]. float32 all."""
        return ((weight / scale).round() + zero).clamp(0, self.levels)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return what codes stand for."""
        return (codes - zero) * scale

    # --- AutoGPTQ's layout ------------------------------------------------------------------------------------

    def pack(self, codes: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        """Lay codes [out, in] and scales and zeros [out, groups] out as AutoGPTQ does.

        Returns
        -------
        dict
            ``qweight`` int32 [in * bits / 32, out], ``qzeros`` int32 [groups, out * bits / 32] less one, ``scales``
            float16 [groups, out] and ``g_idx`` int32 [in].
        """
        width = codes.shape[1]
        self.check((codes.shape[0], width))
        zeros = (zero.t() - 1).to(torch.uint8).contiguous()
        return {
            "qweight": _words(codes.to(torch.uint8), self.bits).t().contiguous(),
            "qzeros": _words(zeros, self.bits),
            "scales": scale.t().half().contiguous(),
            "g_idx": torch.arange(width, dtype=torch.int32) // self.group,
        }

    def unpack(self, stored: Mapping[str, Tensor], *, less: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Undo :meth:`pack`: codes uint8 [out, in], scales and zeros float32 [out, groups].

        Parameters
        ----------
        stored
            The tensors. The last group may be a short one, as AutoGPTQ makes it where inputs do not divide.
        less
            What was taken off zero points: 1, or 0 in GPTQModel's second version of the layout.

        Raises
        ------
        InputError
            If the tensors do not fit one another.
        """
        if missing := [x for x in TENSORS[:3] if x not in stored]:
            raise InputError(f"a quantised layer has no {missing[0]}.")
        codes = _codes(stored["qweight"].t().contiguous(), self.bits)
        zeros = _codes(stored["qzeros"], self.bits).t().float() + less
        scale = stored["scales"].t().float()
        groups = -(-codes.shape[1] // self.group)
        if scale.shape != zeros.shape or scale.shape != (codes.shape[0], groups):
            raise InputError("a quantised layer's tensors do not fit one another.")
        return codes, scale, zeros

    def dequantize(self, stored: Mapping[str, Tensor], *, less: int = 1) -> Tensor:
        """Return the weight float32 [out, in] that a packed layer stands for, its inputs' groups as ``g_idx`` says."""
        codes, scale, zero = self.unpack(stored, less=less)
        at = stored.get("g_idx", torch.arange(codes.shape[1]) // self.group).long()
        if at.shape != codes.shape[1:] or int(at.min()) < 0 or int(at.max()) >= scale.shape[1]:
            raise InputError("a quantised layer's g_idx names groups that are not there.")
        return (codes.float() - zero[:, at]) * scale[:, at]


def _words(codes: Tensor, bits: int) -> Tensor:
    """One little-endian bit stream a row, in words of 32 bits."""
    return packing.pack(codes, bits).flatten().view(torch.int32).view(len(codes), -1)


def _codes(words: Tensor, bits: int) -> Tensor:
    return packing.unpack(words.flatten().view(torch.uint8).view(len(words), -1), bits)
