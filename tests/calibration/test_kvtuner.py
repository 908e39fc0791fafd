"""Pruning, clustering and search, against enumeration; and a search that was killed goes on as if it had not been."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcli.calibration.kvtuner import Front, Group, Point, best, group, prune, search
from kvcli.calibration.relative_errors import RelativeErrors
from kvcli.calibration.space import SearchSpace, Setting, load_recipe
from kvcli.errors import BudgetError, KvcliError, UsageError
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat

EXACT = KVFormat.exact()
WIDTHS = tuple(KVFormat(bits, group=64, symmetric=False) for bits in (2, 4, 8))
SPACE = SearchSpace(k=WIDTHS, v=WIDTHS)
SETTING = Setting(16, 0, 0)
LAYER = LayerPlan(2, 64, EXACT, EXACT)
NINE = list(itertools.product(range(3), range(3)))
USUAL = ((0, 0), (1, 0), (1, 1), (2, 1), (2, 2))  # K2V2 K4V2 K4V4 K8V4 K8V8
CONTEXT = 1000


def errors_of(output: list[list[float]], pairs: list[tuple[int, int]] = NINE) -> RelativeErrors:
    return RelativeErrors(SETTING, pairs, output, output, output, output)


# --- pruning ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 12).map(lambda x: x / 8), min_size=9, max_size=9))
def test_a_pair_is_kept_unless_another_has_no_more_bits_and_no_more_error(output):
    kept = prune(errors_of([output]), SPACE, LAYER, 0)
    bits = [WIDTHS[k].bits + WIDTHS[v].bits for k, v in NINE]
    points = list(zip(bits, output, strict=True))
    best_points = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert [points[NINE.index(pair)] for pair in kept] == sorted(best_points)


def test_pairs_are_weighed_by_what_they_really_take():
    fine = replace(WIDTHS[0], group=16)  # as many bits as the coarse one, and four times the scales
    space = SearchSpace(k=(fine, WIDTHS[0]), v=WIDTHS[:1])
    found = errors_of([[0.5, 0.6], [0.5, 0.5]], [(0, 0), (1, 0)])
    assert prune(found, space, LAYER, 0) == ((1, 0), (0, 0))
    assert prune(found, space, LAYER, 1) == ((1, 0),)


# --- clustering -------------------------------------------------------------------------------------------------------


def vector(at: float = 0.0, over: dict[tuple[int, int], float] | None = None) -> list[float]:
    """Errors of the nine pairs that leave the usual five, all moved by ``at``, single ones set by ``over``."""
    usual = {(0, 0): 1.0, (1, 0): 0.6, (1, 1): 0.3, (2, 1): 0.2, (2, 2): 0.02}
    values = {pair: usual.get(pair, 1.5) + at for pair in NINE}
    return [{**values, **(over or {})}[pair] for pair in NINE]


def layers_of(output: list[list[float]]) -> list[tuple[int, ...]]:
    groups = group(errors_of(output), SPACE, [LAYER] * len(output))
    assert sorted(i for g in groups for i in g.layers) == list(range(len(output)))
    return [g.layers for g in groups]


def test_layers_alike_form_one_group():
    (found,) = group(errors_of([vector()] * 4), SPACE, [LAYER] * 4)
    assert found == Group((0, 1, 2, 3), USUAL)


def test_noise_stands_alone_each_for_itself():
    assert layers_of([vector(0.5), vector(), vector(1.0), vector(0.001), vector(2.0)]) == [(0,), (1, 3), (2,), (4,)]


def test_only_layers_with_the_same_candidates_meet():
    # K4V8 beats K8V4 by a hair, and so is kept instead: near in every error, and yet another set
    other = vector(over={(1, 2): 0.19999})
    groups = group(errors_of([vector(), other, vector(), other]), SPACE, [LAYER] * 4)
    assert [g.layers for g in groups] == [(0, 2), (1, 3)]
    assert groups[0].candidates == USUAL
    assert groups[1].candidates == ((0, 0), (1, 0), (1, 1), (1, 2), (2, 2))


def test_pairs_that_were_pruned_keep_no_layers_apart():
    assert layers_of([vector(), vector(over={(0, 2): 9.0})]) == [(0, 1)]


def test_a_chain_of_near_layers_is_one_group_and_the_radius_is_the_papers():
    step = 0.049 / math.sqrt(5)  # five errors move together
    assert layers_of([vector(i * step) for i in range(6)]) == [tuple(range(6))]
    step = 0.051 / math.sqrt(5)
    assert layers_of([vector(i * step) for i in range(3)]) == [(0,), (1,), (2,)]


@given(st.permutations(range(6)))
def test_groups_do_not_depend_on_the_order_of_layers(order):
    vectors = [vector(), vector(0.001), vector(0.7), vector(0.701), vector(3.0), vector(over={(1, 2): 0.1})]
    expected = {frozenset({0, 1}), frozenset({2, 3}), frozenset({4}), frozenset({5})}
    groups = layers_of([vectors[i] for i in order])
    assert {frozenset(order[i] for i in g) for g in groups} == expected
    assert groups == sorted(groups)


# --- searching --------------------------------------------------------------------------------------------------------

SAMPLERS = ["nsga2", "moead"]
GROUPS = [Group((0, 3), USUAL), Group((1,), USUAL[1:]), Group((2, 4, 5), USUAL[2:])]  # 5 · 4 · 3 = 60 plans
GEOMETRY = [LAYER] * 6


class Losses:
    """An invented end-to-end loss that counts what it is asked for, and may be interrupted."""

    def __init__(self, stop: float = math.inf) -> None:
        rng = random.Random(1)
        self.weights = [(10 ** rng.uniform(-1, 1), 10 ** rng.uniform(-1, 1)) for _ in GEOMETRY]
        self.stop, self.asked = stop, list[CachePlan]()

    def of(self, plan: CachePlan) -> float:
        pairs = zip(plan.layers, self.weights, strict=True)
        return sum(k * 2.0**-x.k.bits + v * 2.0**-x.v.bits for x, (k, v) in pairs)

    def __call__(self, plan: CachePlan) -> float:
        if len(self.asked) >= self.stop:
            raise KeyboardInterrupt
        self.asked.append(plan)
        return self.of(plan)


def run(losses: Callable[[CachePlan], float], groups: list[Group] = GROUPS, **options: Any) -> Front:
    return search(
        groups, SPACE, GEOMETRY, SETTING, "float32", CONTEXT, losses, **{"trials": 40, "population": 8, **options}
    )


def every_plan() -> list[CachePlan]:
    plans = []
    for choices in itertools.product(*(g.candidates for g in GROUPS)):
        layers = list(GEOMETRY)
        for g, (k, v) in zip(GROUPS, choices, strict=True):
            for i in g.layers:
                layers[i] = replace(LAYER, k=WIDTHS[k], v=WIDTHS[v])
        plans.append(CachePlan(tuple(layers), 16, dtype="float32"))
    return plans


@pytest.mark.parametrize(("sampler", "trials"), [("nsga2", 800), ("moead", 90)])
def test_the_search_finds_the_true_front(sampler, trials):
    losses = Losses()
    points = {(p.effective_bits(CONTEXT), losses.of(p)): p for p in every_plan()}
    true = sorted(p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points))
    front = run(losses, sampler=sampler, trials=trials)
    assert [(p.bits, p.loss) for p in front.points] == true
    assert [p.plan for p in front.points] == [points[x] for x in true]
    assert len(true) > 5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_front_is_that_of_what_was_measured(sampler):
    losses = Losses()
    front = run(losses, sampler=sampler)
    measured = [(p.effective_bits(CONTEXT), losses.of(p)) for p in losses.asked]
    true = {p for p in measured if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in measured)}
    assert [(p.bits, p.loss) for p in front.points] == sorted(true)
    assert front.trials == 40
    assert front.evaluations == len(losses.asked)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_plan_is_evaluated_twice(sampler):
    losses, steps = Losses(), list[int]()
    run(losses, sampler=sampler, trials=200, step=lambda: steps.append(1))
    assert len(set(losses.asked)) == len(losses.asked) <= 60
    assert len(steps) == 200


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_search_beats_random_plans(sampler):
    """By the mean over budgets of the least loss within each."""
    groups = [Group((i,), USUAL) for i in range(6)]
    budgets = [2.5 + i / 4 for i in range(22)]

    def mean(front: Front) -> float:
        within = [[p.loss for p in front.points if p.bits <= b] for b in budgets]
        return sum(math.log(min([*x, 60.0])) for x in within) / len(budgets)

    found = [
        mean(run(Losses(), groups, sampler=sampler, seed=s, trials=200, population=20, nominal=True)) for s in range(3)
    ]
    # with a population as large as the search every plan is random
    chance = [
        mean(run(Losses(), groups, sampler=sampler, seed=s, trials=200, population=200, nominal=True)) for s in range(3)
    ]
    assert sum(found) < sum(chance)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_seed_decides(sampler):
    runs = []
    for seed in (3, 3, 4):
        losses = Losses()
        runs.append((run(losses, sampler=sampler, seed=seed), losses.asked))
    assert runs[0] == runs[1]
    assert runs[0][1] != runs[2][1]


def test_samplers_differ():
    asked = []
    for sampler in SAMPLERS:
        losses = Losses()
        run(losses, sampler=sampler)
        asked.append(losses.asked)
    assert asked[0] != asked[1]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_soft_cap_draws_the_search_below_it(sampler):
    groups = [Group((i,), USUAL) for i in range(6)]

    def share_below(cap: float | None) -> float:
        losses = Losses()
        run(losses, groups, sampler=sampler, cap=cap, trials=100)
        return sum(p.effective_bits(CONTEXT) <= 4 for p in losses.asked) / len(losses.asked)

    assert share_below(4.0) > 1.3 * share_below(None)


def test_nominal_bits_are_counted_where_they_are_asked_for():
    front = run(Losses(), nominal=True)
    assert front.nominal
    assert all(p.bits == p.plan.nominal_bits for p in front.points)
    assert all(p.bits == p.plan.effective_bits(CONTEXT) for p in run(Losses()).points)


def test_groups_with_one_candidate_each_leave_one_plan():
    losses = Losses()
    front = run(losses, [Group((0, 1, 2), USUAL[:1]), Group((3, 4, 5), USUAL[-1:])], trials=5)
    assert len(losses.asked) == front.evaluations == len(front.points) == 1
    assert front.points[0].plan.nominal_bits == 5


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("stops", [[0, 7], pytest.param([12, 0, 4], marks=pytest.mark.slow)], ids=str)
def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path, sampler, stops):
    whole = Losses()
    front = run(whole, sampler=sampler)
    storage = tmp_path / "new folder" / "search.sqlite"
    asked: list[CachePlan] = []
    for stop in stops:
        killed = Losses(stop)
        with pytest.raises(KeyboardInterrupt):
            run(killed, sampler=sampler, storage=storage)
        assert len(killed.asked) == stop
        asked += killed.asked
    last = Losses()
    assert run(last, sampler=sampler, storage=storage) == front
    assert asked + last.asked == whole.asked
    finished = Losses(0)
    assert run(finished, sampler=sampler, storage=storage) == front


def test_more_trials_go_on_from_fewer(tmp_path):
    first, more = Losses(), Losses()
    run(first, trials=20, storage=tmp_path / "a.sqlite")
    front = run(more, trials=40, storage=tmp_path / "a.sqlite")
    assert front == run(Losses(), trials=40)
    assert not set(first.asked) & set(more.asked)


def test_searches_of_one_problem_share_what_was_evaluated(tmp_path):
    first, second = Losses(), Losses()
    run(first, sampler="nsga2", storage=tmp_path / "a.sqlite")
    front = run(second, sampler="moead", cap=4.0, storage=tmp_path / "a.sqlite")
    assert front == run(Losses(), sampler="moead", cap=4.0)
    assert not set(first.asked) & set(second.asked)


@pytest.mark.parametrize(
    "changed", [{"groups": [replace(GROUPS[0], candidates=USUAL[:4]), *GROUPS[1:]]}, {"dtype": "bfloat16"},
                {"setting": Setting(16, 4, 0)}], ids=["groups", "dtype", "setting"],
)  # fmt: skip
def test_another_problem_in_the_same_file_is_kept_apart(tmp_path, changed):
    run(Losses(), storage=tmp_path / "a.sqlite")
    what = {"groups": GROUPS, "setting": SETTING, "dtype": "float32", **changed}
    again, alone = Losses(), Losses()
    fronts = [
        search(what["groups"], SPACE, GEOMETRY, what["setting"], what["dtype"], CONTEXT, x, trials=30, storage=file)
        for x, file in ((again, tmp_path / "a.sqlite"), (alone, None))
    ]
    assert again.asked == alone.asked
    assert fronts[0] == fronts[1]


def test_what_was_evaluated_can_be_read_with_optuna(tmp_path):
    losses = Losses()
    run(losses, storage=tmp_path / "a.sqlite")
    (name,) = optuna.get_all_study_names(f"sqlite:///{tmp_path}/a.sqlite")
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{tmp_path}/a.sqlite")
    assert [t.value for t in study.trials] == [losses.of(p) for p in losses.asked]


def test_a_storage_that_is_something_else_is_refused(tmp_path):
    (tmp_path / "a.sqlite").write_text("not a database, but quite long enough to be taken for one " * 20)
    with pytest.raises(KvcliError, match=r"a\.sqlite cannot keep the search"):
        run(Losses(), storage=tmp_path / "a.sqlite")


def test_a_storage_that_breaks_on_the_way_is_named(tmp_path):
    file = tmp_path / "a.sqlite"

    def breaking(plan: CachePlan) -> float:
        file.write_bytes(b"x" * 8192)
        return 1.0

    with pytest.raises(KvcliError, match=r"a\.sqlite cannot keep the search"):
        run(breaking, storage=file)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_a_number_stops_the_search_and_is_not_kept(tmp_path, loss):
    with pytest.raises(KvcliError, match="not a number"):
        run(lambda plan: loss, storage=tmp_path / "a.sqlite")
    assert run(Losses(), storage=tmp_path / "a.sqlite") == run(Losses())


def test_the_search_is_silent_and_leaves_optunas_logging_as_it_was(tmp_path, capfd):
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    try:
        run(Losses(), storage=tmp_path / "a.sqlite", cap=4.0)
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
    finally:
        optuna.logging.set_verbosity(before)
    assert capfd.readouterr() == ("", "")


# --- the front --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def front() -> Front:
    return run(Losses(), trials=120)


def test_the_best_point_is_the_one_of_least_loss_within_the_budget(front):
    for i in range(60):
        budget = front.points[0].bits + i / 8
        assert best(front, budget).loss == min(p.loss for p in front.points if p.bits <= budget)
    for point in front.points:
        assert best(front, point.bits) == point


def test_a_budget_below_the_front_names_the_least(front):
    with pytest.raises(BudgetError, match="1 effective bits at 1000 tokens cannot be met") as error:
        best(front, 1.0)
    least = float(str(error.value).rstrip(".").rsplit(" ", 1)[1])
    assert best(front, least) == front.points[0]
    with pytest.raises(BudgetError):
        best(front, least - 0.002)
    with pytest.raises(BudgetError, match="1 nominal bits"):
        best(replace(front, nominal=True), 1.0)


def test_a_front_survives_json_and_writes_a_layers_plan_once(front):
    written = json.dumps(front.to_json(), allow_nan=False)
    assert Front.from_json(json.loads(written)) == front
    distinct = {x for p in front.points for x in p.plan.layers}
    assert written.count("num_kv_heads") == len(distinct) < 6 * len(front.points)


DAMAGE: dict[str, Callable[[Any], Any]] = {
    "no points": lambda x: x.pop("points"),
    "a layer too few": lambda x: x["layers"].pop(),
    "a loss that is text": lambda x: x["points"][0].update(loss="0.1"),
    "a loss that is not a number": lambda x: x["points"][0].update(loss=math.nan),
    "bits that are missing": lambda x: x["points"][0].update(bits=None),
    "no plan": lambda x: x["points"][0].pop("plan"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_no_front_is_refused(front, damage):
    obj = json.loads(json.dumps(front.to_json()))
    DAMAGE[damage](obj)
    with pytest.raises((ValueError, TypeError, KeyError, IndexError)):
        Front.from_json(obj)


def test_points_are_of_whole_plans(front):
    assert all(isinstance(p, Point) and len(p.plan.layers) == 6 for p in front.points)
    for p in front.points:
        for g in GROUPS:
            assert len({p.plan.layers[i] for i in g.layers}) == 1
            pair = (WIDTHS.index(p.plan.layers[g.layers[0]].k), WIDTHS.index(p.plan.layers[g.layers[0]].v))
            assert pair in g.candidates


# --- what must be there -----------------------------------------------------------------------------------------------


def test_a_missing_extra_is_answered_with_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=re.escape("needs the package optuna: pip install 'kvcli[search]'")):
        run(Losses())
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(UsageError, match=re.escape("needs the package scikit-learn: pip install 'kvcli[search]'")):
        group(errors_of([vector()]), SPACE, [LAYER])


@pytest.mark.parametrize(
    ("name", "heads"), list(itertools.product(["kvtuner-token", "kvtuner-kivi"], [64, 80, 128, 256]))
)
def test_the_papers_modes_fit_heads_of_every_size(name: str, heads: int):
    space = load_recipe(name)
    assert space is not None
    space = space.fitting([replace(LAYER, head_dim=heads)])
    (setting,) = space.settings()
    assert [[f.bits for f in formats] for formats in (space.k, space.v)] == [[2, 4, 8]] * 2
    assert not any(f.symmetric for f in space.k + space.v)
    assert {f.scale_dtype for f in space.k + space.v} == {"float16"}
    if name == "kvtuner-token":
        assert {(f.axis, f.group) for f in space.k + space.v} == {("token", heads)}
        assert setting == Setting(16, 0, 0)
    else:
        assert {(f.axis, f.group) for f in space.k} == {("channel", 32)}
        assert {f.axis for f in space.v} == {"token"}
        assert {f.group for f in space.v} == {16 if heads == 80 else 32}
        assert setting == Setting(32, 0, 32)
    layer = space.layer(replace(LAYER, head_dim=heads), space.k[1], space.v[1])
    if heads == 128:  # a scale and a zero point take 1 bit in groups of 32, and a quarter over a head
        bits = 8 * layer.page_bytes(setting.block_size) / (setting.block_size * layer.scalars_per_token)
        assert bits == (4.25 if name == "kvtuner-token" else 5)
