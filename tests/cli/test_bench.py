"""``kvcli bench`` as its user meets it, and the script that puts peers beside it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcli.runtime import kvrt

Done = subprocess.CompletedProcess
Run = Callable[..., Done]

DECODE = Path(__file__).parents[2] / "benchmarks" / "decode.py"
QUICK = ("--threads", 1, "--rounds", 1)
RESULT = {"name", "median_s", "tokens_per_s", "bytes_read", "threads"}


def has_native() -> bool:
    try:
        kvrt.library("cpu")
    except kvrt.NativeError:
        return False
    return True


NATIVE = pytest.param("cpu", marks=pytest.mark.skipif(not has_native(), reason="needs the CPU kernels"))


def refused(done: Done, code: int, *words: str) -> None:
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.startswith("kvcli: ")
    assert done.stderr.count("\n") == 1
    assert "internal error" not in done.stderr
    for word in words:
        assert word in done.stderr


def measured(done: Done) -> dict[str, Any]:
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(done.stdout)
    for row in found["results"]:
        assert row.keys() >= RESULT
        assert row["median_s"] > 0
        assert row["tokens_per_s"] > 0
        assert row["threads"] == 1
    first, *others = found["results"]
    assert list(found["ratios"]) == [x["name"] for x in others]
    assert found["ratios"][others[0]["name"]] == pytest.approx(first["tokens_per_s"] / others[0]["tokens_per_s"])
    assert found["machine"]["threads"] == 1
    assert found["bandwidth"]["read"] > 0
    return found


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_attention_beside_uniform_plans_and_sdpa(warm, pristine, backend):
    done = warm("bench", "attention", pristine, "--backend", backend, "--depth", 200, "--batch", 2, "--json", *QUICK)
    found = measured(done)
    names = [x["name"] for x in found["results"]]
    assert names[0] == f"kvcli {backend}"
    assert [x.rpartition(", ")[2] for x in names[1:6]] == [f"uniform {b} bits" for b in (16, 8, 4, 3, 2)]
    assert names[6:] == ["torch sdpa float32", "torch sdpa bfloat16"]
    read = [x["bytes_read"] for x in found["results"]]
    assert read[1:6] == sorted(read[1:6], reverse=True)
    assert read[6] == 2 * read[7] == 2 * read[1]
    assert (found["backend"], found["depth"], found["batch"]) == (backend, 200, 2)
    assert found["shapes"] == [{"num_heads": 8, "num_kv_heads": 4, "head_dim": 16}]
    assert (found["variant"] is None) == (backend == "reference")
    for row in found["results"]:
        assert row["fraction_of_read_bandwidth"] > 0


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_decoding_beside_the_exact_cache_and_transformers(warm, pristine, backend):
    done = warm("bench", "decode", pristine, "--backend", backend, "--depth", 70, "--tokens", 3, "--json", *QUICK)
    found = measured(done)
    names = [f"kvcli {backend}", f"kvcli {backend}, 16-bit cache", "transformers bfloat16 sdpa"]
    assert [x["name"] for x in found["results"]] == names
    assert [x["name"] for x in found["prefill"]["results"]] == names
    assert list(found["prefill"]["ratios"]) == names[1:]
    assert (found["depth"], found["tokens"], found["fill"], found["weights"]) == (70, 3, "text", "none")
    read = [x["bytes_read"] for x in found["results"]]
    assert read[0] < read[1] == read[2]


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_a_cache_filled_at_random_times_decoding_only(warm, pristine, backend):
    done = warm(
        "bench", "decode", pristine, "--backend", backend, "--depth", 300, "--tokens", 2, "--fill", "random", "--json",
        *QUICK,
    )  # fmt: skip
    assert "prefill" not in measured(done)


@pytest.mark.parametrize("backend", [NATIVE])
def test_int4_weights_are_read_in_fewer_bytes(warm, pristine, backend):
    options = ("--backend", backend, "--depth", 20, "--tokens", 2, "--json", *QUICK)
    plain, packed = (
        measured(warm("bench", "decode", pristine, "--weights", w, *options))["results"] for w in ("none", "int4")
    )
    assert packed[0]["bytes_read"] < plain[0]["bytes_read"] / 2
    assert packed[2]["bytes_read"] == plain[2]["bytes_read"]


def test_a_person_gets_a_table(warm, pristine, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("One day a bird sang in the old tree near the house, and all the children came to listen. " * 2)
    words = ("bench", "decode", pristine, "--backend", "reference", "--depth", 40, "--tokens", 1)
    done = warm(*words, "--prompt-file", text, *QUICK)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("40 tokens, ")
    assert [x.split()[0] for x in lines if x.startswith(("decode", "prefill"))] == ["decode", "prefill"]
    assert sum("kvcli reference, 16-bit cache" in x for x in lines) == 2
    assert lines[-1].startswith("memory: reads ")


def test_the_depth_is_by_default_what_the_model_takes(warm, pristine):
    done = warm("bench", "attention", pristine, "--backend", "reference", "--json", *QUICK)
    longest = json.loads((pristine / "config.json").read_text())["max_position_embeddings"]
    assert measured(done)["depth"] == min(4096, longest)


@pytest.mark.parametrize("what", ["attention", "decode"])
def test_too_deep_for_the_model(warm, pristine, what):
    done = warm("bench", what, pristine, "--backend", "reference", "--depth", 10**6)
    refused(done, 2, "1000000 tokens", "context")


@pytest.mark.parametrize("what", ["attention", "decode"])
def test_unknown_backends_are_refused(warm, pristine, what):
    refused(warm("bench", what, pristine, "--backend", "tpu"), 2, "'tpu'", "--backend", f"kvcli bench {what} --help")


@pytest.mark.parametrize("what", ["attention", "decode"])
def test_what_is_no_artifact_is_refused(warm, tinystories, what):
    refused(warm("bench", what, tinystories, "--backend", "reference"), 3, "not a kvcli artifact")


def test_a_backend_that_is_not_built_is_an_error(warm, pristine):
    try:
        kvrt.library("cuda")
    except kvrt.NativeError as error:
        refused(warm("bench", "attention", pristine, "--backend", "cuda"), 1, str(error))
    else:
        pytest.skip("this build has CUDA kernels")


def test_int4_weights_need_native_kernels(warm, pristine):
    refused(warm("bench", "decode", pristine, "--backend", "reference", "--weights", "int4"), 2, "--weights int4")


@pytest.mark.skipif(not has_native(), reason="needs the CPU kernels")
def test_what_native_kernels_do_not_compute_is_timed_on_the_reference(warm, pristine, tmp_path):
    other = shutil.copytree(pristine, tmp_path / "other")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"silu"', '"gelu"'))
    words = ("bench", "decode", other, "--no-verify", "--depth", 40, "--tokens", 2, *QUICK)
    done = warm(*words, "--json")
    assert done.returncode == 0, done.stderr
    assert "Not on cpu: the native runtime computes SiLU" in done.stderr
    assert json.loads(done.stdout)["backend"] == "reference"
    refused(warm(*words, "--backend", "cpu"), 3, "gelu")


def test_a_benchmark_has_a_name(warm):
    refused(warm("bench"), 2, "Missing command")
    refused(warm("bench", "luck"), 2, "luck")


def test_a_missing_prompt_file_is_named(warm, pristine):
    done = warm("bench", "decode", pristine, "--backend", "reference", "--prompt-file", "nowhere.txt")
    refused(done, 3, "nowhere.txt")


def test_errors_are_json_on_request(warm, pristine):
    done = warm("bench", "attention", pristine, "--backend", "reference", "--depth", 10**6, "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["code"] == 2


def test_help_tells_what_is_timed(warm):
    shown = warm("bench", "--help").stdout
    assert "attention" in shown
    assert "decode" in shown
    assert "Raises" not in warm("bench", "decode", "--help").stdout


@pytest.mark.slow
@pytest.mark.skipif(not has_native(), reason="needs the CPU kernels")
def test_the_decode_script_puts_peers_beside_us(pristine, tinystories, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Tim saw a red bird near the old tree and sang to it until the sun went down. " * 30)
    out = tmp_path / "decode.json"
    done = subprocess.run(
        [
            sys.executable, DECODE, "--model", tinystories, "--artifact", pristine, "--depth", "60", "--tokens", "2",
            "--rounds", "1", "--threads", "1", "--data", text, "--window", "64", "--limit", "1", "--out", out,
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    ours = [x["name"] for x in found["results"][:2]]
    assert [x["name"] for x in found["results"][2:]][:2] == ["transformers float32 sdpa", "transformers bfloat16 sdpa"]
    reason = "not a GGUF file" if importlib.util.find_spec("llama_cpp") else "not installed"
    assert reason in found["absent"]["llama.cpp"]
    assert found["quality"].keys() == {"reference", *ours}
    assert found["quality"][ours[0]]["kl"]["mean"] > 0
    parts = found["profile"][ours[0]]["parts_s"]
    assert parts.keys() == {"norms, RoPE, SiLU", "matmuls", "append", "attention", "rest"}
    assert all(x["limit_tokens_per_s"] > 0 for x in found["results"][:4])
