"""The exact best plan for a budget: a multiple-choice knapsack, one choice of formats per layer.

Minimise the sum of losses under a ceiling on the sum of bytes, by dynamic programming over bytes in units of their
greatest common divisor. Milliseconds for a model of ordinary depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import numpy as np

MAX_UNITS = 200_000  # beyond this many units bytes are rounded up to coarser ones: still within the ceiling


def pareto(weights: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Return the choices that no other beats in both weight and loss, lightest first."""
    front: list[int] = []
    best = float("inf")
    for i in sorted(range(len(weights)), key=lambda i: (weights[i], losses[i])):
        if losses[i] < best:
            front.append(i)
            best = losses[i]
    return front


class Knapsack:
    """The best choices under every ceiling up to the greatest, from one pass of dynamic programming.

    Parameters
    ----------
    weights, losses
        Per layer, the weight (a non-negative integer) and the loss (finite) of each option.
    ceiling
        Greatest total weight that will be asked for.
    """

    def __init__(self, weights: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], ceiling: int) -> None:
        self._fronts = [pareto(w, x) for w, x in zip(weights, losses, strict=True)]
        lightest = [w[front[0]] for w, front in zip(weights, self._fronts, strict=True)]
        self.least = sum(lightest)
        """Weight of the lightest choices."""
        extra = [[w[i] - base for i in f] for w, f, base in zip(weights, self._fronts, lightest, strict=True)]
        spare = max(0, ceiling - self.least)
        wanted = min(spare, sum(max(e) for e in extra))
        self._unit = max(gcd(*(x for e in extra for x in e)), 1, -(-wanted // MAX_UNITS))
        self._units = [[-(-x // self._unit) for x in e] for e in extra]
        size = min(spare // self._unit, sum(map(max, self._units))) + 1
        best = np.zeros(size)  # best[u]: least loss of the layers so far within u units
        self._picks: list[np.ndarray] = []
        for front, units, layer_losses in zip(self._fronts, self._units, losses, strict=True):
            totals = np.full((len(front), size), np.inf)
            for row, (i, x) in enumerate(zip(front, units, strict=True)):
                if x < size:
                    totals[row, x:] = best[: size - x] + layer_losses[i]
            pick = totals.argmin(0)
            best = np.take_along_axis(totals, pick[None], 0)[0]
            self._picks.append(pick.astype(np.int32))
        self._best = best

    def solve(self, ceiling: int) -> list[int] | None:
        """Choose one option per layer with the least total loss and total weight at most ``ceiling``.

        Returns the chosen option of every layer; None if even the lightest options exceed the ceiling. Among equal
        losses the lighter plan wins.
        """
        if ceiling < self.least:
            return None
        last = min((ceiling - self.least) // self._unit, len(self._best) - 1)
        at = int(np.flatnonzero(self._best[: last + 1] <= self._best[last])[0])
        chosen: list[int] = []
        for front, units, pick in zip(
            reversed(self._fronts), reversed(self._units), reversed(self._picks), strict=True
        ):
            row = int(pick[at])
            chosen.append(front[row])
            at -= units[row]
        return chosen[::-1]


def solve(weights: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], ceiling: int) -> list[int] | None:
    """Return :meth:`Knapsack.solve` for one ceiling."""
    return Knapsack(weights, losses, ceiling).solve(ceiling)
