"""Weights in few bits through the command line: calibrated, evaluated, decoded, and read by another program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_checks import Run, accepted, refused
from safetensors import safe_open

ROOT = Path(__file__).parents[2]
AUTOGPTQ = "KVCLI_TEST_AUTOGPTQ"  # Python of an environment as docs/weights.md describes


@pytest.fixture(scope="module")
def int4(warm: Run, tinystories: Path, small: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("weights") / "int4"
    done = warm("calibrate", tinystories, "--bits", 5, *small, "--weights", "int4", "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    return out


def test_the_artifact_holds_codes_and_says_so(int4):
    with safe_open(int4 / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert {f"model.layers.1.mlp.down_proj.{x}" for x in ("qweight", "qzeros", "scales", "g_idx")} < names
    assert "model.layers.1.mlp.down_proj.weight" not in names
    config = json.loads((int4 / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("gptq", 4, 128)
    assert json.loads((int4 / "quantize_config.json").read_text()) == config
    manifest = json.loads((int4 / "kvcli.json").read_text())
    assert manifest["source"]["changed"] == ["quantization_config"]
    assert manifest["stages"][0]["settings"]["method"] == "precalibrated+gptq"
    report = json.loads((int4 / "report.json").read_text())["weights"]
    assert len(report["layers"]) == 14
    assert all(x["kl_after"] <= x["kl_before"] for x in report["layers"])


def test_it_is_evaluated_and_decoded(int4, warm, text):
    found = warm("eval", int4, *text, "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["kl"]["mean"] < 0.5
    said = []
    for backend in ("reference", "cpu"):
        done = warm("generate", int4, "Once upon a time", "--max-tokens", 6, "--backend", backend)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0][:8] == said[1][:8] != ""


@pytest.mark.parametrize(("kind", "codes"), [("nf4", "uint8"), ("llm-int8", "int8")])
def test_bitsandbytes_weights_are_stored_evaluated_and_decoded(kind, codes, tinystories, warm, small, text, tmp_path):
    pytest.importorskip("bitsandbytes")
    out = tmp_path / kind
    done = warm("calibrate", tinystories, "--bits", 5, *small, "--weights", kind, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert str(file.get_tensor("model.layers.1.mlp.down_proj.weight").dtype) == f"torch.{codes}"
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "bitsandbytes"
    found = warm("eval", out, *text, "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["kl"]["mean"] < 0.5
    done = warm("generate", out, "Once upon a time", "--max-tokens", 6)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_it_is_a_model_to_calibrate_again_but_not_to_quantise_again(int4, warm, small, out):
    done = warm("calibrate", int4, "--bits", 6, *small, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors").read_bytes() == (int4 / "model.safetensors").read_bytes()
    again = out.with_name("again")
    done = warm("calibrate", int4, "--bits", 6, *small, "--weights", "int4", "-o", again)
    assert done.returncode == 3
    assert "quantised already" in done.stderr
    assert not again.exists()
    for path in sorted(out.rglob("*")):
        path.unlink()
    out.rmdir()


def test_a_recipe_may_store_weights_and_the_option_has_the_last_word(warm, tinystories, tmp_path):
    words = ("calibrate", tinystories, "--bits", 17, "--context", 512, "--tokens", 512, "--recipe", "weights-only")
    accepted(warm(*words, "-o", tmp_path / "A"))
    manifest = json.loads((tmp_path / "A/kvcli.json").read_text())
    assert (manifest["stages"][0]["settings"]["kind"], manifest["stages"][0]["settings"]["method"]) == (
        "int4", "precalibrated",
    )  # fmt: skip
    assert {x[which]["bits"] for x in manifest["plan"]["layers"] for which in "kv"} == {16}
    accepted(warm(*words, "--weight-method", "rtn", "--weight-symmetric", "-o", tmp_path / "B"))
    manifest = json.loads((tmp_path / "B/kvcli.json").read_text())
    assert manifest["stages"][0]["settings"]["method"] == "rtn"
    assert json.loads((tmp_path / "B/quantize_config.json").read_text())["sym"] is True
    accepted(warm(*words, "--weights", "none", "-o", tmp_path / "C"))
    assert not (tmp_path / "C/quantize_config.json").exists()


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("[int4]", "its section 'weights' is no mapping"),
        ("{kind: int5}", "kind 'int5' is not one of int3, int4"),
        ("{method: best}", "method 'best' is not one of rtn"),
        ("{symmetric: 1}", "symmetric 1 is not one of True, False"),
        ("{bits: 4}", "weights has no 'bits'"),
        ("{kind: [int4]}", "is not one of"),
    ],
)
def test_a_recipe_that_stores_nonsense_is_refused(warm, tinystories, tmp_path, section, said):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"search: fast\nweights: {section}\n")
    refused(warm("calibrate", tinystories, "--bits", 4, "--recipe", recipe, "-o", tmp_path / "A"), 3, said)


def test_how_weights_are_stored_is_of_no_use_without_saying_in_what(warm, tinystories, tmp_path):
    words = ("calibrate", tinystories, "--bits", 4, "-o", tmp_path / "A")
    refused(warm(*words, "--weight-method", "rtn"), 2, "give --weights too")
    refused(warm(*words, "--weights", "none", "--weight-symmetric"), 2, "give --weights too")


def test_weights_with_ray_are_refused_before_anything_is_loaded(tinystories, warm, out):
    done = warm("calibrate", tinystories, "--bits", 5, "--weights", "int4", "--ray", "auto", "-o", out)
    assert done.returncode == 2
    assert "--weights alone" in done.stderr


@pytest.mark.slow
def test_autogptq_reads_the_same_weights(int4):
    python = os.environ.get(AUTOGPTQ)
    if not python:
        pytest.skip(f"needs {AUTOGPTQ}, the Python of an environment with AutoGPTQ: see docs/weights.md")
    script = ROOT / "benchmarks/autogptq_reader.py"
    done = subprocess.run([sys.executable, script, int4, "--python", python], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["largest_weight_difference"] == 0
    assert found["largest_logit_difference"] < 1e-3 * found["largest_logit"]
