"""Simulated low-bit activations: what linear layers read is rounded per token, and computed in the model's own dtype.

For comparison with published W4A4KV4 figures only: nothing runs faster, and no kernel of this package reads such
activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcli.calibration.fusing import rotating_down
from kvcli.errors import UsageError
from kvcli.quant.transforms import hadamard

BITS = (2, 3, 4, 5, 6, 7, 8)


def quantized(x: Tensor, bits: int) -> Tensor:
    """Return [..., channels] rounded to 2**bits levels between each token's least and largest value.

    Asymmetric, one scale and zero point a token, in float32. Backwards, rounding is passed straight through.
    """
    wide = x.float()
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    codes = (wide - low) / scale
    rounded = codes + (codes.round() - codes).detach()
    out: Tensor = (rounded * scale + low).to(x.dtype)
    return out


@contextmanager
def quantizing_inputs(module: torch.nn.Module, bits: int | None) -> Iterator[None]:
    """Round what every linear layer inside ``module`` reads while the block runs; None leaves all as it is.

    Raises
    ------
    UsageError
        For bits that are not among :data:`BITS`.
    """
    if bits is not None and bits not in BITS:
        raise UsageError(f"activations of {bits} bits are not simulated; use {BITS[0]} to {BITS[-1]}.")

    def rounded(layer: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        assert bits is not None
        return (quantized(inputs[0], bits), *inputs[1:])

    with ExitStack() as stack:
        if bits is not None:
            for layer in (x for x in module.modules() if isinstance(x, torch.nn.Linear)):
                stack.callback(layer.register_forward_pre_hook(rounded).remove)
        yield


@contextmanager
def simulating(model: PreTrainedModel, bits: int, *, rotate_down: bool = False) -> Iterator[None]:
    """Round the inputs of all decoder layers' linear layers to ``bits`` while the block runs; lm_head's stay.

    Parameters
    ----------
    rotate_down
        Rotate down's input first, and down's weights with it, so that the function stays: H_down of OSTQuant.

    Raises
    ------
    UsageError
        For bits that are not among :data:`BITS`.
    """
    with ExitStack() as stack:
        if rotate_down:
            for layer in model.model.layers:
                stack.callback(setattr, layer.mlp.down_proj.weight, "data", layer.mlp.down_proj.weight.data)
                layer.mlp.down_proj.weight.data = hadamard(layer.mlp.down_proj.weight.data)
            stack.enter_context(rotating_down(model))
        stack.enter_context(quantizing_inputs(model.model.layers, bits))
        yield
