"""Linear layers as checkpoints store them in few bits: AutoGPTQ's layout, and bitsandbytes'.

A layer knows its tensors, by what follows its name in a checkpoint, and the weight that they stand for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kvcli.errors import InputError, UsageError
from kvcli.quant.weight_format import WeightFormat

NF4_BLOCK = 64  # weights that share a scale, as in QLoRA
NESTED = 256  # scales that share a scale, where they are stored in 8 bits themselves


class StoredLinear(Protocol):
    """One layer's weight, stored in few bits."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What a checkpoint holds, by what follows the layer's name and a dot."""

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""

    def dequantize(self) -> Tensor:
        """Return the weight, float32 [out, in]."""


@dataclass(frozen=True)
class GptqLinear:
    """A layer in AutoGPTQ's layout.

    Attributes
    ----------
    tensors
        ``qweight``, ``qzeros``, ``scales`` and perhaps ``g_idx``.
    fmt
        Bits and group.
    less
        What was taken off the zero points before they were packed; 0 in GPTQModel's second version of the layout.
    """

    tensors: Mapping[str, Tensor]
    fmt: WeightFormat
    less: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        words, out = self.tensors["qweight"].shape
        return out, words * 32 // self.fmt.bits

    def dequantize(self) -> Tensor:
        """Return the weight, float32 [out, in]; raises :class:`InputError` if the tensors do not fit one another."""
        return self.fmt.dequantize(self.tensors, less=self.less)

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return codes uint8 [out, in], scales and zero points float32 [out, groups], and inputs' groups int64 [in]."""
        codes, scale, zero = self.fmt.unpack(self.tensors, less=self.less)
        plain = torch.arange(codes.shape[1]) // self.fmt.group
        return codes, scale, zero, self.tensors.get("g_idx", plain).long()


@dataclass(frozen=True)
class BnbLinear:
    """A layer as bitsandbytes stores it: NF4 or FP4 in blocks (QLoRA, arXiv:2305.14314), or LLM.int8's rows of int8.

    Attributes
    ----------
    tensors
        ``weight`` and what stands beside it.
    shape
        Outputs and inputs.
    """

    tensors: Mapping[str, Tensor]
    shape: tuple[int, int]

    @property
    def is_int8(self) -> bool:
        """Whether it is a layer of LLM.int8 (arXiv:2208.07339)."""
        return "SCB" in self.tensors

    def dequantize(self) -> Tensor:
        """Return the weight, float32 [out, in]; raises :class:`InputError` for tensors that do not fit one another."""
        weight = self.tensors["weight"]
        if self.is_int8:
            scale = self.tensors["SCB"].float()
            if weight.dtype != torch.int8 or tuple(weight.shape) != self.shape or scale.numel() != self.shape[0]:
                raise InputError("an int8 layer's tensors do not fit one another.")
            return weight.float() * scale.view(-1, 1) / 127
        table, codes, scale = self.parts()
        return (table[codes.long()].view(len(scale), -1) * scale[:, None]).view(self.shape)

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the table float32 [16], codes uint8 [out * in], and scales float32 [blocks] of a layer in 4 bits.

        Raises
        ------
        InputError
            If the tensors do not fit one another.
        UsageError
            If bitsandbytes is not installed.
        """
        functional = library().functional
        beside = {name: x for name, x in self.tensors.items() if name.startswith("weight.")}
        try:
            state = functional.QuantState.from_dict(beside, torch.device("cpu"))
            scale = state.absmax
            if state.nested:
                scale = functional.dequantize_blockwise(scale, state.state2) + state.offset
        except (KeyError, ValueError, RuntimeError, AttributeError, TypeError, AssertionError) as error:
            raise InputError("a layer's tensors are not what bitsandbytes stores beside 4-bit weights.") from error
        packed = self.tensors["weight"].flatten()
        codes = torch.stack((packed >> 4, packed & 15), -1).flatten()
        fits = tuple(state.shape) == self.shape and codes.numel() == self.shape[0] * self.shape[1]
        if packed.dtype != torch.uint8 or not fits or scale.numel() * state.blocksize != codes.numel():
            raise InputError("a 4-bit layer's tensors do not fit one another.")
        return state.code.float(), codes, scale.float()


def nf4(weight: Tensor) -> BnbLinear:
    """Return a weight [out, in] in NF4: blocks of 64, whose scales are stored in 8 bits, 4.127 bits a weight.

    Raises
    ------
    InputError
        If the weights do not divide into blocks.
    UsageError
        If bitsandbytes is not installed.
    """
    if weight.numel() % NF4_BLOCK:
        raise InputError(f"{weight.shape[0]} x {weight.shape[1]} weights do not divide into blocks of {NF4_BLOCK}.")
    functional = library().functional
    packed, state = functional.quantize_4bit(
        weight.float().contiguous(), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=True
    )
    beside = {f"weight.{name}": x for name, x in state.as_dict(packed=True).items()}
    return BnbLinear({"weight": packed, **beside}, (weight.shape[0], weight.shape[1]))


def llm_int8(weight: Tensor) -> BnbLinear:
    """Return a weight [out, in] as LLM.int8 stores it: a scale for each output."""
    largest = weight.float().abs().amax(1)
    codes = (weight.float() / largest.clamp(min=1e-30)[:, None] * 127).round().to(torch.int8)
    return BnbLinear({"weight": codes, "SCB": largest}, (weight.shape[0], weight.shape[1]))


def library() -> Any:
    """Return the module bitsandbytes, or raise :class:`UsageError`."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that nothing here calls
    try:
        import bitsandbytes
    except ImportError:
        raise UsageError("weights of bitsandbytes need that package: pip install 'kvcli[bnb]'.") from None
    return bitsandbytes
