"""How sure a score is: bootstrap intervals over items, and exact paired tests against a reference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


def bootstrap(
    values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[float, float]:
    """Return the percentile interval of a mean (Efron, 1979), items drawn again with replacement.

    The same seed and the same number of items give the same draws, so paired values give a paired interval through
    their differences.

    Raises
    ------
    ValueError
        If there is no value.
    """
    x = np.asarray(values, dtype=np.float64)
    if not len(x):
        raise ValueError("no value to draw from.")
    rng = np.random.default_rng(seed)
    means = [x[rng.integers(0, len(x), len(x))].mean() for _ in range(resamples)]
    tail = 50 * (1 - level)
    low, high = np.percentile(means, (tail, 100 - tail))
    return float(low), float(high)


def sign_test(differences: Sequence[float]) -> float:
    """Return the two-sided exact p-value that gains and losses are equally likely; ties say nothing.

    For scores of 0 and 1 this is McNemar's exact test.
    """
    lost, won = sum(x < 0 for x in differences), sum(x > 0 for x in differences)
    n, k = lost + won, min(lost, won)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return 1.0 if 2 * tail >= 1 << n else 2 * tail / (1 << n)
