"""Intervals and paired tests against scipy and worked examples."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcli.evaluation.intervals import bootstrap, sign_test


def test_the_interval_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(1).normal(3, 2, 80)
    low, high = bootstrap(values, resamples=4000)
    ci = scipy.stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=0).confidence_interval
    spread = values.std() / 80**0.5
    assert low == pytest.approx(ci.low, abs=0.1 * spread)
    assert high == pytest.approx(ci.high, abs=0.1 * spread)
    narrow = bootstrap(values, resamples=4000, level=0.5)
    assert low < narrow[0] < values.mean() < narrow[1] < high


def test_the_same_seed_draws_the_same_and_equal_values_have_no_width():
    values = [0.0, 1.0, 1.0, 0.5]
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3) != bootstrap(values[:3], seed=3)
    assert bootstrap([0.25] * 7) == (0.25, 0.25)
    with pytest.raises(ValueError, match="no value"):
        bootstrap([])


def test_mcnemars_worked_example():
    # ten items that only one side has right: two and eight; 2 * (1 + 10 + 45) / 1024
    differences = [1] * 2 + [-1] * 8 + [0] * 50
    assert sign_test(differences) == pytest.approx(0.109375)
    assert sign_test([0, 0]) == 1.0
    assert sign_test([]) == 1.0


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 3))
def test_the_sign_test_is_scipys_binomial_test(lost, won, ties):
    p = sign_test([-0.5] * lost + [0.25] * won + [0.0] * ties)
    expected = scipy.stats.binomtest(lost, lost + won, 0.5).pvalue if lost + won else 1.0
    assert p == pytest.approx(expected, rel=1e-9)


def test_many_items_neither_overflow_nor_take_long():
    assert 0 <= sign_test([1.0] * 4000 + [-1.0] * 1000) < 1e-300
