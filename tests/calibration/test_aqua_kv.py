"""Predictors: what they read, how they are fitted, and that they pay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcli.calibration import aqua_kv, corpora
from kvcli.calibration.adapting import AdapterSettings
from kvcli.calibration.aqua_kv import design, distortion, fit, fit_in_order, predictions, split, statistics
from kvcli.calibration.pipeline import exact_layers, moments
from kvcli.calibration.sensitivity import Probe
from kvcli.errors import InputError, UsageError
from kvcli.models.loading import LoadedModel, load
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.packed_cache import ATTENTION

TWO = KVFormat(2, group=16, grid="gaussian", scale_dtype="e5m3")
LAYER = LayerPlan(2, 16, TWO, TWO)


def reads(layers: list[LayerPlan], which: str) -> list[list[str]]:
    found = [None if x.predictor is None else x.predictor.of(which) for x in layers]
    return [[] if x is None else list(map(str, x.inputs)) for x in found]


def test_absorbed_reads_a_layers_own_keys() -> None:
    found = design([LAYER] * 3, "absorbed")
    assert reads(found, "k") == [[], [], []]
    assert reads(found, "v") == [["0.k"], ["1.k"], ["2.k"]]
    assert all(x.predictor is not None and x.predictor.is_absorbed(i) for i, x in enumerate(found))
    assert [x.rope for x in found] == ["after"] * 3
    assert design([LAYER] * 3, "none") == [LAYER] * 3


@pytest.mark.parametrize(
    ("fields", "keys", "values"),
    [
        ({"depth": 1, "both": False}, ["", "0.k", "1.k", "2.k"], ["0.k", "1.k 0.v", "2.k 1.v", "3.k 2.v"]),
        ({"depth": 1}, ["", "0.k 0.v", "1.k 1.v", "2.k 2.v"], ["0.k", "1.k 0.k 0.v", "2.k 1.k 1.v", "3.k 2.k 2.v"]),
        ({"depth": 2, "both": False}, ["", "0.k", "1.k 0.k", "2.k 1.k"], None),
        ({"depth": 1, "both": False, "back": 2}, ["", "", "0.k", "1.k"], None),
        ({"depth": 3, "both": False, "back": 5}, ["", "", "", ""], ["0.k", "1.k", "2.k", "3.k"]),
        ({"depth": 1, "both": False, "back": 3, "star": True}, ["", "0.k", "0.k", ""], None),
    ],
)  # fmt: skip
def test_anchors(fields: dict[str, Any], keys: list[str], values: list[str] | None) -> None:
    found = design([LAYER] * 4, "always", **fields)
    assert [" ".join(x) for x in reads(found, "k")] == keys
    assert values is None or [" ".join(x) for x in reads(found, "v")] == values
    assert all(x.rope == "before" for x in found)
    CachePlan(tuple(found))


def test_layers_that_pack_at_once_do_not_read_those_that_wait() -> None:
    blocks = replace(LAYER, k=KVFormat(2, axis="channel", group=16))
    plan = CachePlan((LAYER, blocks, LAYER, LAYER, blocks))
    with pytest.raises(InputError, match="layer 2 packs tokens before"):
        CachePlan(tuple(design(plan.layers, "always")))
    found = AdapterSettings("always").applied(plan)
    assert [" ".join(x) for x in reads(list(found.layers), "k")] == [
        "", "0.k 0.v", "0.k 0.v", "2.k 2.v", "3.k 3.v 2.k 2.v",
    ]  # fmt: skip
    waiting = replace(plan, residual_window=16)  # where all wait, all are read
    assert reads(list(AdapterSettings("always").applied(waiting).layers), "k")[2] == ["1.k", "1.v", "0.k", "0.v"]


def test_kinds_are_not_mixed_and_exact_tensors_left_alone() -> None:
    sliding = replace(LAYER, kind="sliding", window=8)
    found = design([LAYER, sliding, LAYER, sliding, replace(LAYER, v=KVFormat.exact())], "always", depth=1, both=False)
    assert reads(found, "k") == [[], [], ["0.k"], ["1.k"], ["2.k"]]
    assert reads(found, "v")[4] == []
    CachePlan(tuple(found))


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="--adapters capacity is not one of"):
        design([LAYER], "capacity")  # type: ignore[arg-type]
    for fields in ({"back": 0}, {"depth": 0}):
        with pytest.raises(UsageError, match="at least one layer"):
            design([LAYER], "always", **fields)


def test_some_text_is_held_out() -> None:
    many = split(20, 100)
    assert [x[0][0] for x in many].count(True) == 3
    assert all(x[0][1] == slice(4, 100) for x in many)
    ((train, held),) = split(1, 512)
    assert (train[0], held[0]) == (False, True)
    assert train[1].stop == held[1].start < held[1].stop == 512
    ((train, held),) = split(1, 2)
    assert held[1] == slice(1, 2)


@pytest.mark.parametrize(("bits", "lost"), [(2, 0.1175), (3, 0.0345), (4, 0.0095)])
def test_distortion_is_max_s(bits: int, lost: float) -> None:
    """Max 1960: what his levels lose of a normal variable; a scale of its own for 64 values loses a little less."""
    fmt = KVFormat(bits, group=64, grid="gaussian")
    assert distortion(fmt) == pytest.approx(lost, rel=0.1)
    assert distortion(KVFormat.exact()) == 0
    assert 0 < distortion(KVFormat(bits, axis="channel", group=16)) < 2 * lost


@pytest.fixture(scope="module")
def loaded(tinystories: Path) -> LoadedModel:
    found = load(str(tinystories))
    found.model.set_attn_implementation(ATTENTION)
    return found


@pytest.fixture(scope="module")
def ids(loaded: LoadedModel) -> torch.Tensor:
    return corpora.tokens("builtin", loaded, num_tokens=8 * 256, seed=0, length=256).ids


def base(loaded: LoadedModel, fmt: KVFormat = TWO) -> CachePlan:
    layers = tuple(replace(x, k=fmt, v=fmt, transform="hadamard", center=True) for x in exact_layers(loaded))
    return CachePlan(layers, sink_tokens=4)


@pytest.fixture(scope="module")
def means(loaded: LoadedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return moments(loaded, base(loaded), ids, lambda: None)


def adapted(plan: CachePlan, mode: Any, **fields: Any) -> CachePlan:
    return replace(plan, layers=tuple(design(plan.layers, mode, **fields)))


@pytest.mark.parametrize("mode", ["absorbed", "always"])
def test_predictors_cut_the_loss_on_other_text(
    loaded: LoadedModel, ids: torch.Tensor, means: dict[str, torch.Tensor], mode: str
) -> None:
    plan = adapted(base(loaded), mode)
    fitted = fit(plan, statistics(loaded, plan, ids))
    assert set(fitted.tensors) | set(means) == set(plan.model_tensors())
    other = corpora.tokens("builtin:narrative", loaded, num_tokens=512, seed=5, length=256).ids
    with torch.no_grad():
        before = Probe(loaded.model, other, loaded.rope, means).cost_of(base(loaded))
        after = Probe(loaded.model, other, loaded.rope, {**means, **fitted.tensors}).cost_of(plan)
    assert after.kl < 0.8 * before.kl
    assert all(0 < x < 1 for x in fitted.left.values())
    assert [str(t) for t, _ in predictions(plan)] == list(fitted.left)


def test_noise_stands_for_reconstructions(
    loaded: LoadedModel, ids: torch.Tensor, means: dict[str, torch.Tensor]
) -> None:
    """Fitting to exact moments and white noise foretells what fitting in order finds on reconstructions."""
    plan = adapted(base(loaded), "always")
    foretold = fit(plan, statistics(loaded, plan, ids)).left
    found = fit_in_order(loaded, plan, ids, means).left
    assert list(found) == list(foretold)
    for name, x in found.items():
        assert foretold[name] == pytest.approx(x, rel=0.2), name


def test_fewer_bits_ask_for_another_predictor(loaded: LoadedModel, ids: torch.Tensor) -> None:
    plan = adapted(base(loaded), "always")
    found = statistics(loaded, plan, ids)
    fine = adapted(base(loaded, KVFormat(8, group=16)), "always")
    assert sum(fit(fine, found).left.values()) < sum(fit(plan, found).left.values())


def test_a_predictor_in_few_bits_or_of_low_rank_still_predicts(loaded: LoadedModel, ids: torch.Tensor) -> None:
    found = None
    losses = {}
    for name, fields in {"whole": {}, "8": {"bits": 8}, "4": {"bits": 4}, "rank": {"rank": 8}}.items():
        plan = adapted(base(loaded), "always", **fields)
        found = found or statistics(loaded, plan, ids)
        fitted = fit(plan, found)
        assert {n: x.shape for n, x in fitted.tensors.items()} == {
            n: torch.Size(shape) for n, (_, shape) in plan.model_tensors().items() if "predictor" in n
        }
        means = {n: torch.zeros(shape) for n, (_, shape) in plan.model_tensors().items() if n.endswith("mean")}
        with torch.no_grad():
            losses[name] = Probe(loaded.model, ids[:2], loaded.rope, {**means, **fitted.tensors}).cost_of(plan).kl
        if name != "whole":
            assert plan.model_bytes() < adapted(base(loaded), "always").model_bytes()
    assert losses["8"] < 1.1 * losses["whole"]
    assert losses["4"] < 2 * losses["whole"]


def test_one_short_window_is_enough(loaded: LoadedModel, ids: torch.Tensor) -> None:
    plan = adapted(base(loaded), "always")
    fitted = fit(plan, statistics(loaded, plan, ids[:1]))
    assert all(x.isfinite().all() for x in fitted.tensors.values())
    assert plan.sink_tokens == aqua_kv.SKIP
