"""Plans around the optimum: distinct, within the budget, and the best there are if the surrogate errs."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcli.calibration import refine
from kvcli.calibration.measuring import Measuring
from kvcli.calibration.refine import TILTS, Tilt, neighbours, predicted, tilted
from kvcli.calibration.sensitivity import Cost, Sensitivity
from kvcli.calibration.space import SearchSpace
from kvcli.calibration.surrogate import solve
from kvcli.plan import LayerPlan
from kvcli.quant.format import KVFormat

EXACT = KVFormat.exact()
LAYERS = [LayerPlan(2, 64, EXACT, EXACT)] * 24
SPACE = SearchSpace(
    k=tuple(KVFormat(b, group=g) for b in (2, 3, 4, 8) for g in (32, 64)),
    v=tuple(KVFormat(b, group=64) for b in (2, 3, 4, 8)),
    sink_tokens=(0, 4), residual_windows=(0, 32),
)  # fmt: skip


def invented(seed: int = 0) -> Sensitivity:
    """Measurements that might be."""
    rng = random.Random(seed)
    kl: Any = {
        w: [
            [s * 4.0**-f.bits * rng.uniform(0.5, 2) for f in getattr(SPACE, w)]
            for s in (10 ** rng.uniform(-2, 0) for _ in LAYERS)
        ]
        for w in "kv"
    }  # fmt: skip
    ratio = {s: rng.uniform(0.3, 1) for s in SPACE.settings()}
    return Sensitivity(SPACE, LAYERS, "bfloat16", kl, kl, {}, ratio)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("nominal", [False, True])
def test_neighbours_are_distinct_within_the_budget_and_under_the_same_setting(seed, nominal):
    found = invented(seed)
    best = solve(found, 4, 1000, nominal=nominal)[0]
    setting = next(s for s in found.ratio if (s.sink_tokens, s.residual_window) ==
                   (best.plan.sink_tokens, best.plan.residual_window))  # fmt: skip
    near = neighbours(found, setting, 4, 1000, nominal=nominal, known=[best.plan])
    plans = [best.plan, *(s.plan for s in near)]
    assert 1 < len(set(plans)) == len(plans) <= 1 + len(TILTS)
    for s in near:
        assert (s.plan.nominal_bits if nominal else s.plan.effective_bits(1000)) <= 4
        assert (s.plan.sink_tokens, s.plan.residual_window) == (best.plan.sink_tokens, best.plan.residual_window)
        assert s.predicted_kl == predicted(found, s.plan)
        assert best.predicted_kl <= s.predicted_kl < 3 * best.predicted_kl


@pytest.mark.parametrize("bits", [2.6, 4, 7])
def test_what_is_predicted_for_a_plan_is_what_the_solver_predicted(bits):
    found = invented()
    for solution in solve(found, bits, 1000):
        assert predicted(found, solution.plan) == pytest.approx(solution.predicted_kl, rel=1e-12)


def test_a_tilt_is_the_optimum_of_a_surrogate_that_errs_so():
    # if keys really cost 1.4 times as much, no plan within the budget is better than the one that the tilt gives
    found, tilt = invented(), Tilt(keys=1.4)
    truth = tilted(found, tilt)
    setting = next(iter(found.ratio))
    near = neighbours(found, setting, 4, 1000, nominal=False, known=[])
    best = min(predicted(truth, s.plan) for s in solve(truth, 4, 1000) if s.plan.sink_tokens == setting.sink_tokens
               and s.plan.residual_window == setting.residual_window)  # fmt: skip
    assert min(predicted(truth, s.plan) for s in near) == pytest.approx(best)


@given(st.builds(Tilt, *[st.floats(0.3, 3)] * 3))
def test_tilting_keeps_the_order_of_formats_of_one_width(tilt):
    found = invented()
    changed = tilted(found, tilt)
    for w in ("k", "v"):
        formats = getattr(SPACE, w)
        for before, after in zip(found.kl[w], changed.kl[w], strict=True):
            for bits in (2, 3, 4, 8):
                here = [i for i, f in enumerate(formats) if f.bits == bits]
                assert sorted(here, key=lambda i: before[i]) == sorted(here, key=lambda i: after[i])
    assert tilted(found, Tilt()).kl == found.kl


def test_no_more_than_eight_plans_are_measured():
    assert refine.LEADING + len(TILTS) <= 8


# --- choosing ---------------------------------------------------------------------------------------------------------


def cost(parts: list[float]) -> Cost:
    return Cost(sum(parts) / len(parts), 0.0, parts)


@given(st.lists(st.floats(0.01, 1), min_size=16, max_size=16), st.floats(0.01, 0.5))
def test_what_is_better_everywhere_by_the_same_is_better(parts, gain):
    other = cost([x + gain for x in parts])
    assert cost(parts).is_below(other)
    assert not other.is_below(cost(parts))
    assert not cost(parts).is_below(cost(parts))


def test_what_is_better_by_one_lucky_stretch_is_not():
    parts = [0.02] * 16
    lucky = cost([0.001, *parts[1:]])
    assert lucky.kl < cost(parts).kl
    assert not lucky.is_below(cost(parts))


class Measured:
    """Stands in for the measuring: each plan costs what ``of`` says, in every stretch of the text."""

    def __init__(self, of: Any) -> None:
        self.of, self.stages = of, []

    def check(self, ids: Any) -> None:
        """No probe: nothing is run."""

    def plans(self, name: str, probe: Any, plans: list[Any], description: str) -> list[Cost]:
        self.stages.append((name, len(plans)))
        return [cost(self.of(name, i)) for i in range(len(plans))]


@pytest.mark.parametrize(
    ("gain", "chosen"),
    [([0.001] * 16, refine.LEADING + 1), ([0.016] + [0.0] * 15, 2), ([-0.001] * 16, 2)],
    ids=["clearly better", "better by luck", "worse"],
)
def test_a_neighbour_replaces_the_optimum_only_if_it_is_clearly_better(gain, chosen):
    def of(name: str, i: int) -> list[float]:
        if name == "verify":
            return [0.02 if i == 2 else 0.03] * 16  # the third setting measures best
        return [0.02 - (x if i == 1 else 0) for x in gain]

    work: Any = Measured(of)
    tried, at = refine.search(work, invented(), None, 4, 1000, nominal=False)  # type: ignore[arg-type]
    assert at == chosen
    assert work.stages[0] == ("verify", refine.LEADING)
    assert len(tried) == sum(n for _, n in work.stages) <= 12
    best = tried[2].plan
    assert all((x.plan.sink_tokens, x.plan.residual_window) == (best.sink_tokens, best.residual_window)
               for x in tried[refine.LEADING :])  # fmt: skip


def test_settings_and_plans_are_compared_by_one_probe():
    loaded: Any = SimpleNamespace(model=None, rope=None)
    work = Measuring(loaded, {}, SPACE, [], None, {}, None)  # type: ignore[arg-type]
    ids = torch.zeros(8, 16, dtype=torch.long)
    assert work.check(ids) is work.check(ids)  # so that its reference, the exact model's run, is computed once
