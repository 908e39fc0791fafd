"""From a loaded model to a written artifact: the same seed, the same plan; and nothing measured for nothing."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from kvcli.artifact.reader import open_artifact
from kvcli.calibration import corpora, measuring, paper_search, pipeline, refine, sensitivity
from kvcli.calibration.corpora import Corpus
from kvcli.calibration.pipeline import Budget, Calibration
from kvcli.calibration.sensitivity import Cost, Sensitivity
from kvcli.errors import BudgetError, InputError, UsageError
from kvcli.models.loading import LoadedModel, load
from kvcli.plan import CachePlan
from kvcli.quant.format import KVFormat

BUDGET = Budget(4.5, 512)


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
        patched.setattr(sensitivity, "setting_plans", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipeline.calibrate(loaded, corpus, BUDGET, out)
    again = pipeline.calibrate(loaded, corpus, BUDGET, out)
    assert again.stages.resumed == ["moments", "sensitivity"]
    assert again.plan == found.plan
    assert again.report == found.report
    assert pipeline.calibrate(loaded, corpus, BUDGET, out, fresh=True).stages.resumed == []


def interrupted(*args: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("killed", [0, 1, 3, 7, 10])
def test_a_calibration_that_was_killed_repeats_no_finished_evaluation(
    loaded, corpus, found, monkeypatch, tmp_path, killed
):
    done: list[str] = []

    def counting(name: str, last: int) -> Any:
        work = getattr(sensitivity, name)

        def counted(*args: Any) -> Any:
            if len(done) == last:
                raise KeyboardInterrupt
            result = work(*args)
            done.append(f"{name} {args[1:] if name == 'measure_plan' else args[4]}")
            return result

        return counted

    for last in (killed, math.inf):
        with monkeypatch.context() as patched:
            for name in ("measure_layer", "measure_plan"):
                patched.setattr(sensitivity, name, counting(name, last))
            if last == killed:
                with pytest.raises(KeyboardInterrupt):
                    pipeline.calibrate(loaded, corpus, BUDGET, tmp_path / "artifact")
            else:
                again = pipeline.calibrate(loaded, corpus, BUDGET, tmp_path / "artifact")
    assert len(done) == 2 + 5 + len(found.report["verified"])
    assert len(set(done)) >= len(done) - 1  # a plan of the settings may be tried again, on other text
    assert again.plan == found.plan
    assert again.report == found.report


def test_tasks_may_run_anywhere_and_in_any_order(loaded, corpus, found, tmp_path):
    def backwards(work: Any, tasks: Any) -> Any:
        return [(i, work(tasks[i])) for i in reversed(range(len(tasks)))]

    again = pipeline.calibrate(loaded, corpus, BUDGET, tmp_path / "artifact", run=backwards)
    assert again.plan == found.plan
    assert again.report == found.report


# --- two at once ------------------------------------------------------------------------------------------------------

TWO = """
import sys
from pathlib import Path
from kvcli.calibration import corpora, pipeline
from kvcli.errors import KvcliError
from kvcli.models.loading import load

loaded = load(sys.argv[1])
corpus = corpora.tokens("builtin:narrative", loaded, num_tokens=1024, seed=0, length=256)
print("ready", flush=True)
sys.stdin.readline()
found = pipeline.calibrate(loaded, corpus, pipeline.Budget(float(sys.argv[3]), 512), Path(sys.argv[2]))
try:
    pipeline.write(loaded, corpus, found, Path(sys.argv[2]), seed=0, overwrite=len(sys.argv) > 4)
    print("written")
except KvcliError as error:
    print(error)
"""


def at_once(clean_env: dict[str, str], *runs: tuple[object, ...]) -> list[str]:
    """Start several calibrations at the same moment, and return the last line of each."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, *map(str, words)], stdin=-1, stdout=-1, text=True, env=clean_env
        )
        for words in runs
    ]  # fmt: skip
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=300)[0].strip() for process in started]
    assert [process.returncode for process in started] == [0] * len(runs)
    return said


@pytest.mark.slow
def test_two_calibrations_in_one_folder_do_not_disturb_one_another(tinystories, clean_env, found, tmp_path):
    said = at_once(clean_env, (tinystories, tmp_path / "a", BUDGET.bits), (tinystories, tmp_path / "b", 3.5))
    assert said == ["written", "written"]
    assert open_artifact(tmp_path / "a").plan == found.plan
    assert open_artifact(tmp_path / "b").plan.effective_bits(512) <= 3.5
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.slow
@pytest.mark.parametrize("force", [False, True])
def test_of_two_calibrations_of_one_output_one_wins_whole(tinystories, clean_env, found, tmp_path, force):
    words = (tinystories, tmp_path / "a", BUDGET.bits, *(["force"] if force else []))
    said = sorted(at_once(clean_env, words, words))
    assert said[-1] == "written"
    assert said[0] == "written" if force else "already holds an artifact" in said[0]
    assert open_artifact(tmp_path / "a").plan == found.plan
    assert [x.name for x in tmp_path.iterdir()] == ["a"]


# --- KVTuner's search -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(loaded: LoadedModel, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    pytest.importorskip("optuna")
    pytest.importorskip("sklearn")
    out = tmp_path_factory.mktemp("kvtuner") / "artifact"
    return pipeline.calibrate(loaded, corpus, BUDGET, out, search="kvtuner-nsga2", trials=12)


def test_kvtuners_search_meets_the_budget_and_keeps_its_front(searched):
    assert searched.plan.effective_bits(512) <= BUDGET.bits
    front = json.loads(json.dumps(searched.report))["front"]
    assert front["trials"] == 12
    assert 0 < front["evaluations"] <= 12
    bits, losses = ([x[name] for x in front["points"]] for name in ("bits", "loss"))
    assert bits == sorted(bits)
    assert losses == sorted(losses, reverse=True)
    within = [x for x, b in zip(losses, bits, strict=True) if b <= BUDGET.bits]
    assert searched.report["verified"][0]["kl"] == min(within)


def test_kvtuners_search_goes_on_where_it_was_killed(loaded, corpus, searched, monkeypatch, tmp_path):
    count = 0
    cost_of = sensitivity.Probe.cost_of

    def counted(self: Any, plan: CachePlan) -> Any:
        nonlocal count
        if count == 9:
            raise KeyboardInterrupt
        count += 1
        return cost_of(self, plan)

    monkeypatch.setattr(sensitivity.Probe, "cost_of", counted)
    words = {"search": "kvtuner-nsga2", "trials": 12}
    with pytest.raises(KeyboardInterrupt):
        pipeline.calibrate(loaded, corpus, BUDGET, tmp_path / "artifact", **words)
    count = 100
    again = pipeline.calibrate(loaded, corpus, BUDGET, tmp_path / "artifact", **words)
    assert again.report == searched.report
    assert 9 + count - 100 == 5 + searched.report["front"]["evaluations"] + 1  # settings, search, the chosen one


def test_kvtuners_search_says_what_it_needs_before_anything_is_measured(loaded, corpus, monkeypatch, tmp_path):
    monkeypatch.setattr(paper_search, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install"):
        pipeline.calibrate(loaded, corpus, BUDGET, tmp_path / "artifact", search="kvtuner-moead")
    assert list(tmp_path.iterdir()) == []


# --- perplexity from KL -----------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(1e-6, 2), st.floats(-2, 2)), min_size=1, max_size=9), st.integers(1, 10**6))
def test_perplexity_is_predicted_between_what_was_measured_and_what_theory_says(pairs, tokens):
    measured = [Cost(kl, nll) for kl, nll in pairs]
    ratio = sum(x.delta_nll for x in measured) / sum(x.kl for x in measured)
    found = measuring.nll_per_kl(measured, tokens)
    assert max(0.0, min(1.0, ratio)) * (1 - 1e-9) <= found <= max(1.0, ratio) * (1 + 1e-9)


def test_more_tokens_bring_the_prediction_nearer_to_what_was_measured():
    found = [measuring.nll_per_kl([Cost(0.01, 0.02)], n) for n in (1, 10**4, 10**8)]
    assert found == sorted(found)
    assert found[0] == pytest.approx(1, abs=0.01)
    assert found[-1] == pytest.approx(2, abs=0.01)


def test_another_budget_measures_only_what_depends_on_it(loaded, corpus, found, out):
    again = pipeline.calibrate(loaded, corpus, Budget(3.5, 512), out)
    assert again.stages.resumed[:3] == ["moments", "sensitivity", "settings"]
    assert again.plan.effective_bits(512) <= 3.5
    assert again.report["sensitivity"] == found.report["sensitivity"]


def test_the_plan_meets_the_budget_and_is_the_best_of_those_tried(found):
    assert found.plan.effective_bits(512) <= BUDGET.bits
    tried = found.report["verified"]
    assert refine.LEADING < len(tried) <= 8
    best = tried[found.report["chosen"]]
    leading = tried[: refine.LEADING]
    assert best["kl"] <= min(x["kl"] for x in leading)
    assert best in leading or best["kl"] < min(x["kl"] for x in leading)
    for name in ("block_size", "sink_tokens", "residual_window", "nominal_bits"):
        assert best[name] == getattr(found.plan, name)
    assert best["effective_bits"] == found.plan.effective_bits(512)
    assert 0 < best["kl"] < 0.1
    assert all(x["effective_bits"] <= 5 for x in tried)
    assert all(math.isfinite(x["delta_nll"]) for x in tried)


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


# --- writing ----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_was_found(written, found, loaded, corpus, out):
    artifact = open_artifact(written)
    assert artifact.path == out.resolve()
    assert artifact.plan == found.plan
    assert artifact.report == json.loads(json.dumps(found.report))
    assert all(torch.equal(x, found.tensors[name]) for name, x in artifact.tensors().items())
    manifest = artifact.manifest
    assert manifest["context"] == 512
    assert manifest["budget"] == {"bits": BUDGET.bits, "nominal": False}
    assert [x["name"] for x in manifest["stages"]] == ["moments", "sensitivity", "settings", "verify", "refine"]
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


def test_exact_layers_are_the_models_own(loaded):
    layers = pipeline.exact_layers(loaded)
    assert [(x.num_kv_heads, x.head_dim, x.kind, x.k, x.v) for x in layers] == [
        (4, 16, "full", KVFormat.exact(), KVFormat.exact())
    ] * 2
    assert CachePlan(tuple(layers)).bytes_at(512) == 2 * 512 * 2 * 2 * 4 * 16
