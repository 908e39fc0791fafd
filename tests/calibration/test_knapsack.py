"""The knapsack against brute force: exact, never over the ceiling, and never worse for a larger one."""

from __future__ import annotations

import itertools
from math import gcd
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcli.calibration import knapsack

Instance = tuple[list[list[int]], list[list[float]], int]


@st.composite
def instances(draw: st.DrawFn, step: int = 1) -> Instance:
    """Weights and losses of one to four layers, and a ceiling below, within or above what they can weigh.

    Losses are small multiples of 1/8: their sums are exact, and ties are common.
    """
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    weights = [draw(st.lists(st.integers(0, 30), min_size=n, max_size=n)) for n in sizes]
    losses = [[x / 8 for x in draw(st.lists(st.integers(0, 40), min_size=n, max_size=n))] for n in sizes]
    ceiling = draw(st.integers(0, 4 * 30 + 5))
    return [[step * w for w in layer] for layer in weights], losses, step * ceiling


def total(table: list[list[float]] | list[list[int]], choices: list[int]) -> float:
    return sum(layer[c] for layer, c in zip(table, choices, strict=True))


def brute_force(weights: list[list[int]], losses: list[list[float]], ceiling: int) -> tuple[float, float] | None:
    """The least loss within the ceiling, and the least weight that gives it; None where nothing fits."""
    everything = itertools.product(*(range(len(layer)) for layer in weights))
    fitting = [
        (total(losses, list(c)), total(weights, list(c))) for c in everything if total(weights, list(c)) <= ceiling
    ]
    return min(fitting, default=None)


@given(instances())
def test_the_plan_is_the_best_there_is_and_the_lightest_of_the_best(instance):
    weights, losses, ceiling = instance
    chosen = knapsack.solve(weights, losses, ceiling)
    found = None if chosen is None else (total(losses, chosen), total(weights, chosen))
    assert found == brute_force(weights, losses, ceiling)


@given(instances(step=1344))
def test_weights_in_large_units_are_solved_as_exactly(instance):
    # page sizes are multiples of 16 bytes times the number of pages
    weights, losses, ceiling = instance
    with patch.object(knapsack, "MAX_UNITS", 120):
        chosen = knapsack.solve(weights, losses, ceiling + 1343)
    found = None if chosen is None else (total(losses, chosen), total(weights, chosen))
    assert found == brute_force(weights, losses, ceiling)


@given(instances(), st.integers(1, 5), st.integers(1, 12))
def test_coarser_units_stay_within_the_ceiling_and_lose_only_their_rounding(instance, layers, units):
    weights, losses, ceiling = instance
    weights, losses = weights * layers, losses * layers
    with patch.object(knapsack, "MAX_UNITS", units):
        chosen = knapsack.solve(weights, losses, ceiling)
    spare = ceiling - sum(map(min, weights))
    assert (chosen is None) == (spare < 0)
    if chosen is not None:
        assert total(weights, chosen) <= ceiling
        divisor = gcd(*(w - min(layer) for layer in weights for w in layer)) or 1
        lost = len(weights) * (max(divisor, -(-spare // units)) - 1)
        if lost <= spare:  # with that much less to spend, exact units could not have done better
            exact = knapsack.solve(weights, losses, ceiling - lost)
            assert total(losses, chosen) <= total(losses, exact)


@given(instances(), st.integers(0, 40))
def test_a_larger_budget_never_costs_quality(instance, more):
    weights, losses, ceiling = instance
    small, large = (knapsack.solve(weights, losses, c) for c in (ceiling, ceiling + more))
    if small is not None:
        assert large is not None
        assert total(losses, large) <= total(losses, small)


@given(instances())
def test_the_front_holds_exactly_what_no_other_choice_beats(instance):
    for w, x in zip(instance[0], instance[1], strict=True):
        points = list(zip(w, x, strict=True))
        best = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
        front = [points[i] for i in knapsack.pareto(w, x)]
        assert front == sorted(best)


def test_a_ceiling_that_is_just_met_and_just_missed():
    weights, losses = [[3, 5], [4, 9]], [[1.0, 0.0], [1.0, 0.0]]
    assert knapsack.solve(weights, losses, 7) == [0, 0]
    assert knapsack.solve(weights, losses, 6) is None
    assert knapsack.solve(weights, losses, -1) is None


def test_what_is_dear_and_bad_is_never_chosen():
    assert knapsack.solve([[5, 1, 3]], [[2.0, 1.0, 1.0]], 100) == [1]


def test_layers_without_a_loss_vector_are_refused():
    with pytest.raises(ValueError, match="zip"):
        knapsack.solve([[1], [2]], [[0.0]], 10)
