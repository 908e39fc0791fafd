"""Storage in few bits as a differentiable function: what learning sees of the cache, of weights and of activations.

The forward pass gives exactly what the packed cache would return. Backwards, rounding is passed straight through, and
the error is taken to grow and shrink with the group's own scale: with ``x̂ = x + s(x) e``, e is held constant and s(x)
is not. Holding the whole error constant would let a scaling map seem to win by growing without bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvcli.models.architectures import Rope
from kvcli.plan import CachePlan
from kvcli.protocols import Which
from kvcli.quant import transforms
from kvcli.quant.format import KVFormat
from kvcli.quant.quantizer import dequantize, quantize
from kvcli.quant.weight_format import WeightFormat
from kvcli.runtime.attention import visible
from kvcli.runtime.packed_cache import AttendingLayer
from kvcli.runtime.packed_layer import PackedLayer

_SMALLEST = 1e-12

Store = Callable[[Which, Tensor], Tensor]
"""Returns what storage gives back for keys after RoPE or values, [batch, num_kv_heads, tokens, head_dim]."""


def _with_error(x: Tensor, stored: Tensor, scale: Tensor) -> Tensor:
    """Return ``stored``, as ``x`` plus an error that is proportional to ``scale`` (which broadcasts with both)."""
    relative = (stored - x.detach()) / scale.detach().clamp(min=_SMALLEST)
    return x + relative * scale


def quantized(x: Tensor, fmt: KVFormat) -> Tensor:
    """Return [..., tokens, head_dim] as a format gives it back, float32; differentiable.

    Tokens must be a multiple of the group on the channel axis.
    """
    if fmt.is_exact:
        return x
    x = x.float()
    axis, shape = (-1, (-1, fmt.group)) if fmt.axis == "token" else (-2, (-1, fmt.group))
    grouped = x.unflatten(axis, shape)
    within = axis if fmt.axis == "token" else -2
    stored = dequantize(quantize(x.detach(), fmt), fmt).unflatten(axis, shape)
    if fmt.grid != "uniform":
        scale = (grouped.square().mean(within, keepdim=True) + _SMALLEST**2).sqrt()
    elif fmt.symmetric:
        scale = grouped.abs().amax(within, keepdim=True)
    else:
        scale = grouped.amax(within, keepdim=True) - grouped.amin(within, keepdim=True)
    out: Tensor = _with_error(grouped, stored, scale).reshape(x.shape)
    return out


def quantized_weight(weight: Tensor, fmt: WeightFormat) -> Tensor:
    """Return a matrix [out, in] rounded to the nearest levels of its groups' ranges; differentiable."""
    groups = fmt.groups(weight.float())
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale, zero = fmt.grid(low.detach(), high.detach())
    stored = fmt.decode(fmt.encode(groups.detach(), scale, zero), scale, zero)
    return _with_error(groups, stored, high.clamp(min=0) - low.clamp(max=0)).reshape(weight.shape).to(weight.dtype)


class _Hadamard(torch.autograd.Function):
    """The codec's own rotation, bit for bit; it is symmetric, and so is its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return transforms.hadamard(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return transforms.hadamard(grads[0])


class TrainingLayer(AttendingLayer):
    """One pass of attention from position 0 that reads keys and values as decoding does, with gradients.

    Parameters
    ----------
    plan, index
        Say which slots a query of this layer reads packed, and which exactly.
    store
        What packing does to keys and values.
    """

    def __init__(self, plan: CachePlan, index: int, store: Store) -> None:
        super().__init__()
        geometry = replace(plan.layers[index], center=False)  # no means are needed to tell slots apart
        self.layer, self.store = PackedLayer(plan.with_layer(index, geometry), index), store

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """Attend over packed and exact slots in one softmax."""
        heads, (batch, _, tokens, dim) = key.shape[1], query.shape
        slots = torch.arange(tokens, device=query.device)
        packed, exact, sinks = (visible(slots, slots, self.layer, x) for x in ("packed", "exact", "sinks"))
        seen = torch.cat((packed, exact | sinks), -1)
        keys = torch.cat((self.store("k", key).to(key.dtype), key), -2)
        values = torch.cat((self.store("v", value).to(value.dtype), value), -2)
        group = query.shape[1] // heads
        folded = query.reshape(batch, heads, group * tokens, dim)  # the group shares its KV head's keys
        out = scaled_dot_product_attention(folded, keys, values, attn_mask=seen.repeat(group, 1), scale=scaling)
        return out.reshape(query.shape)


class Storage:
    """What a plan's pages do to one layer's keys and values; the differentiable twin of the packed cache's codec.

    Parameters
    ----------
    plan, index
        The plan, and which of its layers this is; keys are stored after RoPE.
    rope
        The model's rotary embedding.
    means
        ``k`` (before RoPE) and ``v``, [num_kv_heads, head_dim], where the plan is centred.
    """

    def __init__(self, plan: CachePlan, index: int, rope: Rope, means: Mapping[Which, Tensor]) -> None:
        self.plan, self.rope, self.means = plan.layers[index], rope, means

    def __call__(self, which: Which, x: Tensor) -> Tensor:
        """Return what pages give back, in float32."""
        fmt = self.plan.k if which == "k" else self.plan.v
        if fmt.is_exact:
            return x
        mean = self.mean(which, x.shape[-2])
        if self.plan.transform == "none" or fmt.axis == "channel":
            return quantized(x.float() - mean, fmt) + mean
        out: Tensor = _Hadamard.apply(quantized(_Hadamard.apply(x.float() - mean), fmt))  # type: ignore[no-untyped-call]
        return out + mean

    def mean(self, which: Which, tokens: int) -> Tensor:
        """Return what is taken off first, broadcasting with [num_kv_heads, tokens, head_dim]; the keys' after RoPE."""
        if not self.plan.center:
            return torch.zeros(())
        mean = self.means[which][:, None].float()
        if which == "v":
            return mean
        return self.rope.rotate(mean.expand(-1, tokens, -1), torch.arange(tokens, device=mean.device))
