"""``kvcli calibrate --adapters capacity`` and what the commands make of the second plan."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from cli_checks import accepted, refused, rewritten

WEIGHT = "capacity.layer.1.v.predictor.weight"


@pytest.fixture(scope="module")
def idle(warm, tinystories, small, tmp_path_factory):
    """An artifact with a plan for idle sequences."""
    out = tmp_path_factory.mktemp("capacity") / "A"
    words = ("--adapters", "capacity", "--capacity-bits", 3.75, "--json")
    shown = json.loads(accepted(warm("calibrate", tinystories, "--bits", 5, *small, *words, "-o", out)))
    assert shown["capacity"]["effective_bits"] <= 3.75 < shown["effective_bits"] <= 5
    return out


def test_the_plan_itself_is_that_of_none(idle, warm, tinystories, small, text, tmp_path):
    out = tmp_path / "N"
    accepted(warm("calibrate", tinystories, "--bits", 5, *small, "--tokens", 1024, "--json", "-o", out))
    plain, found = (json.loads((x / "kvcli.json").read_text()) for x in (out, idle))
    assert found["plan"] == plain["plan"]
    layers = found["capacity"]["layers"]
    assert layers[1]["predictor"]["k"]["inputs"] == ["0.k", "0.v"]
    assert all(found["capacity"][x] == found["plan"][x] for x in ("block_size", "sink_tokens", "residual_window"))
    names = load_file(idle / "kv.safetensors").keys()
    assert {x for x in names if not x.startswith("capacity.")} == load_file(out / "kv.safetensors").keys()
    told = [accepted(warm("generate", x, "Once", "--max-tokens", 8)) for x in (out, idle)]
    assert told[0] == told[1]
    report = json.loads((idle / "report.json").read_text())["adapters"]
    assert report["settings"]["mode"] == "capacity"
    assert set(report["kl"]) == {"none", "capacity"}
    accepted(warm("eval", idle, *text, "--json"))


def test_inspect_shows_both(idle, warm):
    shown = json.loads(accepted(warm("inspect", idle, "--json")))
    second = shown["capacity"]
    assert second["model_bytes"] > shown["model_bytes"]
    assert second["effective_bits_with_model"] > second["effective_bits"]
    assert second["bytes_at"]["1024"] < shown["bytes_at"]["1024"]
    said = accepted(warm("inspect", idle))
    assert f"idle sequences {second['effective_bits']:.3f} effective bits at 512 tokens" in said
    assert "capacity" not in json.loads(accepted(warm("inspect", idle, "--context", 64, "--json")))["capacity"]


def test_solve_keeps_it_or_finds_one_that_fits(idle, warm, tmp_path):
    before, a = json.loads((idle / "kvcli.json").read_text()), load_file(idle / "kv.safetensors")
    windows = set()
    for bits in (5.5, 4.5):
        out = tmp_path / str(bits)
        shown = json.loads(accepted(warm("solve", idle, "--bits", bits, "-o", out, "--json")))
        after, b = json.loads((out / "kvcli.json").read_text()), load_file(out / "kv.safetensors")
        assert a.keys() == b.keys()
        assert after["plan"] != before["plan"]
        window = after["plan"]["residual_window"]
        windows.add(window)
        assert after["capacity"]["residual_window"] == window
        assert shown["capacity"]["effective_bits"] <= 3.75
        if window == before["plan"]["residual_window"]:
            assert after["capacity"] == before["capacity"]
            assert all(a[x].equal(b[x]) for x in a)
        else:
            assert not b[WEIGHT].equal(a[WEIGHT])  # refitted, for other bits
    assert windows == {0, 16}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.pop(WEIGHT), f"lacks {WEIGHT}"),
        (lambda x: x.update({WEIGHT: x[WEIGHT][:, 1:].contiguous()}), f"{WEIGHT} is F16"),
        (lambda x: x[WEIGHT].fill_(float("nan")), f"{WEIGHT} holds a value that is not finite"),
    ],
)
def test_a_damaged_predictor_is_refused_by_name(idle, warm, text, tmp_path, change, said):
    copied = Path(shutil.copytree(idle, tmp_path / "A"))
    tensors = load_file(copied / "kv.safetensors")
    change(tensors)
    save_file(tensors, copied / "kv.safetensors", metadata={"format": "pt"})
    size = (copied / "kv.safetensors").stat().st_size
    rewritten(copied, lambda manifest: manifest["files"]["kv.safetensors"].update(size=size))
    refused(warm("eval", copied, *text, "--no-verify"), 3, said)
    refused(warm("eval", copied, *text), 3, "kv.safetensors")


def test_a_second_plan_of_other_pages_is_refused(idle, warm, tmp_path):
    copied = Path(shutil.copytree(idle, tmp_path / "A"))
    rewritten(copied, lambda x: x["capacity"].update(residual_window=48))
    refused(warm("inspect", copied), 3, "the capacity plan is not for the plan's layers, pages, sinks and window")
    rewritten(copied, lambda x: x.pop("capacity"))
    refused(warm("inspect", copied, "--no-verify"), 3, "holds 'capacity.layer.")


def test_bits_are_a_ceiling_and_the_default_is_what_can_be_reached(warm, tinystories, small, tmp_path):
    words, out = ("calibrate", tinystories, "--bits", 5, *small), ("-o", tmp_path / "A")
    refused(warm(*words, *out, "--adapters", "capacity", "--capacity-bits", 1), 4, "--capacity-bits: 1 effective bits")
    refused(warm(*words, *out, "--capacity-bits", 3), 2, "give --adapters capacity too")
    preset = tmp_path / "preset.yaml"
    preset.write_text("0: {nbits_key: 8, nbits_value: 4}\n1: {nbits_key: 8, nbits_value: 4}\n")
    said = "of a preset no layer is measured"
    refused(warm(*words, *out, "--recipe", f"kvtuner:{preset}", "--adapters", "capacity"), 2, said)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("search: fast\nadapters: {mode: capacity, depth: 1, bits: 8}\n")
    found = json.loads(accepted(warm(*words, "--recipe", recipe, "--json", "-o", tmp_path / "B")))
    assert 2.5 < found["capacity"]["effective_bits"] < found["effective_bits"]
    assert found["capacity"]["layers"][1]["predictor"]["v"]["bits"] == 8
    recipe.write_text("search: fast\nadapters: {mode: capacity, capacity_bits: true}\n")
    refused(warm(*words, *out, "--recipe", recipe), 3, "capacity_bits is not between")


def test_serve_says_why_it_does_not(idle, pristine, warm):
    refused(warm("serve", pristine, "--port", 0, "--idle-seconds", 1), 3, "calibrate it with --adapters capacity")
    refused(warm("serve", idle, "--port", 0, "--idle-seconds", 1, "--deterministic"), 2, "cannot be --deterministic")
    refused(warm("serve", idle, "--port", 0, "--idle-seconds", 1, "--no-prefix-caching"), 2, "--no-prefix-caching")
    refused(warm("serve", idle, "--port", 0, "--capacity-memory", "much"), 2, "'much' is no size")
