"""Sums over tokens from which predictors are solved: means and second moments of keys and values, in float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from kvcli.errors import InputError


@dataclass
class Moments:
    """Counts, sums and sums of products of named tensors.

    Attributes
    ----------
    count
        Tokens added.
    sums
        By name, [width] float64.
    products
        By pair of names, in one order only, [width of the first, width of the second] float64.
    """

    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    products: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def add(self, tensors: Mapping[str, Tensor], pairs: Iterable[tuple[str, str]]) -> None:
        """Add the same tokens of several tensors, [tokens, width] each, and the products of ``pairs`` of them."""
        wide = {name: x.double() for name, x in tensors.items()}
        self.count += len(next(iter(wide.values())))
        for name, x in wide.items():
            self.sums[name] = self.sums[name] + x.sum(0) if name in self.sums else x.sum(0)
        for a, b in pairs:
            product = wide[a].t() @ wide[b]
            self.products[a, b] = self.products[a, b] + product if (a, b) in self.products else product

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both texts."""
        if not self.count or not other.count:
            return self if self.count else other
        return Moments(
            self.count + other.count,
            {name: x + other.sums[name] for name, x in self.sums.items()},
            {pair: x + other.products[pair] for pair, x in self.products.items()},
        )

    def mean(self, names: Sequence[str]) -> Tensor:
        """Return the mean of tensors laid side by side, [width]."""
        return torch.cat([self.sums[name] for name in names]) / self.count

    def covariance(self, rows: Sequence[str], columns: Sequence[str]) -> Tensor:
        """Return the covariance of tensors laid side by side, [width of rows, width of columns]."""
        blocks = [torch.cat([self._product(a, b) for b in columns], 1) for a in rows]
        return torch.cat(blocks) / self.count - torch.outer(self.mean(rows), self.mean(columns))

    def _product(self, a: str, b: str) -> Tensor:
        found = self.products.get((a, b))
        return self.products[b, a].t() if found is None else found

    def to_tensors(self) -> dict[str, Tensor]:
        """Return means and covariances in float32, a third of a megabyte for two tensors of 192 channels."""
        out = {f"mean {name}": self.mean([name]).float() for name in self.sums}
        for a, b in self.products:
            out[f"covariance {a} {b}"] = self.covariance([a], [b]).float().contiguous()
        return {**out, "count": torch.tensor([self.count])}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Moments:
        """Rebuild from :meth:`to_tensors`; raise :class:`InputError` if the parts do not fit together."""
        try:
            found = cls(int(tensors["count"][0]))
            for name, x in tensors.items():
                if name.startswith("mean "):
                    found.sums[name.removeprefix("mean ")] = x.double() * found.count
            for name, x in tensors.items():
                if name.startswith("covariance "):
                    a, b = name.removeprefix("covariance ").split(" ")
                    centre = torch.outer(found.sums[a], found.sums[b]) / found.count
                    found.products[a, b] = x.double() * found.count + centre
        except (KeyError, ValueError, RuntimeError, IndexError, ZeroDivisionError):
            raise InputError("the calibration's second moments do not fit together.") from None
        return found


RIDGES = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 0.3, 1.0, 10.0)


@dataclass(frozen=True)
class Solution:
    """A linear map fitted to moments.

    Attributes
    ----------
    weight, bias
        [outputs, inputs] and [outputs], float64.
    ridge
        The one chosen, relative to the mean variance of the inputs.
    left
        Share of the target's variance that is left on held-out text.
    residual
        [outputs]: the variance that is left of every output, on both texts.
    """

    weight: Tensor
    bias: Tensor
    ridge: float
    left: float
    residual: Tensor


def ridge_regression(
    train: Moments, held_out: Moments, inputs: Sequence[str], target: str, noise: Tensor | None = None,
    ridge: float | None = None,
) -> Solution:  # fmt: skip
    """Fit a linear map with a bias in closed form; the ridge is the one that does best on held-out text.

    AQUA-KV (arXiv:2501.19392) augments the inputs by a one and uses a ridge of 1e-3. Departures: the bias is not
    shrunk, and the ridge is chosen, so that little text does not hurt. What is returned was fitted to both texts.

    Parameters
    ----------
    train, held_out
        The texts' moments.
    inputs, target
        Names: what is read, side by side, and what is predicted.
    noise
        [inputs] variances of an error on the inputs that the moments do not have, independent of everything.
    ridge
        One that was chosen before; then no text is held out, and what is left is that of the text fitted to.
    """
    names = list(inputs)
    if noise is None:
        noise = torch.zeros(len(train.mean(names)), dtype=torch.float64)
    left: float | None = None
    if ridge is None:
        ridge, left = _choose(train, held_out, names, target, noise)
    both = train + held_out
    cxx, cyx = both.covariance(names, names) + noise.diag(), both.covariance([target], names)
    shrunk = cxx + ridge * cxx.diagonal().mean() * torch.eye(len(cxx), dtype=cxx.dtype)
    weight = torch.linalg.solve(shrunk, cyx.t()).t()
    bias = both.mean([target]) - weight @ both.mean(names)
    variance = both.covariance([target], [target]).diagonal()
    residual = variance + ((weight @ cxx - 2 * cyx) * weight).sum(1)
    if left is None:
        left = float(residual.sum() / variance.sum().clamp(min=1e-30))
    return Solution(weight, bias, ridge, left, residual)


def _choose(
    train: Moments, held_out: Moments, names: list[str], target: str, noise: Tensor
) -> tuple[float, float]:  # fmt: skip
    """Return the ridge that leaves least of the target on held-out text, and the share it leaves.

    With the ridge the error falls and then rises, so it is followed downhill from a middling one: a handful of
    factorisations take half the time of the eigendecomposition that would serve all ridges.
    """
    cxx, cyx = train.covariance(names, names) + noise.diag(), train.covariance([target], names)
    vxx, vyx = held_out.covariance(names, names) + noise.diag(), held_out.covariance([target], names)
    mx, my = ((held_out.mean(n) - train.mean(n)) for n in (names, [target]))
    variance = float(held_out.covariance([target], [target]).trace())
    scale = cxx.diagonal().mean()

    @cache
    def error(at: int) -> float:
        shrunk = cxx + RIDGES[at] * scale * torch.eye(len(cxx), dtype=cxx.dtype)
        w = torch.cholesky_solve(cyx.t(), torch.linalg.cholesky(shrunk)).t()
        return variance + float(((w @ vxx - 2 * vyx) * w).sum() + (my - w @ mx).square().sum())

    at, best = -1, len(RIDGES) // 2
    while at != best:
        at = best
        best = min(range(max(0, at - 1), min(len(RIDGES), at + 2)), key=error)
    return RIDGES[best], error(best) / variance if variance > 0 else 1.0
