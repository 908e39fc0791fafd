"""The exact best plan for a budget: a multiple-choice knapsack, one choice of formats per layer.

Minimise the sum of losses under a ceiling on the sum of bytes, by dynamic programming over bytes in units of their
greatest common divisor. Milliseconds for a model of ordinary depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import numpy as np

MAX_UNITS = 200_000  # beyond this many units bytes are rounded up to coarser ones: still within the ceiling


def pareto(weights: Sequence[int], losses: Sequence[float]) -> list[int]:
    """Return the choices that no other beats in both weight and loss, lightest first."""
    front: list[int] = []
    best = float("inf")
    for i in sorted(range(len(weights)), key=lambda i: (weights[i], losses[i])):
        if losses[i] < best:
            front.append(i)
            best = losses[i]
    return front


def solve(weights: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], ceiling: int) -> list[int] | None:
    """Choose one option per layer with the least total loss and total weight at most ``ceiling``.

    Parameters
    ----------
    weights, losses
        Per layer, the weight (a non-negative integer) and the loss (finite) of each option.
    ceiling
        Greatest total weight.

    Returns
    -------
    list of int, or None
        The chosen option of every layer; None if even the lightest options exceed the ceiling. Among equal losses the
        lighter plan wins.
    """
    fronts = [pareto(w, x) for w, x in zip(weights, losses, strict=True)]
    lightest = [w[front[0]] for w, front in zip(weights, fronts, strict=True)]
    spare = ceiling - sum(lightest)
    if spare < 0:
        return None
    extra = [[w[i] - base for i in front] for w, front, base in zip(weights, fronts, lightest, strict=True)]
    unit = max(gcd(*(x for e in extra for x in e)), 1)
    unit = max(unit, -(-min(spare, sum(max(e) for e in extra)) // MAX_UNITS))
    size = min(spare // unit, sum(-(-max(e) // unit) for e in extra)) + 1
    best = np.zeros(size)  # best[u]: least loss of the layers so far within u units
    picks: list[np.ndarray] = []
    for front, layer_extra, layer_losses in zip(fronts, extra, losses, strict=True):
        totals = np.full((len(front), size), np.inf)
        for row, (i, x) in enumerate(zip(front, layer_extra, strict=True)):
            units = -(-x // unit)
            if units < size:
                totals[row, units:] = best[: size - units] + layer_losses[i]
        pick = totals.argmin(0)
        best = np.take_along_axis(totals, pick[None], 0)[0]
        picks.append(pick)
    at = int(np.flatnonzero(best <= best[-1])[0])
    chosen: list[int] = []
    for front, layer_extra, pick in zip(reversed(fronts), reversed(extra), reversed(picks), strict=True):
        row = int(pick[at])
        chosen.append(front[row])
        at -= -(-layer_extra[row] // unit)
    return chosen[::-1]
