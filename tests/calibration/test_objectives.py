"""Plans chosen by a task."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvcli.calibration.objectives import TaskObjective, TaskScorer, task_name
from kvcli.calibration.pipeline import exact_layers
from kvcli.calibration.sensitivity import Cost
from kvcli.calibration.solving import Solved, _loss
from kvcli.errors import UsageError
from kvcli.models.loading import load
from kvcli.plan import CachePlan
from kvcli.quant.format import KVFormat


@pytest.mark.parametrize("given", ["task:", "task:chess", "chess", "", "passkey", "ppl"])
def test_what_is_no_objective_is_refused(given):
    with pytest.raises(UsageError, match="there is no objective"):
        task_name(given, others=("kl",))


def test_objectives_are_read():
    assert task_name("kl", others=("kl", "ppl")) is None
    assert task_name("task:passkey", others=("kl",)) == "passkey"


def test_an_exact_plan_answers_as_the_reference_and_the_reference_answers_once(tinystories, monkeypatch):
    loaded = load(str(tinystories))
    exact = CachePlan(tuple(exact_layers(loaded)), dtype=loaded.dtype)
    score = TaskScorer(TaskObjective("kv_retrieval", 3), loaded, exact)
    asked = []
    task = type(score.items[0]), len(score.items)
    from kvcli.evaluation import suites

    original = suites.TASKS["kv_retrieval"]

    class Counting:
        name = original.name

        def measure(self, model, item, reference):
            asked.append((model.plan, item))
            return original.measure(model, item, reference)

    monkeypatch.setitem(suites.TASKS, "kv_retrieval", Counting())
    found = score(exact, {})
    assert (found["flips"], found["score"]) == (0, found["reference"])
    wrecked = exact
    for i, layer in enumerate(exact.layers):
        crude = KVFormat(2, group=layer.head_dim)
        wrecked = wrecked.with_layer(i, replace(layer, k=crude, v=crude))
    worse = score(wrecked, {})
    assert worse["log_likelihood"]["shift"] > 0
    assert score(wrecked, {}) == worse
    assert len(asked) == 3 * task[1]  # reference, exact and wrecked; what is known is not asked again


def test_equal_scores_leave_it_to_kl():
    def solved(score, kl):
        return Solved(None, 0, 0, Cost(kl, 0.0, [kl]), {"name": "passkey", "score": score})

    best = min([solved(0.5, 0.1), solved(1.0, 0.3), solved(1.0, 0.2), solved(0.0, 0.0)], key=lambda x: _loss(x, ""))
    assert best.measured.kl == 0.2
