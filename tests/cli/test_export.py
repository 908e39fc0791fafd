"""A preset goes in, an artifact comes out, and the same preset is exported from it; what a file cannot hold is said."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from kvcli.artifact import exporting
from kvcli.artifact.reader import Artifact, open_artifact
from kvcli.calibration import presets
from kvcli.cli.export import export
from kvcli.errors import InputError, UsageError
from kvcli.quant.format import KVFormat
from kvcli.quant.prediction import Linear, Predictor, Source

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from cli_checks import Done, accepted, names, refused

MINE = presets.dump([(8, 4), (4, 2)])
QUICK = ("--context", 512, "--tokens", 1024)


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("preset") / "mine.yaml"
    file.write_text(MINE)
    return file


@pytest.fixture(scope="module", params=presets.MODES)
def applied(request: pytest.FixtureRequest, warm, tinystories, preset, tmp_path_factory) -> Done:
    out = tmp_path_factory.mktemp("applied") / "artifact"
    done = warm("calibrate", tinystories, "--recipe", f"kvtuner:{preset}:{request.param}", *QUICK, "--json", "-o", out)
    assert (done.returncode, done.stderr) == (0, "")
    return done


def folder(done: Done) -> Path:
    return Path(done.args[-1])


# --- a preset is applied ----------------------------------------------------------------------------------------------


def test_a_preset_gives_its_own_plan_and_its_measured_loss(applied):
    found, artifact = json.loads(applied.stdout), open_artifact(folder(applied))
    mode = "kivi" if artifact.plan.residual_window else "token"
    assert artifact.plan == presets.Preset("", mode, ((8, 4), (4, 2))).plan(artifact.plan.layers, "bfloat16")
    assert found["nominal_bits"] == 4.5
    assert found["effective_bits"] == artifact.plan.effective_bits(512) > 4.5
    assert artifact.manifest["budget"] == {"bits": found["effective_bits"], "nominal": False}
    (verified,) = artifact.report["verified"]
    assert 0 < verified["kl"] == found["kl"] < 0.5
    assert artifact.report["preset"]["mode"] == mode
    assert artifact.report["preset"]["preset"] == "mine.yaml"
    assert names(folder(applied).parent) == ["artifact"]


def test_what_a_preset_gave_is_an_artifact_like_any_other(applied, warm, text):
    assert len(accepted(warm("generate", folder(applied), "Once upon a time", "--max-tokens", 4))) > 4
    measured = json.loads(accepted(warm("eval", folder(applied), "--tasks", "kl", *text, "--window", 256, "--json")))
    assert measured["kl"]["mean"] > 0


def test_a_preset_is_no_measurement_to_solve_from(applied, warm, out):
    refused(warm("solve", folder(applied), "--bits", 4, "-o", out), 3, "holds no usable measurements")


def test_a_preset_within_the_budget_is_applied_and_one_beyond_it_refused(warm, tinystories, preset, out):
    start = ("calibrate", tinystories, "--recipe", f"kvtuner:{preset}", *QUICK, "--dry-run", "-o", out)
    accepted(warm(*start, "--bits", 8))
    refused(warm(*start, "--bits", 7), 4, "preset mine.yaml takes 7.684 effective bits at 512 tokens, more than 7.")
    accepted(warm(*start, "--bits", 4.5, "--nominal"))
    refused(warm(*start, "--bits", 4.4, "--nominal"), 4, "takes 4.500 nominal bits, more than 4.4.")


def test_a_dry_run_of_a_preset_says_what_it_is(warm, tinystories, preset, out):
    done = warm("calibrate", tinystories, "--recipe", f"kvtuner:{preset}", "--dry-run", "--json", "-o", out)
    found = json.loads(accepted(done))
    assert found["formats"] == {
        "k": ["8-channel32-asym", "4-channel32-asym"],
        "v": ["4-token16-asym", "2-token16-asym"],
    }
    assert found["settings"] == 1


def test_a_shipped_preset_is_refused_for_another_model(warm, tinystories, out):
    done = warm("calibrate", tinystories, "--recipe", "kvtuner:llama-3.1-8b-instruct-kivi-3.25", "-o", out)
    refused(done, 3, "preset llama-3.1-8b-instruct-kivi-3.25 is for 32 layers, and the model has 2.")


def test_without_a_preset_the_budget_is_needed(warm, tinystories, out):
    refused(warm("calibrate", tinystories, "-o", out), 2, "--bits")


# --- and exported -----------------------------------------------------------------------------------------------------


def test_what_was_applied_is_exported_word_for_word(applied, warm, tmp_path):
    file = tmp_path / "again.yaml"
    done = warm("export", folder(applied), "--format", "kvtuner", "-o", file, "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"path": str(file)})
    assert file.read_text() == MINE
    mode = "kivi" if open_artifact(folder(applied)).plan.residual_window else "token"
    assert done.stderr == f"The file holds bits only; read in KVTuner's {mode} mode it is the same plan.\n"
    assert names(tmp_path) == ["again.yaml"]


def test_a_file_that_is_there_is_kept_unless_asked_for(applied, warm, tmp_path):
    file = tmp_path / "kept.yaml"
    file.write_text("mine")
    start = ("export", folder(applied), "--format", "kvtuner", "-o", file)
    refused(warm(*start), 2, "already there")
    assert file.read_text() == "mine"
    assert warm(*start, "--force").returncode == 0
    assert file.read_text() == MINE


@pytest.mark.parametrize("where", ["none/out.yaml", "."])
def test_what_is_no_file_is_wrong_usage(applied, warm, tmp_path, where):
    done = warm("export", folder(applied), "--format", "kvtuner", "-o", tmp_path / where, "--force")
    refused(done, 2, "is not a file in a folder that exists")


def test_an_unknown_format_is_answered_with_those_there_are(applied, warm, tmp_path):
    refused(warm("export", folder(applied), "--format", "nonsense", "-o", tmp_path / "x"), 2, "kvtuner")


def test_every_format_of_the_command_has_its_function():
    assert set(get_args(get_type_hints(export)["format"])) == set(exporting.EXPORTERS)


# --- what KVTuner cannot say ------------------------------------------------------------------------------------------


@pytest.fixture
def opened(applied: Done) -> Artifact:
    return open_artifact(folder(applied))


def with_format(artifact: Artifact, index: int, which: str, fmt: KVFormat) -> Artifact:
    plan = artifact.plan
    return replace(artifact, plan=plan.with_layer(index, plan.layers[index].with_format(which, fmt)))


@pytest.mark.parametrize(("which", "words"), [("k", "keys"), ("v", "values")])
def test_other_widths_are_refused_naming_the_first_layer(opened, tmp_path, which, words):
    changed = with_format(opened, 1, which, KVFormat(3, group=16))
    with pytest.raises(InputError, match=rf"^layer 1 stores {words} in 3 bits, and KVTuner's format knows"):
        exporting.export(changed, "kvtuner", tmp_path / "out.yaml")
    changed = with_format(changed, 0, which, KVFormat(1, group=16))
    with pytest.raises(InputError, match=r"^layer 0 stores .* in 1 bits"):
        exporting.export(changed, "kvtuner", tmp_path / "out.yaml")
    assert names(tmp_path) == []


def test_16_bits_can_be_said(opened, tmp_path):
    exporting.export(with_format(opened, 1, "v", KVFormat.exact()), "kvtuner", tmp_path / "out.yaml")
    assert presets.parse((tmp_path / "out.yaml").read_bytes(), "x") == ((8, 4), (4, 16))


def test_what_a_predictor_leaves_over_is_refused(opened, tmp_path):
    layers = (opened.plan.layers[0], replace(opened.plan.layers[1], predictor=Predictor(v=Linear((Source(1, "k"),)))))
    with pytest.raises(InputError, match=r"^layer 1 stores what predictor v from 1\.k leaves over"):
        exporting.export(replace(opened, plan=replace(opened.plan, layers=layers)), "kvtuner", tmp_path / "out.yaml")


def test_what_is_lost_is_said(opened, tmp_path):
    layers = tuple(replace(x, center=True, transform="hadamard", rope="before") for x in opened.plan.layers)
    plan = replace(opened.plan, layers=layers, sink_tokens=4, residual_window=64)
    (lost,) = exporting.export(replace(opened, plan=plan), "kvtuner", tmp_path / "out.yaml")
    for words in ("scale dtypes", "means", "rotations", "before RoPE", "4 exact sinks", "window of 64 exact tokens"):
        assert words in lost
    plan = replace(opened.plan, layers=tuple(replace(x, center=True) for x in opened.plan.layers), residual_window=0)
    (lost,) = exporting.export(replace(opened, plan=plan), "kvtuner", tmp_path / "out.yaml", overwrite=True)
    assert "means" in lost
    assert not any(x in lost for x in ("rotations", "RoPE", "sinks", "window"))


def test_a_failed_export_leaves_the_old_file(opened, tmp_path):
    file = tmp_path / "out.yaml"
    file.write_text("old")
    with pytest.raises(UsageError):
        exporting.export(opened, "kvtuner", file)
    with pytest.raises(InputError):
        exporting.export(with_format(opened, 0, "k", KVFormat(3, group=16)), "kvtuner", file, overwrite=True)
    assert file.read_text() == "old"
    assert names(tmp_path) == ["out.yaml"]
