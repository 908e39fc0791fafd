"""Plans are the best there are, and meet every budget."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace
from typing import Any

import pytest

from kvcli.calibration.sensitivity import Sensitivity
from kvcli.calibration.space import SearchSpace, fits, load_recipe
from kvcli.calibration.surrogate import Frontiers, least_bits, solve, spent
from kvcli.errors import BudgetError
from kvcli.plan import LayerPlan
from kvcli.quant.format import KVFormat

EXACT = KVFormat.exact()
WIDTHS = tuple(KVFormat(bits, group=16) for bits in (2, 3, 4, 8))
FULL = LayerPlan(2, 64, EXACT, EXACT)
SLIDING = LayerPlan(2, 64, EXACT, EXACT, kind="sliding", window=100)
WIDE = LayerPlan(1, 128, EXACT, EXACT)
MODELS = {"alike": [FULL] * 6, "mixed": [FULL, SLIDING, WIDE, SLIDING]}


def space(k: tuple[KVFormat, ...] = WIDTHS, v: tuple[KVFormat, ...] = WIDTHS, **fields: Any) -> SearchSpace:
    return SearchSpace(k=k, v=v, **fields)


def invented(searched: SearchSpace, layers: list[LayerPlan], seed: int = 0) -> Sensitivity:
    """Measurements that might be: losses fall with bits, layers and settings differ."""
    rng = random.Random(seed)

    def table(formats: tuple[KVFormat, ...]) -> list[list[float]]:
        scales = [10 ** rng.uniform(-3, 0) for _ in layers]
        return [[s * 4.0 ** -(f.bits if f.bits < 16 else 12) * rng.uniform(0.7, 1.3) for f in formats] for s in scales]

    shared = list(searched.settings())
    ratio = {s: rng.uniform(0.9, 1.1) / (1 + s.residual_window / 50 + s.sink_tokens / 9) for s in shared}
    kl: Any = {"k": table(searched.k), "v": table(searched.v)}
    return Sensitivity(searched, layers, "bfloat16", kl, kl, {"k": {"kl": [0.5]}, "v": {}}, ratio)


@pytest.mark.parametrize("context", [100, 2047])
@pytest.mark.parametrize("model", MODELS)
def test_every_budget_is_met_and_a_larger_one_is_never_worse(model, context):
    few = replace(load_recipe("balanced"), sink_tokens=(0, 4), residual_windows=(0, 32))
    found = invented(few.fitting(MODELS[model]), MODELS[model])
    least = least_bits(found, context, nominal=False)
    losses = []
    frontiers = Frontiers(found, context, bits=8)
    for i in range(40):
        bits = least + i * (8 - least) / 39
        solutions = frontiers.all(bits)
        assert all(s.plan.effective_bits(context) <= bits + 1e-9 for s in solutions)
        assert solutions == sorted(solutions, key=lambda s: s.predicted_kl)
        losses.append(solutions[0].predicted_kl)
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(losses))
    assert losses[-1] < losses[0] / 10


@pytest.mark.parametrize("context", [40, 100, 1013])
@pytest.mark.parametrize("layers", [[FULL, FULL], [FULL, SLIDING], [WIDE, FULL, SLIDING]], ids=["2", "sliding", "3"])
def test_the_plan_is_the_best_of_all_plans(layers, context):
    formats = (KVFormat(2), KVFormat(3, "channel", group=32), EXACT)
    searched = space(
        formats, (KVFormat(2), KVFormat(4, group=32)),
        block_sizes=(16, 32), sink_tokens=(0, 4), residual_windows=(0, 32),
    )  # fmt: skip
    found = invented(searched, layers)
    pairs = list(itertools.product(range(len(searched.k)), range(len(searched.v))))
    points = []
    for setting, ratio in found.ratio.items():
        usable = [(a, b) for a, b in pairs if searched.k[a].axis == "token" or setting.block_size == 32]
        for chosen in itertools.product(usable, repeat=len(layers)):
            stored = [searched.layer(x, searched.k[a], searched.v[b]) for x, (a, b) in zip(layers, chosen, strict=True)]
            loss = sum(found.kl["k"][i][a] + found.kl["v"][i][b] for i, (a, b) in enumerate(chosen)) * ratio
            points.append((searched.plan(stored, setting, "bfloat16").effective_bits(context), loss))
    least = min(bits for bits, _ in points)
    assert least <= least_bits(found, context, nominal=False) <= least + 1e-3
    for share in (0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1):
        budget = least * (1 + 1e-9) + share * (16 - least)
        best = min(loss for bits, loss in points if bits <= budget)
        assert solve(found, budget, context)[0].predicted_kl == pytest.approx(best)


@pytest.mark.parametrize("nominal", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_without_the_layerwise_search_all_layers_get_the_best_common_pair(model, nominal):
    layers = MODELS[model]
    searched = replace(load_recipe("balanced").fitting(layers), layerwise=False)
    found = invented(searched, layers)
    for bits in (2.6, 3.25, 4.5):
        best = solve(found, bits, 1000, nominal=nominal)[0]
        assert len({(x.k, x.v) for x in best.plan.layers}) == 1
        within = []
        for setting, ratio in found.ratio.items():
            for (a, k), (b, v) in itertools.product(enumerate(searched.k), enumerate(searched.v)):
                if not (fits(k, setting.block_size) and fits(v, setting.block_size)):
                    continue
                plan = searched.plan([searched.layer(x, k, v) for x in layers], setting, "bfloat16")
                if spent(plan, 1000, nominal=nominal) <= bits:
                    within.append(ratio * sum(found.kl["k"][i][a] + found.kl["v"][i][b] for i in range(len(layers))))
        assert best.predicted_kl == pytest.approx(min(within))
        free = replace(found, space=replace(searched, layerwise=True))
        assert solve(free, bits, 1000, nominal=nominal)[0].predicted_kl < best.predicted_kl


@pytest.mark.parametrize("nominal", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_a_budget_below_the_least_names_it(model, nominal):
    found = invented(load_recipe("balanced").fitting(MODELS[model]), MODELS[model])
    least = least_bits(found, 1000, nominal)
    assert solve(found, least, 1000, nominal=nominal)
    kind = "nominal" if nominal else "effective"
    said = f"{kind} bits at 1000 tokens cannot be met; the least reachable is {least:.3f}."
    with pytest.raises(BudgetError, match=re.escape(said)):
        solve(found, least - 0.002, 1000, nominal=nominal)
    assert not nominal or least == 2


def test_nominal_budgets_count_as_papers_do():
    found = invented(load_recipe("balanced").fitting(MODELS["mixed"]), MODELS["mixed"])
    for bits in (2, 2.75, 3.25, 4, 8):
        assert all(s.plan.nominal_bits <= bits for s in solve(found, bits, 1000, nominal=True))
    assert solve(found, 3.25, 1000, nominal=True)[0].plan.nominal_bits > 3.1


def test_channel_groups_that_exceed_the_page_are_left_out():
    best = KVFormat(3, "channel", group=32)
    searched = space((*WIDTHS, best), block_sizes=(16, 32), residual_windows=(0,))
    found = invented(searched, MODELS["alike"])
    for layer in found.kl["k"]:
        layer[-1] = 1e-9  # far better than anything else
    by_block = {s.plan.block_size: s.plan for s in solve(found, 4.5, 4096)}
    assert all(layer.k == best for layer in by_block[32].layers)
    assert all(layer.k != best for layer in by_block[16].layers)


def test_a_setting_that_holds_no_format_is_passed_over():
    searched = space((KVFormat(3, "channel", group=32),), block_sizes=(16, 32))
    found = invented(searched, MODELS["alike"])
    assert {s.plan.block_size for s in solve(found, 8, 4096)} == {32}
    assert least_bits(found, 4096, nominal=False) > 2


@pytest.mark.parametrize("nominal", [False, True])
def test_frontiers_hold_the_plan_of_every_budget(nominal):
    found = invented(load_recipe("balanced").fitting(MODELS["mixed"]), MODELS["mixed"])
    frontiers = Frontiers(found, 1000, nominal=nominal, bits=6)
    for bits in (2.5, 3.25, 4, 5.9):
        assert frontiers.all(bits) == solve(found, bits, 1000, nominal=nominal)
        best = frontiers.best(bits)
        assert best is not None
        assert spent(best.plan, 1000, nominal=nominal) <= bits
    assert frontiers.best(0.1) is None


DEEP = [LayerPlan(3, 64, EXACT, EXACT)] * 30  # as the standing model


@pytest.mark.slow
@pytest.mark.parametrize("context", [2048, 8192])
def test_forty_budgets_are_met_within_a_tenth_of_a_bit(context):
    found = invented(load_recipe("balanced").fitting(DEEP), DEEP)
    least = least_bits(found, context, nominal=False)
    frontiers = Frontiers(found, context, bits=8)
    losses = []
    for i in range(40):
        bits = least + i * (8 - least) / 39
        best = frontiers.best(bits)
        assert best is not None
        assert bits - 0.1 <= best.plan.effective_bits(context) <= bits
        losses.append(best.predicted_kl)
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(losses))
