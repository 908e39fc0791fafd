"""The benchmark scripts: their parts that need no GPU, and whole runs with toy settings."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcli.evaluation import decode_speed, speed

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The benchmarks, importable as they are when one of them is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("gpu", "gpu_checks", "peers"):
        sys.modules.pop(name, None)


def script(name: str, *words: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, str(BENCHMARKS / name), *map(str, words)]
    return subprocess.run(run, capture_output=True, text=True, timeout=timeout, check=False)


def test_a_part_of_the_budget_ends_in_time_and_leaves_its_rest_to_the_next(scripts):
    import gpu

    now = 0.0
    budget = gpu.Budget(100, clock=lambda: now)
    assert sum(gpu.SHARES.values()) == pytest.approx(1)
    assert all(map(budget.allows, gpu.SHARES))
    now = 21.0
    assert [budget.allows(x) for x in gpu.SHARES] == [False, True, True]
    now = 101.0
    assert not any(map(budget.allows, gpu.SHARES))


def test_layers_outgrow_the_cache_if_memory_allows(scripts):
    import gpu

    assert gpu.layers_for(10, 50, free=1e6) == 20
    assert gpu.layers_for(1000, 50, free=1e6) == 1
    assert gpu.layers_for(10, 50, free=35) == 3
    assert gpu.layers_for(10, 50, free=9) == 0


@pytest.mark.parametrize("head_dim", [64, 128])
def test_checks_cover_the_formats(scripts, head_dim):
    import gpu_checks

    plans = gpu_checks.plans(head_dim).values()
    formats = [f for x in plans for f in (x.layers[0].k, x.layers[0].v)]
    assert {x.bits for x in formats} == {2, 3, 4, 8, 16}
    assert {x.axis for x in formats} == {"token", "channel"}
    assert {x.symmetric for x in formats} == {True, False}
    layers = [x.layers[0] for x in plans]
    assert {x.rope for x in layers} == {"before", "after"}
    assert {x.kind for x in layers} == {"full", "sliding"}
    assert any(x.center for x in layers)
    assert any(x.transform == "hadamard" for x in layers)


def test_checks_pass_on_the_cpu_library(scripts, native):
    import gpu_checks

    for name, plan in gpu_checks.plans(64).items():
        found = gpu_checks.check(native, torch.device("cpu"), plan, (1, 15, 70), torch.float32)
        assert found["passed"], (name, found)


def test_a_check_that_gives_nan_fails(scripts, native, monkeypatch):
    import gpu_checks

    monkeypatch.setattr(gpu_checks, "attend", lambda layer, row, q, *rest: q * float("nan"))
    plan = gpu_checks.plans(64)["16 bits"]
    assert not gpu_checks.check(native, torch.device("cpu"), plan, (3,), torch.float32)["passed"]


@pytest.mark.slow
def test_the_gpu_script_checks_itself_on_a_cpu(native, tmp_path):
    done = script("gpu.py", "--device", "cpu", "--tiny", "--out", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert (found["failed"], found["skipped"]) == ([], [])
    assert all(x["passed"] for x in found["checks"])
    assert len(found["attention"]["cases"]) == 4
    assert [x["batch"] for x in found["decode"]] == [1, 2]
    assert "16-bit cache" in found["decode"][0]["ratios"]["kvcli 4 bits"]


def test_the_gpu_script_writes_down_what_failed_and_goes_on(scripts, tmp_path):
    import gpu

    result: dict[str, Any] = {"failed": [], "skipped": []}
    run = gpu.Run(torch.device("cpu"), None, gpu.TINY, gpu.Budget(10), tmp_path / "new" / "gpu.json", result)
    with run.guarded("this"):
        raise RuntimeError("no luck")
    run.save()
    assert json.loads(run.out.read_text())["failed"] == [{"what": "this", "error": "RuntimeError: no luck"}]


@pytest.mark.slow
def test_the_attention_script_writes_ratios_to_every_peer(tmp_path):
    out = tmp_path / "results" / "attention.json"
    done = script(
        "attention.py", "--backend", "reference", "--depths", 64, "--shapes", "SmolLM2-135M", "--bits", "16,2",
        "--rounds", 1, "--megabytes", 0.1, "--threads", 1, "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["machine"]["threads"] == 1
    (case,) = found["cases"]
    assert (case["depth"], case["num_heads"], case["num_kv_heads"], case["head_dim"]) == (64, 9, 3, 64)
    assert case["ratios"].keys() == {"kvcli 16 bits", "kvcli 2 bits", "kvcli 3 bits, as calibrated"}
    assert len(case["ratios"]["kvcli 2 bits"]) == 3
    assert all(x["per_layer_s"] > 0 for x in case["results"])


@pytest.mark.slow
def test_the_adapters_script_holds_the_three_against_each_other(tinystories, native, tmp_path):
    out = tmp_path / "adapter_speed.json"
    done = script(
        "adapter_speed.py", "--model", tinystories, "--depths", "80", "--tokens", 2, "--rounds", 1, "--out", out
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["results"]["80"]
    assert found.keys() == {"none", "absorbed", "always"}
    assert found["none"]["speed_of_none"] == 1
    assert len({x["cache_bytes"] for x in found.values()}) == 1  # predictors change no bit of the cache
    assert found["always"]["buffer_bytes"] > found["none"]["buffer_bytes"]


@pytest.mark.slow
def test_the_capacity_script_resumes_what_it_put_aside(tinystories, native, tmp_path):
    out, artifact = tmp_path / "capacity.json", tmp_path / "A"
    recipe = tmp_path / "small.yaml"
    fmt = "[{bits: [2, 4, 8], group: 16, scale_dtype: e5m3}]"
    recipe.write_text(f"search: {{k: {fmt}, v: {fmt}, residual_windows: [16]}}")
    words = ("calibrate", tinystories, "--bits", 5, "--context", 512, "--tokens", 1024, "--recipe", recipe)
    made = subprocess.run(
        [sys.executable, "-m", "kvcli", *map(str, words), "--adapters", "capacity", "-o", str(artifact)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    done = script(
        "capacity.py", "--artifact", artifact, "--lengths", "100,9999", "--tokens", 20, "--limit", 1, "--rounds", 1,
        "--threads", 1, "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["results"]
    assert [x["tokens"] for x in found] == [100, 492]  # cut to what the model takes
    for x in found:
        assert 0 < x["kl"]["mean"] < 0.5
        assert x["bytes"]["idle"] < x["bytes"]["running"] < x["bytes"]["16 bits"]
        assert x["ratios"].keys() == {"prefill / promote", "running / idle bytes", "16 bits / idle bytes"}


def test_llama_cpp_is_absent_where_there_is_no_gguf(scripts, tinystories):
    import peers

    if peers.find_spec("llama_cpp") is None:
        pytest.skip("needs llama-cpp-python")
    found, absent = peers.llama_cpp_decoders(tinystories, depth=8, capacity=16, threads=1)
    assert found == []
    assert "not a GGUF file" in absent["llama.cpp"]


def test_quantised_caches_of_transformers_take_part_or_are_named(scripts, loaded):
    import peers

    found, absent = peers.transformers_decoders([loaded], 8)
    assert found[0].name == "transformers float32 sdpa"
    assert len(found) - 1 + len(absent) == 2


@pytest.mark.slow
def test_llama_cpp_decodes_with_every_cache(scripts, smollm2):
    pytest.importorskip("llama_cpp")
    import peers

    found, absent = peers.llama_cpp_decoders(smollm2, depth=24, capacity=26, threads=1)
    assert (len(found), absent) == (3, {})
    ids = torch.arange(100, 126)
    seconds = speed.race([decode_speed.contestant(x, ids, 24) for x in found], rounds=1)
    assert all(len(x["decode"]) == len(x["prefill"]) == 1 for x in seconds.values())
    assert found[0].bytes_read > found[1].bytes_read > found[2].bytes_read > 90e6
    for x in found:
        x.close()
