"""MOEA/D's parts by hand, and that the sampler keeps to constraints and wastes no trial."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import IntDistribution

from kvcli.calibration import moead
from kvcli.calibration.moead import Moead, neighbourhoods, tchebycheff, weight_vectors

optuna.logging.set_verbosity(optuna.logging.ERROR)
SPACE: dict[str, Any] = {name: IntDistribution(0, 3) for name in "abc"}


def run(sampler: Moead, trials: int, cap: int | None = None) -> list[optuna.trial.FrozenTrial]:
    """Few in sum against many in sum, the first parameter at no cost."""
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for _ in range(trials):
        trial = study.ask(SPACE)
        a, b, c = (trial.params[x] for x in "abc")
        if cap is not None:
            trial.set_constraint("cap", b + c - cap)
        study.tell(trial, (12 - 2 * a - b - c, b + c + 0.01 * a))
    return study.get_trials()


@given(st.integers(2, 60))
def test_weights_sum_to_one_and_are_spread_evenly_from_one_objective_to_the_other(count):
    weights = weight_vectors(count)
    assert weights.shape == (count, 2)
    assert weights.sum(1) == pytest.approx(np.ones(count))
    assert np.diff(weights[:, 0]) == pytest.approx(np.full(count - 1, 1 / (count - 1)))
    assert weights[0].tolist() == [0, 1]
    assert weights[-1].tolist() == [1, 0]


@given(st.integers(2, 30), st.data())
def test_a_neighbourhood_is_the_nearest_weights_itself_first(count, data):
    size = data.draw(st.integers(1, count))
    weights = weight_vectors(count)
    found = neighbourhoods(weights, size)
    assert found.shape == (count, size)
    for i, near in enumerate(found):
        assert near[0] == i
        assert len(set(near)) == size
        distance = [float(np.hypot(*(weights[i] - w))) for w in weights]
        others = [d for j, d in enumerate(distance) if j not in near]
        assert max(distance[j] for j in near) <= min(others, default=2) + 1e-9


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8))
def test_tchebycheff_is_the_worst_weighted_distance_from_the_ideal_point(points):
    weights = weight_vectors(5)
    found = tchebycheff(np.array(points, float), weights)
    front = [p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]
    low = [min(p[i] for p in front) for i in range(2)]
    span = [max(p[i] for p in front) - low[i] or 1 for i in range(2)]
    for row, weight in zip(found, weights, strict=True):
        scaled = [[(p[i] - low[i]) / span[i] for i in range(2)] for p in points]
        assert row == pytest.approx([max(weight * x) + 1e-6 * sum(x) for x in scaled])
        # whatever the weight, the solution is a trial that no other dominates
        assert points[int(row.argmin())] in front


def test_the_solution_of_a_weight_keeps_the_constraint_if_any_trial_does():
    sampler = Moead(population=10, seed=0)
    done = run(sampler, 64, cap=2)
    assert all(done[i].params["b"] + done[i].params["c"] <= 2 for i in sampler._solutions(done))
    over = [x for x in done if x.params["b"] + x.params["c"] > 2]
    least = min(x.params["b"] + x.params["c"] for x in over)
    assert {over[i].params["b"] + over[i].params["c"] for i in sampler._solutions(over)} == {least}


def test_the_solutions_lead_from_the_best_in_one_objective_to_the_best_in_the_other():
    sampler = Moead(population=10, seed=3)
    done = run(sampler, 60)
    values = [done[i].values for i in sampler._solutions(done)]
    assert values == sorted(values, key=lambda x: (-x[0], x[1]))  # the first weights mind the second objective
    assert values[0][1] == min(x.values[1] for x in done)
    assert values[-1][0] == min(x.values[0] for x in done)
    assert len({tuple(x) for x in values}) > 3


@pytest.mark.parametrize("near", [True, False])
def test_children_come_from_solutions_of_the_neighbourhood_whose_turn_it_is(monkeypatch, near):
    monkeypatch.setattr(moead, "NEIGHBOUR_MATING", float(near))
    sampler = Moead(population=20, neighbours=3, seed=3)
    study = optuna.create_study(directions=["minimize", "minimize"])
    study.add_trials(run(sampler, 67))  # the eighth weight vector is next
    done = study.get_trials()
    monkeypatch.setattr(sampler._random, "sample_independent", lambda *args: -1)  # a mutation
    solutions = sampler._solutions(done)
    assert sampler.neighbours[7].tolist() == [7, 6, 8]  # of equals the earlier
    parents = [done[solutions[i]].params for i in (6, 7, 8)]
    inside = []
    for _ in range(50):
        child = sampler.sample_relative(study, done[0], SPACE)
        assert set(child) == set("abc")
        inside.append(all(child[x] in {-1, *(p[x] for p in parents)} for x in "abc"))
    assert all(inside) == near


def test_no_genome_is_asked_for_twice_while_there_are_others():
    children = [tuple(x.params.values()) for x in run(Moead(population=4, seed=1), 40)][4:]
    assert len(set(children)) == len(children)


def test_when_everything_has_been_tried_it_goes_on():
    done = run(Moead(population=4, seed=1), 120)
    assert {tuple(x.params[n] for n in "abc") for x in done} <= set(itertools.product(range(4), repeat=3))
    assert len(done) == 120


def test_the_seed_decides():
    once, again, other = ([x.params for x in run(Moead(population=5, seed=s), 30)] for s in (1, 1, 2))
    assert once == again
    assert once != other
