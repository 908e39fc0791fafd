"""QSUR: how much of the space that a quantiser spans its data fills.

After Hu et al., arXiv:2501.13987 (OSTQuant). Data is taken for a Gaussian; its volume is the ellipsoid that holds it
with confidence alpha, and the quantiser, with one scale for all channels of a vector, spans a cube:

- c = χ²_d(alpha), the quantile of the χ² distribution with d degrees of freedom;
- V_X = π^(d/2) / Γ(d/2 + 1) · c^(d/2) · √det Σ;
- V_cube = (max_j (μ_j + √(c Σ_jj)) - min_j (μ_j - √(c Σ_jj)))^d;
- QSUR = V_X / V_cube.

The paper takes the cube from the ends of the ellipsoid's principal axes, which for a general ellipsoid are not its
extremes along the channels; ours are. QSUR is at most that of a ball in its cube, π^(d/2) / (Γ(d/2 + 1) 2^d), which
shrinks quickly with d, so what is reported is QSUR^(1/d). It is a diagnostic, not a loss. All is computed in
logarithms: at d = 256 the volumes themselves are out of float64's range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcli.calibration.capture import layer_inputs
from kvcli.errors import InputError, UsageError
from kvcli.models.architectures import Rope
from kvcli.plan import CachePlan
from kvcli.protocols import Transform, Which

ALPHA = 0.99
_KV: tuple[Which, ...] = ("k", "v")


@dataclass
class Moments:
    """Mean and scatter of the vectors of several heads, gathered in pieces (Chan, Golub & LeVeque), in float64.

    Attributes
    ----------
    mean
        [h, d].
    scatter
        [h, d, d]: the sum of (x - mean)ᵀ(x - mean).
    count
        Vectors of each head.
    """

    mean: Tensor
    scatter: Tensor
    count: int = 0

    @classmethod
    def empty(cls, heads: int, head_dim: int) -> Moments:
        """Return the moments of nothing."""
        zeros = torch.zeros(heads, head_dim, head_dim, dtype=torch.float64)
        return cls(zeros[:, 0].clone(), zeros)

    def add(self, x: Tensor) -> None:
        """Take in vectors [..., h, n, d] of any float dtype."""
        heads, d = self.mean.shape
        rows = x.detach().double().cpu().transpose(-2, -3).reshape(-1, heads, d).transpose(0, 1)  # [h, vectors, d]
        new = rows.shape[1]
        if not new:
            return
        mean = rows.mean(1)
        centred = rows - mean[:, None]
        delta, total = mean - self.mean, self.count + new
        self.scatter = self.scatter + centred.mT @ centred
        self.scatter += delta[:, :, None] * delta[:, None, :] * (self.count * new / total)
        self.mean = self.mean + delta * (new / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """Unbiased, [h, d, d].

        Raises
        ------
        InputError
            If there are not more vectors than channels: the ellipsoid would be flat.
        """
        if self.count <= self.mean.shape[-1]:
            raise InputError(f"{self.count} tokens say nothing about {self.mean.shape[-1]} channels; give more text.")
        return self.scatter / (self.count - 1)

    def mapped(self, linear: Callable[[Tensor], Tensor]) -> Moments:
        """Return the moments of ``linear``'s outputs, a linear map of [h, n, d] that keeps the shape."""
        mean = linear(self.mean[:, None])[:, 0]
        return Moments(mean, linear(linear(self.scatter).mT).mT, self.count)


def log_qsur(mean: Tensor, covariance: Tensor, alpha: float = ALPHA) -> Tensor:
    """Return the natural logarithm of QSUR, float64 [...]; minus infinity for a singular covariance.

    Parameters
    ----------
    mean
        [..., d].
    covariance
        [..., d, d], positive semidefinite.
    alpha
        Confidence of the ellipsoid, between 0 and 1.
    """
    d = mean.shape[-1]
    mean, covariance = mean.double(), covariance.double()
    c = chi2_quantile(alpha, d)
    sign, log_det = torch.linalg.slogdet(covariance)
    log_det = log_det.masked_fill(sign <= 0, -math.inf)
    log_ball = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
    reach = (c * covariance.diagonal(dim1=-2, dim2=-1)).sqrt()
    side = (mean + reach).amax(-1) - (mean - reach).amin(-1)
    volume = log_ball + d / 2 * math.log(c) + log_det / 2
    return torch.where(volume == -math.inf, volume, volume - d * side.log())  # no volume: no cube either, perhaps


def qsur(mean: Tensor, covariance: Tensor, alpha: float = ALPHA) -> Tensor:
    """Return QSUR^(1/d), float64 [...]; arguments as in :func:`log_qsur`."""
    return (log_qsur(mean, covariance, alpha) / mean.shape[-1]).exp()


@cache
def chi2_quantile(alpha: float, d: int) -> float:
    """Return the alpha-quantile of the χ² distribution with ``d`` degrees of freedom, by bisection.

    Raises
    ------
    UsageError
        Unless 0 < alpha < 1.
    """
    if not 0 < alpha < 1:
        raise UsageError(f"The confidence alpha must lie between 0 and 1, and {alpha} does not.")
    half = torch.tensor(d / 2, dtype=torch.float64)
    tail = -math.log1p(-alpha)
    low, high = 0.0, d + 2 * math.sqrt(d * tail) + 2 * tail  # Laurent and Massart's bound
    while low < (middle := (low + high) / 2) < high:
        if torch.special.gammainc(half, torch.tensor(middle / 2, dtype=torch.float64)) < alpha:
            low = middle
        else:
            high = middle
    return high


@torch.no_grad()
def kv_moments(
    model: PreTrainedModel, plan: CachePlan, batches: Iterable[Tensor], *, before: Rope | None = None, skip: int = 0
) -> list[dict[Which, Moments]]:
    """Return the moments of every layer's keys and values on [batch, tokens] ids, each window from position 0.

    Parameters
    ----------
    plan
        Only its layers' geometry is meant.
    before
        The model's rotary embedding, for keys as they are before RoPE; otherwise they are taken after it.
    skip
        First tokens of each window to leave out, such as exact sinks.
    """
    moments: list[dict[Which, Moments]] = [
        {which: Moments.empty(x.num_kv_heads, x.head_dim) for which in _KV} for x in plan.layers
    ]
    for ids in batches:
        for i, _, seen in layer_inputs(model, plan, ids):
            key = seen.key
            if before is not None:
                key = before.unrotate(key, torch.arange(key.shape[-2], device=key.device))
            moments[i]["k"].add(key[..., skip:, :])
            moments[i]["v"].add(seen.value[..., skip:, :])
    return moments


def report(
    moments: Sequence[Mapping[Which, Moments]], maps: Sequence[Transform] = (), *, alpha: float = ALPHA,
    online: Callable[[Tensor], Tensor] | None = None,
) -> list[dict[str, list[float]]]:  # fmt: skip
    """Return QSUR^(1/d) of every layer's heads, ``[{"k": [h numbers], "v": [h numbers]}, …]``.

    Parameters
    ----------
    moments
        Of the model before ``maps`` were fused, from :func:`kv_moments`; keys on either side of RoPE.
    maps
        What is to be fused. Maps are linear, so the fused model need not be run.
    online
        A rotation of both keys and values on top of it, such as the plan's Hadamard.
    """

    def of(layer: int, which: Which, own: Moments) -> list[float]:
        for each in maps:
            own = own.mapped(lambda x, each=each: each.forward(layer, which, x))  # type: ignore[misc]
        if online is not None:
            own = own.mapped(online)
        numbers: list[float] = qsur(own.mean, own.covariance, alpha).tolist()
        return numbers

    return [{which: of(i, which, heads[which]) for which in _KV} for i, heads in enumerate(moments)]
