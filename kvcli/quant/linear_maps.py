"""Predictors as tensors: stored in 16, 8 or 4 bits or as two factors, and applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvcli.errors import InputError
from kvcli.quant.format import KVFormat
from kvcli.quant.packing import pack, unpack
from kvcli.quant.prediction import GROUP, Linear
from kvcli.quant.quantizer import Quantized, dequantize, quantize

if TYPE_CHECKING:
    from kvcli.plan import CachePlan


@dataclass(frozen=True)
class LinearMap:
    """A weight and a bias.

    Attributes
    ----------
    weight
        [outputs, inputs].
    bias
        [outputs].
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return predictions [tokens, outputs] in float32 for inputs [tokens, inputs].

        Summed in float64, so that what one token's prediction rounds to does not depend on how many are predicted at
        once: residuals are packed in chunks of one size and read in another.
        """
        weight, bias = self.weight.to(inputs.device).double(), self.bias.to(inputs.device).double()
        return torch.addmm(bias, inputs.double(), weight.t()).float()


def factored(weight: Tensor, rank: int, second_moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of given rank whose product predicts like ``weight`` in the least squares sense.

    Reduced-rank regression (Izenman 1975): among all matrices W' of the rank, the one of least
    tr (W - W') C (W - W')ᵀ.

    Parameters
    ----------
    weight
        [outputs, inputs] float64.
    rank
        At most that of the weight.
    second_moments
        C, [inputs, inputs] float64: of the centred inputs.

    Returns
    -------
    tuple
        [outputs, rank] with orthonormal columns, and [rank, inputs].
    """
    _, vectors = torch.linalg.eigh(weight @ second_moments @ weight.t())
    left = vectors[:, -rank:]
    return left, left.t() @ weight


def _format(linear: Linear) -> KVFormat:
    return KVFormat(linear.bits, axis="token", group=GROUP)


def store(linear: Linear, parts: Mapping[str, Tensor], bias: Tensor) -> dict[str, Tensor]:
    """Return what is kept of a map, by the names of :meth:`~kvcli.quant.prediction.Linear.stored`.

    Parameters
    ----------
    linear
        How it is kept.
    parts
        ``weight``, or ``left`` and ``right``.
    bias
        [outputs].
    """
    out = {"bias": bias.float().contiguous()}
    for name, part in parts.items():
        if linear.bits == 16:
            out[name] = part.to(torch.float16).contiguous()
            continue
        fmt = _format(linear)
        q = quantize(pad(part.float(), (0, -part.shape[1] % GROUP)), fmt)
        out[name], out[f"{name}.scales"] = pack(q.codes, fmt.bits), q.scales
    return out


def restore(linear: Linear, tensors: Mapping[str, Tensor], prefix: str, shape: tuple[int, int]) -> LinearMap:
    """Rebuild a map of ``shape`` [outputs, inputs], float32, from tensors whose names begin with ``prefix``.

    Raises
    ------
    InputError
        If a tensor is missing, or of another shape.
    """
    parts: dict[str, Tensor] = {}
    for name, (_, stored) in linear.stored(*shape).items():
        found = tensors.get(prefix + name)
        if found is None:
            raise InputError(f"tensor {prefix}{name} is missing, and the plan predicts by it.")
        if tuple(found.shape) != stored:
            raise InputError(f"tensor {prefix}{name} is {list(found.shape)}, and the plan needs {list(stored)}.")
        parts[name] = found
    weights = []
    for name, (_, columns) in linear.factors(*shape).items():
        part = parts[name]
        if linear.bits != 16:
            q = Quantized(unpack(part, linear.bits), parts[f"{name}.scales"], None)
            part = dequantize(q, _format(linear))[:, :columns]
        weights.append(part.float())
    weight = weights[0] if len(weights) == 1 else weights[0] @ weights[1]
    return LinearMap(weight, parts["bias"].float())


def of_layer(plan: CachePlan, index: int, tensors: Mapping[str, Tensor]) -> dict[str, LinearMap]:
    """Rebuild the maps of one layer's keys (``k``) and values (``v``), where they are predicted.

    Raises
    ------
    InputError
        As :func:`restore`.
    """
    layer, out = plan.layers[index], {}
    for which in "kv":
        linear = None if layer.predictor is None else layer.predictor.of(which)
        if linear is not None:
            shape = (layer.width, sum(plan.layers[x.layer].width for x in linear.inputs))
            out[which] = restore(linear, tensors, f"layer.{index}.{which}.predictor.", shape)
    return out
