r"""Statistical pre-calibration: choose each group's grid so that the distribution of its weights changes least.

After "Statistical pre-calibration" (arXiv:2501.09107), whose body was not available to us, and its predecessor AdpQ
(arXiv:2405.13358). What they say: no data are needed; an adaptive-LASSO penalty tells outliers from the core of the
weights; and the quantised weights are chosen by the KL divergence between both distributions. The rest is our
definition:

**Split.** The adaptive LASSO shrinks a weight to sign(w) ReLU(|w| - λ/|w|), and so keeps exactly those with
|w| > √λ: the outliers. A candidate λ is given by how many weights of a group it keeps: k = 0 … 8 % of the group.

**Grid.** For each k the levels span the core's least and greatest weight, zero included, optionally shrunk by a factor;
outliers fall on the outermost levels. Nothing is stored apart, so the format and its bits are round-to-nearest's own.

**Choice.** Both distributions are taken with a Gaussian kernel K_h as wide as h = κ steps of the group's
round-to-nearest grid:

    p(x) = 1/n Σ_j K_h(x - w_j),   q(x) = 1/n Σ_j K_h(x - ŵ_j),   KL = 1/n Σ_i log p(w_i) / q(w_i),

and the candidate with the least KL is taken; p is the same for all. With n_l weights on level l and only the levels
next to a weight within reach of the kernel, q(w_i) = Σ_l n_l/n K_h(w_i - level_l). A narrow kernel weighs squared
error, a wide one how the levels are filled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcli.quant.weight_format import WeightFormat

KAPPA = 0.25
KEPT = (0.0, 0.01, 0.02, 0.04, 0.06, 0.08)  # shares of a group that a candidate takes for outliers
SHRINK = (1.0, 0.94, 0.88)
CHUNK = 1 << 22  # weights that are worked on at once: 16 MB of float32
REACH = (-1, 0, 1)  # levels next to a weight that its density counts
SAMPLE = 512  # groups whose own density is computed for the report


@dataclass(frozen=True)
class Divergence:
    """Mean KL over groups, in nats: of round-to-nearest's grids, and of those chosen."""

    before: float
    after: float


def round_to_nearest(weight: Tensor, fmt: WeightFormat) -> tuple[Tensor, Tensor]:
    """Return scales and zeros [out, groups] of grids between each group's least and greatest weight."""
    groups = fmt.groups(weight.float())
    return fmt.grid(*groups.aminmax(dim=-1))


def precalibrate(weight: Tensor, fmt: WeightFormat, *, kappa: float = KAPPA) -> tuple[Tensor, Tensor]:
    """Return scales and zeros [out, groups] of the grids that change the weights' distribution least.

    Parameters
    ----------
    weight
        [out, in], any float dtype.
    fmt
        Bits and group.
    kappa
        Width of the kernel in steps of the round-to-nearest grid.
    """
    scales, zeros = [], []
    for part in weight.split(max(1, CHUNK // weight.shape[1])):
        groups = fmt.groups(part.float())
        width = _kernel(groups, fmt, kappa)
        best, scale, zero = torch.full(width.shape, torch.inf), torch.empty_like(width), torch.empty_like(width)
        for low, high in candidates(groups):
            s, z = fmt.grid(low, high)
            loss = -log_density(groups, fmt, s, z, width).mean(-1, keepdim=True)
            better = loss < best
            best, scale, zero = (torch.where(better, a, b) for a, b in ((loss, best), (s, scale), (z, zero)))
        scales.append(scale[..., 0])
        zeros.append(zero[..., 0])
    return torch.cat(scales), torch.cat(zeros)


def divergence(weight: Tensor, fmt: WeightFormat, scale: Tensor, zero: Tensor, *, kappa: float = KAPPA) -> Divergence:
    """Return the KL that the module's docstring defines, over a sample of groups, for both kinds of grid."""
    groups = fmt.groups(weight.float()).flatten(0, 1)
    at = torch.linspace(0, len(groups) - 1, min(SAMPLE, len(groups))).long()
    sample = groups[at]
    width = _kernel(sample, fmt, kappa)
    own = torch.stack([
        torch.exp(-0.5 * ((x[:, None] - x[None]) / h).square()).mean(-1) for x, h in zip(sample, width, strict=True)
    ]).log()  # fmt: skip
    grids = [fmt.grid(*(x[:, None] for x in sample.aminmax(dim=-1)))]
    grids.append((scale.flatten()[at, None], zero.flatten()[at, None]))
    before, after = (float((own - log_density(sample, fmt, s, z, width)).mean()) for s, z in grids)
    return Divergence(before, after)


def candidates(groups: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the least and the greatest level [..., 1] of every candidate, round-to-nearest's own first."""
    n = groups.shape[-1]
    sizes = groups.abs().sort(-1, descending=True).values
    for kept in sorted({round(share * n) for share in KEPT}):
        core = groups.abs() <= sizes[..., kept : kept + 1]  # √λ between two weights' sizes
        low = groups.where(core, torch.inf).amin(-1, keepdim=True)
        high = groups.where(core, -torch.inf).amax(-1, keepdim=True)
        for factor in SHRINK:
            yield low * factor, high * factor


def log_density(groups: Tensor, fmt: WeightFormat, scale: Tensor, zero: Tensor, width: Tensor) -> Tensor:
    """Return log q at every weight, [..., group], up to the kernel's constant; ``width`` [..., 1] is h."""
    codes = fmt.encode(groups, scale, zero).long() + 1
    filled = groups.new_zeros(*groups.shape[:-1], fmt.levels + 3)  # a level that is always empty at each end
    filled.scatter_add_(-1, codes, torch.ones_like(groups))
    density = torch.zeros_like(groups)
    for step in REACH:
        off = (groups - fmt.decode(codes - 1 + step, scale, zero)) / width
        density += filled.gather(-1, codes + step) * torch.exp(-0.5 * off.square())
    return (density / groups.shape[-1]).clamp(min=1e-30).log()


def _kernel(groups: Tensor, fmt: WeightFormat, kappa: float) -> Tensor:
    low, high = groups.aminmax(dim=-1, keepdim=True)
    return kappa * fmt.grid(low, high)[0]
