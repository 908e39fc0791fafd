"""What cannot be used is answered in one sentence, with an exit code that says what kind of thing it is."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from cli_checks import accepted, flip, names, refused, rewritten


def test_a_missing_model(warm, out):
    missing = out.parent / "none"
    assert refused(warm("calibrate", missing, "--bits", 4, "-o", out), 3) == f"kvcli: {missing} does not exist.\n"


def test_a_hub_out_of_reach(warm, out):
    refused(warm("calibrate", "nobody/nothing", "--bits", 4, "-o", out), 3, "nobody/nothing", "neither a local path")


def test_a_folder_without_weights(warm, model, out):
    (model / "model.safetensors").unlink()
    refused(warm("calibrate", model, "--bits", 4, "-o", out), 3, str(model), "holds no weights")


def test_an_unsupported_architecture(warm, model, out):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    refused(warm("calibrate", model, "--bits", 4, "-o", out), 3, "Mamba", "not supported")


@pytest.mark.parametrize("keep", [0, 7, 1000, -1])
def test_truncated_weights_of_a_model(warm, model, out, keep):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(warm("calibrate", model, "--bits", 4, "-o", out), 3, str(file), "damaged or truncated")


@pytest.mark.parametrize("at", [1, 8, 40])
def test_a_bit_flipped_in_the_header_of_a_models_weights(warm, model, out, at):
    flip(model / "model.safetensors", at)
    refused(warm("calibrate", model, "--bits", 4, "-o", out), 3, "model")


def test_bits_flipped_in_a_models_weights_until_they_are_no_numbers(warm, model, out):
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2:] = b"\xff\x7f"
    file.write_bytes(data)
    refused(warm("calibrate", model, "--bits", 4, "-o", out), 3, "NaN")


@pytest.mark.parametrize(
    ("data", "said"),
    [("empty.txt", "holds no text"), ("-", "Standard input holds no text"), ("none.txt", "not a file")],
)
def test_an_empty_corpus(warm, tinystories, out, data, said):
    (out.parent.parent / "empty.txt").write_text(" \n")
    refused(warm("calibrate", tinystories, "--bits", 4, "--data", data, "-o", out, cwd=out.parent.parent), 3, said)


def test_a_corpus_that_is_too_short(warm, tinystories, out):
    done = warm("calibrate", tinystories, "--bits", 4, "--data", "-", "-o", out, input="The dog.")
    refused(done, 3, "one window needs")


@pytest.mark.parametrize("bits", [1, 2.5])
def test_a_budget_below_the_least(warm, tinystories, out, bits, small):
    said = refused(warm("calibrate", tinystories, "--bits", bits, *small, "-o", out), 4, "cannot be met", "512 tokens")
    least = re.search(r"the least reachable is ([\d.]+)\.", said)[1]
    accepted(warm("calibrate", tinystories, "--bits", least, *small, "-o", out, "--dry-run"))
    below = float(least) - 0.002
    refused(warm("calibrate", tinystories, "--bits", below, *small, "-o", out, "--dry-run"), 4)


def test_a_budget_that_solve_cannot_meet(warm, pristine, out):
    refused(warm("solve", pristine, "--bits", 1, "-o", out), 4, "the least reachable is")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--bits", 0), "bits"),
        (("--bits", "nan"), "bits"),
        (("--bits", 100), "bits"),
        (("--bits", 4, "--context", 2 * 10**9), "context"),
        (("--bits", 4, "--seed", 10**24), "seed"),
        (("--bits", 4, "--dtype", "int8"), "float16"),
        (("--bits", "many"), "bits"),
        ((), "--bits"),
    ],
)
def test_options_out_of_range(warm, tinystories, out, words, said):
    refused(warm("calibrate", tinystories, *words, "-o", out), 2, said)


def test_a_recipe_that_is_none(warm, tinystories, out):
    refused(warm("calibrate", tinystories, "--bits", 4, "--recipe", "nonsense", "-o", out), 3, "balanced", "kivi")


# --- damaged artifacts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(schema_version=99), "newer kvcli"),
        (lambda m: m.update(schema_version="1"), "schema_version"),
        (lambda m: m["plan"].update(block_size=48), "block_size"),
        (lambda m: m["plan"]["layers"].pop(), "layer.1.k.mean"),
        (lambda m: m["plan"]["layers"][0].update(head_dim=32), "layer.0.k.mean is F32 [4, 16]"),
        (lambda m: m["plan"]["layers"][0].update(num_kv_heads=10**9), "num_kv_heads"),
        (lambda m: m["plan"].update(residual_window=10**12), "residual_window"),
        (lambda m: m["plan"].update(layers=m["plan"]["layers"] * 2100), "layers"),
        (lambda m: m["plan"]["layers"][0]["k"].update(bits=5), "bits"),
        (lambda m: m["plan"].update(nonsense=1), "nonsense"),
        (lambda m: m["files"]["model.safetensors"].update(size=10**15), "model.safetensors"),
        (lambda m: m["files"].update({"../outside": {"sha256": "0" * 64, "size": 1}}), "outside"),
        (lambda m: m.clear(), "kvcli.json"),
    ],
)
def test_a_manifest_that_is_wrong(warm, artifact, change, said):
    rewritten(artifact, change)
    for command in ("inspect", "generate"):
        refused(warm(command, artifact, input="The dog\n"), 3, said)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\ufeff{}", '{"schema_version": NaN}'])
def test_a_manifest_that_is_no_json_object(warm, artifact, text):
    (artifact / "kvcli.json").write_text(text)
    refused(warm("inspect", artifact), 3, "kvcli.json")


@pytest.mark.parametrize("name", ["model.safetensors", "kv.safetensors"])
@pytest.mark.parametrize("no_verify", [False, True])
def test_truncated_tensors_of_an_artifact(warm, artifact, name, no_verify):
    file = artifact / name
    file.write_bytes(file.read_bytes()[:-1])
    for command in ("inspect", "generate"):
        refused(warm(command, artifact, *(["--no-verify"] * no_verify), input="The dog\n"), 3, name)


@pytest.mark.parametrize("name", ["model.safetensors", "kv.safetensors", "tokenizer.json", "report.json"])
def test_a_flipped_bit_in_an_artifact(warm, artifact, name):
    flip(artifact / name, -10, bit=0)
    for command in (("inspect",), ("solve", "--bits", "4", "-o", str(artifact.parent / "new")), ("eval",)):
        refused(warm(command[0], artifact, *command[1:]), 3, name, "damaged")
    assert names(artifact.parent) == ["artifact"]


def test_no_verify_is_what_it_says(warm, artifact):
    flip(artifact / "model.safetensors", -10, bit=0)  # the least of a mantissa's bits: nothing else can tell
    accepted(warm("inspect", artifact, "--no-verify"))
    accepted(warm("generate", artifact, "The dog", "--max-tokens", 2, "--no-verify"))


def test_an_artifact_that_is_none(warm, tinystories, tmp_path):
    refused(warm("inspect", tinystories), 3, "not a kvcli artifact")
    refused(warm("eval", tmp_path / "none"), 3, "does not exist")


def test_a_report_that_holds_no_measurements(warm, artifact, out):
    (artifact / "report.json").write_text("{}")
    rewritten(artifact, lambda m: m["files"].pop("report.json"))
    refused(warm("solve", artifact, "--bits", 4, "-o", out), 3, "report.json")
