"""Transforms that calibration fuses, and ``kvcli eval --simulate-activations``, as their user meets them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from cli_checks import CORPUS, Done, accepted, refused

from kvcli.calibration.learn_settings import LearnSettings

RECIPE = """
search:
  transform: hadamard
  center: true
  k: [{bits: [3, 4], group: 16, grid: gaussian, scale_dtype: e5m3}]
  v: [{bits: [3, 4], group: 16, grid: gaussian, scale_dtype: e5m3}]
  sink_tokens: [4]
learn:
  format: {bits: 2, group: 16, grid: gaussian, scale_dtype: e5m3}
  windows: 6
  tokens: 64
  held_out: 2
  steps: 2
  check_every: 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transforms")
    (folder / "tiny.yaml").write_text(RECIPE)
    closed = RECIPE.replace("steps: 2", "steps: 0").replace("windows: 6", "windows: 3")
    (folder / "closed.yaml").write_text(closed)
    (folder / "text.txt").write_text(CORPUS)
    return folder


@pytest.fixture(scope="module")
def artifact(folder: Path, tinystories: Path, run_kvcli: Callable[..., Done]) -> Path:
    done = run_kvcli(
        "calibrate", tinystories, "--bits", 4.5, "--context", 512, "--recipe", "tiny.yaml", "--tokens", 512,
        "--dtype", "float32", "--json", "-o", "out", cwd=folder,
    )  # fmt: skip
    assert json.loads(accepted(done))["effective_bits"] <= 4.5
    return folder / "out"


def test_a_recipe_that_learns_leaves_an_ordinary_artifact(artifact: Path, run_kvcli: Callable[..., Done]) -> None:
    report = json.loads((artifact / "report.json").read_text())["transforms"]
    assert len(report["curve"]) == 2
    assert report["settings"]["maps"] == ["r_ov", "s_qk", "s_ov"]
    assert report["logit_difference"] < 1e-4
    assert len(report["qsur"]["after"]) == 2
    manifest = json.loads((artifact / "kvcli.json").read_text())
    assert [x["name"] for x in manifest["stages"]][:3] == ["spread", "importance", "transforms"]
    assert "moments" not in [x["name"] for x in manifest["stages"]]
    assert not list(artifact.parent.glob(".out.stages"))
    done = run_kvcli("generate", artifact, "Once upon a time", "--max-tokens", 4)
    assert accepted(done).strip()


def closed_form(model: Path, out: str, *more: object) -> list[object]:
    words = ["calibrate", model, "--bits", 4.5, "--context", 512, "--recipe", "closed.yaml", "--tokens", 512, "-o", out]
    return [*words, *more]


def test_the_default_takes_closed_forms_and_no_step() -> None:
    learn = LearnSettings.of_recipe("balanced")
    assert learn is not None
    assert (learn.steps, learn.start, learn.means) == (0, "closed-form", True)
    assert LearnSettings.of_recipe("fast") is None


def test_a_model_whose_weights_are_quantised_does_without_closed_forms(
    tinystories: Path, folder: Path, run_kvcli: Callable[..., Done]
) -> None:
    accepted(run_kvcli(*closed_form(tinystories, "int4", "--weights", "int4", "--weight-method", "rtn"), cwd=folder))
    assert "transforms" in json.loads((folder / "int4/report.json").read_text())
    done = run_kvcli(*closed_form(folder / "int4", "again"), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Transforms are left out" in done.stderr
    assert "transforms" not in json.loads((folder / "again/report.json").read_text())


def test_closed_forms_make_do_with_the_text_that_is_asked_for(
    tinystories: Path, folder: Path, run_kvcli: Callable[..., Done]
) -> None:
    long = (
        RECIPE.replace("steps: 2", "steps: 0").replace("windows: 6", "windows: 12").replace("tokens: 64", "tokens: 512")
    )
    (folder / "long.yaml").write_text(long)
    accepted(run_kvcli(*closed_form(tinystories, "short", "--recipe", "long.yaml"), cwd=folder))
    manifest = json.loads((folder / "short/kvcli.json").read_text())
    assert manifest["calibration"]["tokens"] == 512
    assert "transforms" in [x["name"] for x in manifest["stages"]]


def test_learning_by_name_learns_also_where_the_recipe_takes_no_steps(
    tinystories: Path, folder: Path, run_kvcli: Callable[..., Done]
) -> None:
    words = closed_form(tinystories, "never", "--transforms", "learned", "--device-map", "auto")
    refused(run_kvcli(*words, cwd=folder), 2, "Transforms are learned here")


def test_simulated_activations_cost_and_say_so(artifact: Path, folder: Path, run_kvcli: Callable[..., Done]) -> None:
    words = ("eval", artifact, "--data", folder / "text.txt", "--window", 64, "--limit", 2, "--json")
    plain = json.loads(run_kvcli(*words).stdout)
    rough = json.loads(run_kvcli(*words, "--simulate-activations", 4, "--rotate-down").stdout)
    assert rough["simulated_activations"] == {"bits": 4, "rotate_down": True}
    assert "simulated_activations" not in plain
    assert rough["kl"]["mean"] > 1.5 * plain["kl"]["mean"]
    assert rough["ppl"]["reference"] == pytest.approx(plain["ppl"]["reference"])


def test_options_that_contradict_one_another_are_refused(
    artifact: Path, tinystories: Path, folder: Path, run_kvcli: Callable[..., Done]
) -> None:
    refused(run_kvcli("eval", artifact, "--rotate-down"), 2, "--simulate-activations")
    learn = ("calibrate", tinystories, "--bits", 5, "--recipe", "faithful", "-o", "x")
    refused(run_kvcli(*learn, "--device-map", "auto", cwd=folder), 2, "--transforms none")
    preset = ("calibrate", tinystories, "--recipe", "kvtuner:x.yaml", "--transforms", "learned", "-o", "x")
    (folder / "x.yaml").write_text("0: {nbits_key: 4, nbits_value: 2}\n1: {nbits_key: 4, nbits_value: 2}\n")
    refused(run_kvcli(*preset, cwd=folder), 2, "--transforms learned is for recipes")
