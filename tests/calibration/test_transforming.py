"""The stage that learns and fuses: the same function, another hash, a report, and nothing computed twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvcli.calibration import corpora, transforming
from kvcli.calibration.learn_settings import LearnSettings
from kvcli.calibration.learning import Learner
from kvcli.calibration.pipeline import exact_layers, moments
from kvcli.calibration.space import SearchSpace, load_recipe
from kvcli.errors import InputError, KvcliError
from kvcli.models.loading import LoadedModel, load
from kvcli.plan import CachePlan
from kvcli.quant.format import KVFormat

SETTINGS = LearnSettings(
    format=KVFormat(2, grid="gaussian", scale_dtype="e5m3"), windows=6, tokens=64, held_out=2, steps=2, check_every=2,
)  # fmt: skip


def fresh(path: Path) -> LoadedModel:
    return load(str(path), dtype="float32")


def corpus_of(loaded: LoadedModel) -> corpora.Corpus:
    return corpora.tokens("builtin:narrative", loaded, num_tokens=384, seed=0, length=128)


def again_in_vain(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a finished stage was run again")


def test_the_stage_keeps_the_function_and_reports_what_it_did(tinystories: Path, tmp_path: Path) -> None:
    loaded = fresh(tinystories)
    ids, source = torch.arange(5, 69)[None], loaded.sha256
    with torch.no_grad():
        before = loaded.model(ids, use_cache=False).logits
    weights = {name: x.clone() for name, x in loaded.model.state_dict().items()}
    report, means, ran = transforming.apply(loaded, corpus_of(loaded), SETTINGS, tmp_path / "out")
    loaded.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        after = loaded.model(ids, use_cache=False).logits
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
    changed = {name.rpartition("proj")[0][-2:] for name, x in loaded.model.state_dict().items()
               if not torch.equal(x, weights[name])}  # fmt: skip
    assert changed == {"q_", "k_", "v_", "o_"}
    assert report["logit_difference"] < 1e-4
    assert len(report["curve"]) == 2
    assert [x["step"] for x in report["held_out"]] == [0, 2]
    for side in ("before", "after"):
        assert len(report["qsur"][side]) == 2
        assert all(0 < x < 1 for own in report["qsur"][side] for which in "kv" for x in own[which])
    assert report["qsur"]["before"] != report["qsur"]["after"]
    assert sorted(means) == [f"layer.{i}.{w}.mean" for i in range(2) for w in "kv"]
    assert [x["name"] for x in ran] == ["spread", "importance", "transforms"]
    assert loaded.sha256 != source == loaded.source_sha256

    # a second run takes all of it from the first
    again = fresh(tinystories)
    with pytest.MonkeyPatch.context() as patch:
        for where, name in ((Learner, "run"), (transforming, "_spread"), (transforming, "_importance")):
            patch.setattr(where, name, again_in_vain)
        assert transforming.apply(again, corpus_of(again), SETTINGS, tmp_path / "out")[0] == report
    for name, x in loaded.model.state_dict().items():
        assert torch.equal(x, again.model.state_dict()[name])
    assert again.sha256 == loaded.sha256


def test_means_belong_to_the_fused_model(tinystories: Path, tmp_path: Path) -> None:
    """What centring takes off must be the same vector, seen through the transforms."""
    loaded = fresh(tinystories)
    changes = {"steps": 0, "means": False, "tokens": 128, "windows": 3}
    settings = LearnSettings.from_json({**SETTINGS.to_json(), **changes})
    _, found, _ = transforming.apply(loaded, corpus_of(loaded), settings, tmp_path / "out")
    exact = CachePlan(tuple(exact_layers(loaded)))
    fused = moments(loaded, exact, corpus_of(loaded).ids, lambda: None)
    assert sorted(found) == sorted(fused)
    for name, mean in found.items():
        torch.testing.assert_close(mean, fused[name], rtol=1e-3, atol=1e-4)


def test_a_model_that_computes_something_else_is_not_passed_on(
    tinystories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = transforming.fuse

    def wrong(model: Any, maps: Any) -> int:
        model.model.layers[0].self_attn.v_proj.weight.mul_(1.5)
        return real(model, maps)

    monkeypatch.setattr(transforming, "fuse", wrong)
    loaded = fresh(tinystories)
    with pytest.raises(KvcliError, match="computes another function"):
        transforming.apply(loaded, corpus_of(loaded), SETTINGS, tmp_path / "out")


def test_the_faithful_recipe_searches_as_the_default_does() -> None:
    assert load_recipe("faithful") == load_recipe("balanced")
    learn = LearnSettings.of_recipe("faithful")
    assert learn == LearnSettings()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("search: balanced\nlern: {}\n", "has no section 'lern'; it has search, learn"),
        ("learn: {}\n", "has no section 'search'"),
        ("search: nothing\n", "searches as 'nothing' does"),
        ("search: faithful\n", "searches as 'faithful' does"),
        ("- 1\n", "has no section 'search'"),
        ("search: {k: [{bits: 3}]}\n", "is not a recipe"),
        ("search: [\n", "is not a recipe"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=named):
        load_recipe(str(path))


def test_a_section_learn_must_be_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("search: balanced\nlearn: 3\n")
    assert isinstance(load_recipe(str(path)), SearchSpace)
    with pytest.raises(InputError, match="'learn' is no mapping"):
        LearnSettings.of_recipe(str(path))
