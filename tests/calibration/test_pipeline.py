"""From a loaded model to a written artifact: the same seed, the same plan; and nothing measured for nothing."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvcli.artifact.reader import open_artifact
from kvcli.calibration import corpora, pipeline, sensitivity, surrogate
from kvcli.calibration.corpora import Corpus
from kvcli.calibration.pipeline import Budget, Calibration
from kvcli.calibration.sensitivity import Sensitivity
from kvcli.errors import BudgetError, InputError, UsageError
from kvcli.models.loading import LoadedModel, load
from kvcli.plan import CachePlan
from kvcli.quant.format import KVFormat

BUDGET = Budget(5.0, 512)


@pytest.fixture(scope="module")
def loaded(tinystories: Path) -> LoadedModel:
    return load(str(tinystories))


def corpus_of(loaded: LoadedModel, seed: int) -> Corpus:
    return corpora.tokens("builtin:narrative", loaded, num_tokens=1024, seed=seed, length=256)


@pytest.fixture(scope="module")
def corpus(loaded: LoadedModel) -> Corpus:
    return corpus_of(loaded, 0)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline") / "artifact"


@pytest.fixture(scope="module")
def found(loaded: LoadedModel, corpus: Corpus, out: Path) -> Calibration:
    return pipeline.calibrate(loaded, corpus, BUDGET, out)


@pytest.fixture(scope="module")
def written(loaded: LoadedModel, corpus: Corpus, found: Calibration, out: Path) -> Path:
    return pipeline.write(loaded, corpus, found, out, seed=0, overwrite=False)


# --- calibrating ------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_plan_bit_for_bit(loaded, found, tmp_path):
    again = pipeline.calibrate(loaded, corpus_of(loaded, 0), BUDGET, tmp_path / "again")
    assert again.stages.resumed == []
    assert again.plan == found.plan
    assert again.report == found.report
    assert again.tensors.keys() == found.tensors.keys()
    assert all(torch.equal(again.tensors[x], found.tensors[x]) for x in found.tensors)
    assert [x["sha256"] for x in again.stages.record] == [x["sha256"] for x in found.stages.record]


def test_another_seed_measures_other_text(loaded, corpus, found, tmp_path):
    other = corpus_of(loaded, 1)
    assert other.sha256 != corpus.sha256
    again = pipeline.calibrate(loaded, other, BUDGET, tmp_path / "other")
    assert again.report["sensitivity"]["kl"] != found.report["sensitivity"]["kl"]


def test_finished_stages_are_taken_up_and_change_nothing(loaded, corpus, found, monkeypatch, tmp_path):
    out = tmp_path / "artifact"
    with monkeypatch.context() as patched:
        patched.setattr(sensitivity, "measure_settings", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipeline.calibrate(loaded, corpus, BUDGET, out)
    again = pipeline.calibrate(loaded, corpus, BUDGET, out)
    assert again.stages.resumed == ["moments", "sensitivity"]
    assert again.plan == found.plan
    assert again.report == found.report
    assert pipeline.calibrate(loaded, corpus, BUDGET, out, fresh=True).stages.resumed == []


def interrupted(*args: Any) -> Any:
    raise KeyboardInterrupt


def test_another_budget_measures_only_what_depends_on_it(loaded, corpus, found, out):
    again = pipeline.calibrate(loaded, corpus, Budget(3.5, 512), out)
    assert again.stages.resumed == ["moments", "sensitivity", "settings"]
    assert again.plan.effective_bits(512) <= 3.5
    assert again.report["sensitivity"] == found.report["sensitivity"]


def test_the_plan_meets_the_budget_and_is_the_best_of_those_tried(found):
    assert found.plan.effective_bits(512) <= 5
    tried = found.report["verified"]
    assert 1 < len(tried) <= pipeline.VERIFIED
    best = min(tried, key=lambda x: x["kl"])
    for name in ("block_size", "sink_tokens", "residual_window", "nominal_bits"):
        assert best[name] == getattr(found.plan, name)
    assert best["effective_bits"] == found.plan.effective_bits(512)
    assert 0 < best["kl"] < 0.1


def test_means_are_those_of_keys_before_rope_and_of_values_without_the_first_tokens(loaded, corpus, found):
    # read off the projections by stock hooks: a key before RoPE is what its projection returns
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda module, args, result: seen.setdefault(name, []).append(result[0, 4:].double())

    hooks = [
        getattr(layer.self_attn, f"{which}_proj").register_forward_hook(keep(f"layer.{i}.{which}.mean"))
        for i, layer in enumerate(loaded.model.model.layers)
        for which in "kv"
    ]
    loaded.model.set_attn_implementation("sdpa")
    try:
        for window in corpus.ids:
            loaded.model(window[None], use_cache=False)
    finally:
        loaded.model.set_attn_implementation("kvcli")
        for hook in hooks:
            hook.remove()
    assert found.tensors.keys() == seen.keys()
    for name, tensor in found.tensors.items():
        expected = torch.cat(seen[name]).mean(0).view(4, 16)
        # bfloat16 rounds a key after RoPE, which is where it is read
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
        assert tensor.dtype == torch.float32


def test_the_curve_falls_and_never_exceeds_its_budgets(found):
    curve = found.report["curve"]
    assert len(curve) > 10
    for a, b in itertools.pairwise(curve):
        assert a["bits"] < b["bits"]
        assert a["kl"] >= b["kl"] > 0
    assert all(x["effective_bits"] <= x["bits"] for x in curve)


def test_the_report_is_plain_json_and_holds_the_measurements(found):
    again = json.loads(json.dumps(found.report, allow_nan=False))
    assert Sensitivity.from_json(again["sensitivity"]).to_json() == found.report["sensitivity"]


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_a_quantizer_plugin_serves_as_a_recipe(loaded, corpus, tmp_path):
    found = pipeline.calibrate(loaded, corpus, Budget(6.5, 512), tmp_path / "kivi", recipe="kivi")
    assert found.plan.effective_bits(512) <= 6.5
    assert (found.plan.block_size, found.plan.sink_tokens, found.plan.residual_window) == (32, 0, 32)
    assert all((x.k.axis, x.v.axis, x.k.symmetric, x.v.symmetric) == ("channel", "token", False, False)
               for x in found.plan.layers)  # fmt: skip
    assert found.tensors == {}


def test_a_recipe_file_serves_as_a_recipe(loaded, corpus, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("search:\n  k: [{bits: [4, 8], group: 16}]\n  v: [{bits: 16}]\n  residual_windows: [16]\n")
    found = pipeline.calibrate(loaded, corpus, Budget(14, 512), tmp_path / "out", recipe=str(recipe))
    assert all(x.v.is_exact and not x.k.is_exact for x in found.plan.layers)
    assert found.plan.residual_window == 16


def test_an_unknown_recipe_is_answered_with_those_there_are(loaded):
    with pytest.raises(InputError, match=r"no recipe 'nonsense'; there are .*balanced.*kivi"):
        pipeline.search_space("nonsense", pipeline.exact_layers(loaded))


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "nominal"), [(1.0, False), (1.9, True)])
def test_a_budget_that_cannot_be_met_is_refused_before_anything_is_measured(
    loaded, corpus, tmp_path, monkeypatch, bits, nominal
):
    monkeypatch.setattr(pipeline, "moments", interrupted)
    with pytest.raises(BudgetError) as error:
        pipeline.calibrate(loaded, corpus, Budget(bits, 512, nominal), tmp_path / "artifact")
    least = float(str(error.value).rstrip(".").rsplit(" ", 1)[1])
    assert list(tmp_path.iterdir()) == []
    space = pipeline.search_space("balanced", pipeline.exact_layers(loaded))
    pipeline.check_budget(space, pipeline.exact_layers(loaded), Budget(least, 512, nominal), loaded.dtype)
    with pytest.raises(BudgetError):
        pipeline.check_budget(space, pipeline.exact_layers(loaded), Budget(least - 0.002, 512, nominal), loaded.dtype)


@pytest.mark.parametrize(
    ("bits", "context"), [(0.0, 1), (-1.0, 1), (math.nan, 1), (math.inf, 1), (4.0, 0), (65.0, 512), (4.0, 10**9 + 1)]
)
def test_a_budget_that_an_artifact_could_not_state_is_wrong_usage(bits, context):
    with pytest.raises(UsageError):
        Budget(bits, context)


# --- writing, and solving anew ----------------------------------------------------------------------------------------


def test_what_is_written_is_what_was_found(written, found, loaded, corpus, out):
    artifact = open_artifact(written)
    assert artifact.path == out.resolve()
    assert artifact.plan == found.plan
    assert artifact.report == json.loads(json.dumps(found.report))
    assert all(torch.equal(x, found.tensors[name]) for name, x in artifact.tensors().items())
    manifest = artifact.manifest
    assert manifest["context"] == 512
    assert manifest["budget"] == {"bits": 5.0, "nominal": False}
    assert [x["name"] for x in manifest["stages"]] == ["moments", "sensitivity", "settings", "verify"]
    assert manifest["source"]["model"] == "TinyStories-656K"
    assert manifest["source"]["sha256"] == loaded.sha256
    assert manifest["calibration"] == {"data": "builtin:narrative", "sha256": corpus.sha256, "tokens": 1024, "seed": 0}
    assert [x.name for x in out.parent.iterdir()] == [out.name]  # its stages are no longer needed


def test_stock_transformers_loads_the_artifact_as_it_is(written, loaded):
    stock, report = AutoModelForCausalLM.from_pretrained(written, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours = loaded.model.state_dict()
    assert all(torch.equal(x, ours[name]) for name, x in stock.state_dict().items())


def test_no_path_of_the_machine_is_written(written, tinystories):
    for file in written.iterdir():
        data = file.read_bytes()
        assert str(tinystories.parent).encode() not in data
        assert str(written.parent).encode() not in data


def test_solving_for_the_same_budget_predicts_what_calibration_did(written, found, tmp_path):
    path, plan, predicted = pipeline.solve(open_artifact(written), BUDGET, tmp_path / "same", overwrite=False)
    assert plan == surrogate.solve(Sensitivity.from_json(found.report["sensitivity"]), 5.0, 512)[0].plan
    best = found.report["verified"][0]
    assert predicted == pytest.approx(best["predicted_kl"] * found.report["scale"])
    assert open_artifact(path).plan == plan


@pytest.mark.parametrize("budget", [Budget(3.25, 512), Budget(4, 4096), Budget(2.5, 512, nominal=True)])
def test_solving_meets_another_budget_with_the_same_weights(written, tmp_path, budget):
    source = open_artifact(written)
    path, plan, predicted = pipeline.solve(source, budget, tmp_path / "solved", overwrite=False)
    spent = plan.nominal_bits if budget.nominal else plan.effective_bits(budget.context)
    assert budget.bits - 0.5 < spent <= budget.bits
    assert predicted > 0
    again = open_artifact(path)
    assert again.plan == plan
    assert again.manifest["context"] == budget.context
    assert again.manifest["budget"] == {"bits": budget.bits, "nominal": budget.nominal}
    assert [x["name"] for x in again.manifest["stages"]][-1] == "solve"
    assert (path / "model.safetensors").samefile(written / "model.safetensors")
    assert again.tensors().keys() == source.tensors().keys()


def test_an_artifact_that_was_solved_can_be_solved_again(written, found, tmp_path):
    down, _, _ = pipeline.solve(open_artifact(written), Budget(3, 512), tmp_path / "down", overwrite=False)
    _, plan, _ = pipeline.solve(open_artifact(down), BUDGET, tmp_path / "up", overwrite=False)
    assert plan == surrogate.solve(Sensitivity.from_json(found.report["sensitivity"]), 5.0, 512)[0].plan


def test_an_artifact_can_be_solved_in_its_own_place(written, tmp_path):
    path, _, _ = pipeline.solve(open_artifact(written), Budget(4, 512), tmp_path / "a", overwrite=False)
    pipeline.solve(open_artifact(path), Budget(3, 512), path, overwrite=True)
    assert open_artifact(path).plan.effective_bits(512) <= 3
    assert [x.name for x in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("scope", ["unmet", "taken"])
def test_a_refusal_to_solve_writes_nothing(written, tmp_path, scope):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("kept")
    bits, out, error = (1, tmp_path / "new", BudgetError) if scope == "unmet" else (4, taken, UsageError)
    with pytest.raises(error):
        pipeline.solve(open_artifact(written), Budget(bits, 512), out, overwrite=True)
    assert [x.name for x in tmp_path.iterdir()] == ["taken"]
    assert [x.name for x in taken.iterdir()] == ["mine.txt"]


DAMAGE: dict[str, Any] = {
    "nothing": lambda report: report.clear(),
    "no scale": lambda report: report.update(scale=None),
    "no space": lambda report: report["sensitivity"].update(space=[]),
    "no settings": lambda report: report["sensitivity"].update(ratio=[]),
    "a layer too few": lambda report: report["sensitivity"]["geometry"].pop(),
    "a loss too few": lambda report: report["sensitivity"]["kl"]["k"][0].pop(),
    "a loss that is text": lambda report: report["sensitivity"]["kl"]["v"][1].__setitem__(0, "0.1"),
    "a loss that is null": lambda report: report["sensitivity"]["kl"]["v"][1].__setitem__(0, None),
    "another model's heads": lambda report: report["sensitivity"]["geometry"][0].update(head_dim=32),
    "another dtype": lambda report: report["sensitivity"].update(dtype="float64"),
    "a setting outside the space": lambda report: report["sensitivity"]["ratio"][0].update(sink_tokens=3),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_measurements_that_do_not_fit_the_artifact_are_refused(written, tmp_path, damage):
    # report.json is as foreign as any other file: with --no-verify, or rehashed, anything may stand there
    artifact = open_artifact(written)
    report = json.loads(json.dumps(artifact.report))
    DAMAGE[damage](report)
    with pytest.raises(InputError, match=r"holds no usable measurements in report\.json"):
        pipeline.solve(replace(artifact, report=report), BUDGET, tmp_path / "out", overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_exact_layers_are_the_models_own(loaded):
    layers = pipeline.exact_layers(loaded)
    assert [(x.num_kv_heads, x.head_dim, x.kind, x.k, x.v) for x in layers] == [
        (4, 16, "full", KVFormat.exact(), KVFormat.exact())
    ] * 2
    assert CachePlan(tuple(layers)).bytes_at(512) == 2 * 512 * 2 * 2 * 4 * 16
