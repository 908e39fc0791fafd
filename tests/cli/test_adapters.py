"""``kvcli calibrate --adapters`` as its user meets it, and an artifact whose predictors were tampered with."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from cli_checks import accepted, refused, rewritten

WEIGHT = "layer.1.v.predictor.weight"


@pytest.fixture(scope="module")
def predicting(warm, tinystories, small, tmp_path_factory):
    """An artifact that stores residuals."""
    out = tmp_path_factory.mktemp("adapters") / "A"
    accepted(warm("calibrate", tinystories, "--bits", 4, *small, "--adapters", "always", "--json", "-o", out))
    return out


def edited(artifact, folder, change):
    """Copy an artifact and change its kv.safetensors."""
    copied = Path(shutil.copytree(artifact, folder / "A"))
    tensors = load_file(copied / "kv.safetensors")
    change(tensors)
    save_file(tensors, copied / "kv.safetensors", metadata={"format": "pt"})
    size = (copied / "kv.safetensors").stat().st_size
    return rewritten(copied, lambda manifest: manifest["files"]["kv.safetensors"].update(size=size))


def test_it_goes_through_every_command(predicting, warm, text, tmp_path):
    shown = json.loads(accepted(warm("inspect", predicting, "--json")))
    assert shown["model_bytes"] > 2 * 64 * 64  # predictors in float16
    report = json.loads((predicting / "report.json").read_text())["adapters"]
    assert report["kl"]["always"] < report["kl"]["none"]
    assert set(report["left"]) == {"0.v", "1.k", "1.v"}
    found = json.loads(accepted(warm("eval", predicting, *text, "--json")))
    assert found["effective_bits_with_model"] > found["effective_bits"]
    assert accepted(warm("generate", predicting, "Once", "--max-tokens", 4))
    told = [
        accepted(warm("generate", predicting, "Once", "--max-tokens", 8, "--backend", x)) for x in ("cpu", "reference")
    ]
    assert told[0] == told[1]
    timed = json.loads(accepted(warm("bench", "decode", predicting, "--depth", 64, "--tokens", 4, "--json")))
    assert timed["backend"] == "cpu"
    refused(warm("bench", "attention", predicting, "--depth", 64), 3, "kvcli bench decode times them")
    out = tmp_path / "solved"
    solved = json.loads(accepted(warm("solve", predicting, "--bits", 5, "-o", out, "--json")))
    assert solved["model_bytes"] == shown["model_bytes"]
    before, after = (load_file(x / "kv.safetensors") for x in (predicting, out))
    assert before.keys() == after.keys()
    assert not before[WEIGHT].equal(after[WEIGHT])  # refitted, for other bits
    accepted(warm("eval", out, *text, "--json"))


def test_absorbing_predicts_values_alone(warm, tinystories, small, tmp_path):
    out = tmp_path / "A"
    accepted(warm("calibrate", tinystories, "--bits", 4, *small, "--adapters", "absorbed", "--json", "-o", out))
    layers = json.loads((out / "kvcli.json").read_text())["plan"]["layers"]
    assert [x["predictor"]["k"] for x in layers] == [None, None]
    assert [x["predictor"]["v"]["inputs"] for x in layers] == [["0.k"], ["1.k"]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.pop(WEIGHT), f"lacks {WEIGHT}"),
        (lambda x: x.update({WEIGHT: x[WEIGHT][:, 1:].contiguous()}), f"{WEIGHT} is F16"),
        (lambda x: x.update({WEIGHT: x[WEIGHT].float()}), f"{WEIGHT} is F32"),
        (lambda x: x[WEIGHT].fill_(float("nan")), f"{WEIGHT} holds a value that is not finite"),
    ],
)
def test_a_damaged_predictor_is_refused_by_name(predicting, warm, text, tmp_path, change, said):
    damaged = edited(predicting, tmp_path, change)
    refused(warm("eval", damaged, *text, "--no-verify"), 3, said)
    refused(warm("eval", damaged, *text), 3, "kv.safetensors")


def test_a_plan_that_reads_what_comes_later_is_refused(predicting, warm, tmp_path):
    copied = Path(shutil.copytree(predicting, tmp_path / "A"))
    rewritten(copied, lambda x: x["plan"]["layers"][0]["predictor"]["v"].update(inputs=["1.k"]))
    refused(warm("inspect", copied), 3, "0.v cannot be predicted from 1.k")


def test_solve_needs_the_moments(predicting, warm, tmp_path):
    copied = Path(shutil.copytree(predicting, tmp_path / "A"))
    (copied / "calibration/moments.safetensors").unlink()
    rewritten(copied, lambda x: x["files"].pop("calibration/moments.safetensors"))
    refused(warm("solve", copied, "--bits", 5, "-o", tmp_path / "B"), 3, "moments.safetensors is missing")


def test_a_recipe_may_predict_and_the_option_has_the_last_word(warm, tinystories, small, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("search: fast\nadapters: {mode: always, depth: 1, bits: 8, reason: for a test}\n")
    words = ("calibrate", tinystories, "--bits", 4, *small, "--recipe", recipe, "--json")
    accepted(warm(*words, "-o", tmp_path / "A"))
    layers = json.loads((tmp_path / "A/kvcli.json").read_text())["plan"]["layers"]
    assert layers[1]["predictor"]["k"] == {"inputs": ["0.k", "0.v"], "bits": 8, "rank": None}
    accepted(warm(*words, "--adapters", "none", "-o", tmp_path / "B"))
    reports = [json.loads((tmp_path / x / "report.json").read_text()) for x in ("A", "B")]
    assert reports[0]["mode"] == {"adapters": "always", "reason": "for a test"}
    assert reports[1]["mode"] == {"adapters": "none", "reason": "asked for by --adapters"}
    assert "adapters" not in reports[1]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("[always]", "its section 'adapters' is no mapping"),
        ("{mode: sometimes}", "mode 'sometimes' is not one of"),
        ("{mode: always, depth: 0}", "depth must be a whole number"),
        ("{mode: always, both: 1}", "both must be true or false"),
        ("{mode: always, bits: 5}", "bits 5 is not one of"),
        ("{mode: always, reason: 3}", "reason is no text"),
        ("{mode: always, layers: 3}", "adapters has no 'layers'"),
    ],
)
def test_a_recipe_that_predicts_nonsense_is_refused(warm, tinystories, small, tmp_path, section, said):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"search: fast\nadapters: {section}\n")
    refused(warm("calibrate", tinystories, "--bits", 4, *small, "--recipe", recipe, "-o", tmp_path / "A"), 3, said)
