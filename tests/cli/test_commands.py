"""Every command as its user meets it: data on stdout, one sentence on stderr, an exit code, no half-written file."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
from safetensors.numpy import load_file, save_file

Done = subprocess.CompletedProcess
Run = Callable[..., Done]

KVCLI = f"{sys.executable} -m kvcli"
CORPUS = "\n".join(f"On day {i} Tim saw {i * i} red birds near the old tree and sang to them." for i in range(120))
RECIPE = """
search:
  center: true
  k: [{bits: [2, 4, 8], group: 16, scale_dtype: e5m3}]
  v: [{bits: [2, 4, 8], group: 16, scale_dtype: e5m3}]
  residual_windows: [0, 16]
"""


def refused(done: Done, code: int, *words: str, json_too: bool = False) -> str:
    """Check that a command said one sentence and nothing else, and return it."""
    assert done.returncode == code, done.stderr
    if not json_too:
        assert done.stdout == ""
    assert done.stderr.startswith("kvcli: ")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith(".\n")
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    for word in words:
        assert word in done.stderr
    return done.stderr


def accepted(done: Done) -> str:
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def names(folder: Path) -> list[str]:
    return sorted(x.name for x in folder.iterdir())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Options that calibrate in a second."""
    recipe = tmp_path_factory.mktemp("small") / "small.yaml"
    recipe.write_text(RECIPE)
    return ("--context", 512, "--tokens", 1024, "--recipe", recipe)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Options that evaluate on a text of our own, in a moment."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(CORPUS)
    return ("--data", file, "--window", 64, "--limit", 1)


def rewritten(artifact: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change an artifact's kvcli.json."""
    file = artifact / "kvcli.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    return artifact


# --- pipelines --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def piped(tinystories: Path, clean_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """``cat corpus.txt | kvcli calibrate M --bits 4 --data - -o A --json``, by a shell, in a folder of its own."""
    folder = tmp_path_factory.mktemp("piped")
    (folder / "corpus.txt").write_text(CORPUS)
    script = f"set -o pipefail; cat corpus.txt | {KVCLI} calibrate {tinystories} --bits 4 --context 512 "
    script += "--data - -o A --json"
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=clean_env, capture_output=True, text=True)
    return folder, done


def test_a_corpus_is_piped_in_and_bits_are_piped_out(piped):
    folder, done = piped
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    assert 3 < found["effective_bits"] <= 4
    assert found["context"] == 512
    assert found["data"] == "-"
    assert names(folder) == ["A", "corpus.txt"]


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
def test_jq_reads_the_bits(piped, clean_env):
    done = subprocess.run(["jq", ".effective_bits"], input=piped[1].stdout, capture_output=True, text=True)
    assert 3 < float(done.stdout) <= 4


def test_prompts_are_piped_in_and_answers_redirected_in_utf8_whatever_the_locale(piped, warm, clean_env):
    folder, _ = piped
    prompts = "Once upon a café\nThe dog\n"
    (folder / "prompts.txt").write_text(prompts, "utf-8")
    script = f"set -o pipefail; cat prompts.txt | {KVCLI} generate A - --max-tokens 12 > answers.txt"
    env = {**clean_env, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    answers = (folder / "answers.txt").read_text("utf-8")
    assert answers.count("\n") == 2
    assert all(len(x.split()) > 3 for x in answers.splitlines())
    assert answers == generated(warm, folder / "A", "-", "--max-tokens", 12, input=prompts)


# --- what scripts rely on ---------------------------------------------------------------------------------------------

SUMMARY = {"effective_bits", "nominal_bits", "context", "bytes_at", "model_bytes", "layers"}


def check_summary(found: dict[str, Any], bits: float, context: int) -> None:
    assert set(found) >= SUMMARY
    assert bits - 1 < found["effective_bits"] <= bits
    assert found["context"] == context
    assert found["effective_bits"] < found["effective_bits_with_model"]
    assert 2 <= found["nominal_bits"] < found["effective_bits"]
    at = {int(n): b for n, b in found["bytes_at"].items()}
    assert set(at) >= {context, 8192}
    assert sorted(at.values()) == [at[n] for n in sorted(at)]
    assert 8 * at[context] / (context * 256) <= found["effective_bits"]
    assert len(found["layers"]) == 2
    for layer in found["layers"]:
        assert all(layer[which]["bits"] in (2, 3, 4, 8, 16) for which in "kv")


def test_calibrate_prints_one_object(calibrated, pristine):
    assert calibrated.stdout.count("\n") == 1
    assert calibrated.stderr == ""
    found = json.loads(calibrated.stdout)
    check_summary(found, 5, 512)
    assert found["path"] == str(pristine)
    assert 0 < found["kl"] < 0.1
    assert names(pristine.parent) == [pristine.name]


def test_inspect_prints_what_calibrate_did_and_where_it_came_from(calibrated, pristine, warm):
    found, made = json.loads(accepted(warm("inspect", pristine, "--json"))), json.loads(calibrated.stdout)
    check_summary(found, 5, 512)
    for name in SUMMARY:
        assert found[name] == made[name]
    assert found["source"]["model"] == "TinyStories-656K"
    assert found["calibration"]["tokens"] == 2048
    assert found["budget"] == {"bits": 5, "nominal": False}
    other = json.loads(accepted(warm("inspect", pristine, "--context", 3000, "--json")))
    assert other["context"] == 3000
    assert other["bytes_at"]["3000"] > found["bytes_at"]["2048"]
    assert other["effective_bits"] < found["effective_bits"]  # the window weighs less


def test_inspect_shows_a_person_the_same(calibrated, pristine, run_kvcli):
    shown = accepted(run_kvcli("inspect", pristine))
    made = json.loads(calibrated.stdout)
    assert f"effective bits {made['effective_bits']:.3f} at 512 tokens" in shown
    assert "TinyStories-656K" in shown
    assert len(re.findall(r"^[01] +full ", shown, re.MULTILINE)) == 2


def test_solve_prints_the_summary_of_another_budget(pristine, warm, tmp_path):
    found = json.loads(accepted(warm("solve", pristine, "--bits", 3.5, "-o", tmp_path / "B", "--json")))
    check_summary(found, 3.5, 512)
    assert found["predicted_kl"] > 0
    assert (tmp_path / "B/model.safetensors").samefile(pristine / "model.safetensors")
    found = json.loads(accepted(warm("inspect", tmp_path / "B", "--json")))
    check_summary(found, 3.5, 512)
    assert found["budget"]["bits"] == 3.5
    shown = accepted(warm("solve", pristine, "--bits", 3.5, "-o", tmp_path / "C", "--context", 4096))
    assert "at 4096 tokens" in shown
    assert names(tmp_path) == ["B", "C"]


def test_solve_counts_nominal_bits_if_asked(pristine, warm, tmp_path):
    found = json.loads(accepted(warm("solve", pristine, "--bits", 3, "--nominal", "-o", tmp_path / "B", "--json")))
    assert 2.5 < found["nominal_bits"] <= 3 < found["effective_bits"]


def test_eval_prints_every_key_and_dumps_what_it_was_computed_from(pristine, warm, text, tmp_path):
    words = (*text, "--window", 256, "--limit", 2, "--dump", "dump.safetensors", "--json")
    found = json.loads(accepted(warm("eval", pristine, *words, cwd=tmp_path)))
    assert (found["context"], found["windows"], found["scored_tokens"]) == (256, 2, 256)
    assert set(found["ppl"]) == {"value", "reference", "delta_pct"}
    assert set(found["kl"]) == {"mean", "p99", "p999"}
    assert set(found["flips"]) == {"rate"}
    assert found["effective_bits"] < found["effective_bits_with_model"]
    inspected = json.loads(accepted(warm("inspect", pristine, "--context", 256, "--json")))
    assert found["effective_bits"] == inspected["effective_bits"]
    assert found["measured_bytes"] == inspected["bytes_at"]["256"]
    dump = load_file(tmp_path / "dump.safetensors")
    p, q = (dump[x].astype(float) for x in ("reference", "quantized"))
    kl = scipy.special.rel_entr(np.exp(p), np.exp(q)).sum(-1).ravel()
    assert found["kl"]["mean"] == pytest.approx(kl.mean(), rel=1e-4)
    assert found["kl"]["p99"] == pytest.approx(np.percentile(kl, 99), rel=1e-4)
    assert found["kl"]["p999"] == pytest.approx(np.percentile(kl, 99.9), rel=1e-4)
    nll = [-np.take_along_axis(x, dump["targets"][..., None], -1).mean() for x in (q, p)]
    assert found["ppl"]["value"] == pytest.approx(np.exp(nll[0]), rel=1e-6)
    assert found["ppl"]["delta_pct"] == pytest.approx(100 * np.expm1(nll[0] - nll[1]), rel=1e-4)
    assert found["flips"]["rate"] == (p.argmax(-1) != q.argmax(-1)).mean()


def test_eval_works_without_any_option(pristine, warm):
    # calibrate tells its user to run it
    done = warm("eval", pristine)
    shown = done.stdout
    assert done.returncode == 0
    assert "--data" in done.stderr  # the built-in text is no fair judge of what was calibrated on it
    for word in ("effective bits", "perplexity", "KL mean", "99.9th", "top-1 flips", "4 windows, 1024 tokens"):
        assert word in shown


def test_eval_reports_only_the_tasks_asked_for(pristine, warm, text):
    found = json.loads(accepted(warm("eval", pristine, "--tasks", "kl", *text, "--json")))
    assert "kl" in found
    assert not {"ppl", "flips"} & set(found)


def test_eval_measures_against_another_model(pristine, tinystories, warm, text):
    words = (*text, "--json")
    own = json.loads(accepted(warm("eval", pristine, *words)))
    same = json.loads(accepted(warm("eval", pristine, "--against", tinystories, *words)))
    assert same == own


def test_eval_measures_against_a_model_of_another_depth(pristine, model, warm, text):
    # of one family, with one tokenizer; the deeper one is the shallow one and a copy of its last layer
    tensors = load_file_of(model)
    tensors |= {x.replace("layers.1", "layers.2"): y for x, y in tensors.items() if "layers.1." in x}
    write_tensors(model, tensors)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    found = json.loads(accepted(warm("eval", pristine, "--against", model, *text, "--json")))
    assert found["kl"]["mean"] > 0.1


def load_file_of(model: Path) -> dict[str, np.ndarray]:
    """The tensors of a bfloat16 checkpoint, as float32."""
    data = (model / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    found = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            begin, end = (8 + size + x for x in entry["data_offsets"])
            wide = np.frombuffer(data[begin:end], "<u2").astype("<u4") << 16
            found[name] = wide.view("<f4").reshape(entry["shape"])
    return found


def write_tensors(model: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_errors_are_objects_too(warm, tmp_path):
    done = warm("inspect", tmp_path / "none", "--json")
    message = refused(done, 3, json_too=True).removeprefix("kvcli: ").rstrip("\n")
    assert json.loads(done.stdout) == {"error": {"code": 3, "message": message}}


def test_options_are_taken_from_the_environment(tinystories, warm, tmp_path):
    env = {
        "KVCLI_BITS": "5", "KVCLI_OUT": str(tmp_path / "A"), "KVCLI_CONTEXT": "700", "KVCLI_DATA": "builtin:prose",
        "KVCLI_DRY_RUN": "1", "KVCLI_JSON": "1", "KVCLI_TOKENS": "1024", "KVCLI_NOMINAL": "1",
    }  # fmt: skip
    found = json.loads(accepted(warm("calibrate", tinystories, env=env)))
    assert (found["bits"], found["context"], found["data"]) == (5, 700, "builtin:prose")
    assert (found["tokens"], found["nominal"]) == (1024, True)
    found = json.loads(accepted(warm("calibrate", tinystories, "--bits", 6, env=env)))
    assert found["bits"] == 6  # what is typed wins


# --- generating -------------------------------------------------------------------------------------------------------


def generated(warm: Run, *args: object, **more: Any) -> str:
    return accepted(warm("generate", *args, **more))


def test_generate_prints_the_completion_only(pristine, warm):
    text = generated(warm, pristine, "Once upon a time", "--max-tokens", 20)
    assert not text.startswith("Once")
    assert text.endswith("\n")
    found = json.loads(generated(warm, pristine, "Once upon a time", "--max-tokens", 20, "--json"))
    assert found["text"] + "\n" == text
    assert set(found) == {"text", "prompt_tokens", "completion_tokens", "finish_reason", "cache_bytes"}
    assert (found["completion_tokens"], found["finish_reason"]) == (20, "length")


def test_generate_stops_where_the_model_does(pristine, warm):
    found = json.loads(generated(warm, pristine, "Once upon a time", "--max-tokens", 400, "--json"))
    assert found["finish_reason"] == "stop"
    assert found["completion_tokens"] < 400


def test_generate_writes_one_line_for_every_line(pristine, warm):
    prompts = "Once upon a time\n\nThe dog\n\n\nShe said"  # the last without an end
    text = generated(warm, pristine, "-", "--max-tokens", 8, input=prompts)
    lines = text.split("\n")
    assert lines.pop() == ""
    assert [bool(x) for x in lines] == [True, False, True, False, False, True]
    assert lines[2] + "\n" == generated(warm, pristine, "The dog", "--max-tokens", 8)
    objects = generated(warm, pristine, "-", "--max-tokens", 8, "--json", input=prompts).splitlines()
    assert [json.loads(x).get("text", "") for x in objects] == lines


def test_generate_reads_stdin_by_default_and_nothing_gives_nothing(pristine, warm):
    assert generated(warm, pristine, "--max-tokens", 4, input="The dog\n").count("\n") == 1
    assert generated(warm, pristine) == ""


def test_generate_escapes_newlines_and_backslashes(pristine, warm):
    prompt = "Once upon a time"
    whole = json.loads(generated(warm, pristine, prompt, "--max-tokens", 120, "--json"))["text"]
    assert "\n" in whole
    line = generated(warm, pristine, "-", "--max-tokens", 120, input=prompt + "\n")
    assert line.count("\n") == 1
    unescaped = re.sub(r"\\(.)", lambda m: {"n": "\n", "r": "\r", "\\": "\\"}[m[1]], line.rstrip("\n"))
    assert unescaped == whole


def test_generate_keeps_to_a_seed(pristine, warm):
    hot = (pristine, "Once upon a time", "--temperature", 1.5, "--max-tokens", 16)
    one, again, other = (generated(warm, *hot, "--seed", seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    narrow = generated(warm, *hot, "--top-k", 1)
    assert narrow == generated(warm, pristine, "Once upon a time", "--max-tokens", 16)


def test_every_line_starts_from_the_seed(pristine, warm):
    lines = generated(warm, pristine, "-", "--temperature", 1.5, "--max-tokens", 8, input="The dog\n" * 2).splitlines()
    assert lines[0] == lines[1]


def test_the_largest_seed_the_command_takes_is_one_it_can_use(pristine, warm):
    done = warm("generate", pristine, "The dog", "--temperature", 1, "--max-tokens", 2, "--seed", 2**32)
    refused(done, 2, "seed")
    accepted(warm("generate", pristine, "The dog", "--temperature", 1, "--max-tokens", 2, "--seed", 2**32 - 1))


def test_generate_exact_uses_16_bits(pristine, warm):
    words = (pristine, "Once upon a time there was a dog", "--max-tokens", 60, "--json")
    packed, exact = (json.loads(generated(warm, *words, *more)) for more in ((), ("--exact",)))
    # pages of 16 tokens: 256 scalars a token of two bytes
    tokens = exact["prompt_tokens"] + exact["completion_tokens"]
    assert exact["cache_bytes"] == -(-tokens // 16) * 16 * 256 * 2
    assert packed["cache_bytes"] < exact["cache_bytes"]


def test_exact_generation_is_the_stock_models(pristine, tinystories, warm):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stock, tokenizer = AutoModelForCausalLM.from_pretrained(tinystories), AutoTokenizer.from_pretrained(tinystories)
    ids = tokenizer("The dog", return_tensors="pt").input_ids
    out = stock.generate(ids, attention_mask=ids > -1, max_new_tokens=40, do_sample=False, pad_token_id=2)
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    words = (pristine, "The dog", "--max-tokens", 40, "--exact", "--backend", "reference")
    assert generated(warm, *words) == expected + "\n"


def test_every_backend_continues_the_prompt(pristine, warm):
    # in bfloat16 the backends round differently; in float32 they agree: tests/runtime/test_generation.py
    words = (pristine, "Once upon a time", "--max-tokens", 24, "--json")
    for more in ((), ("--exact",)):
        backends = (("reference",), ("auto",), ("cpu",), ("cpu", "--deterministic"))
        found = [json.loads(generated(warm, *words, "--backend", *x, *more)) for x in backends]
        texts = [x.pop("text") for x in found]
        assert all(x == found[0] for x in found)
        assert all(len(x) > 40 for x in texts)
        assert texts[1] == texts[2]


def test_int4_weights_generate(pristine, warm):
    found = json.loads(generated(warm, pristine, "Once upon a time", "--max-tokens", 8, "--json", "--weights", "int4"))
    assert found["completion_tokens"] == 8
    again = generated(warm, pristine, "-", "--max-tokens", 8, input="The dog\n" * 2, env={"KVCLI_WEIGHTS": "int4"})
    assert len(set(again.splitlines())) == 1


def test_what_a_backend_cannot_do_is_refused(pristine, warm):
    words = ("generate", pristine, "The dog", "--max-tokens", 2, "--backend")
    refused(warm(*words, "reference", "--weights", "int4"), 2, "native runtime")
    refused(warm(*words, "reference", "--deterministic"), 2, "native runtime")
    refused(warm(*words, "cuda"), 1, "GPU", json_too=True)
    refused(warm(*words, "tpu"), 2, "tpu")


def test_chat_needs_a_template(pristine, warm):
    refused(warm("generate", pristine, "Hello", "--chat"), 2, "no chat template")


def test_chat_applies_the_template(artifact, warm):
    file = artifact / "tokenizer_config.json"
    template = "{% for m in messages %}Once upon a time {{ m.content }}{% endfor %}"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    rewritten(artifact, lambda m: m["files"].pop("tokenizer_config.json"))
    chat = json.loads(generated(warm, artifact, "a dog", "--chat", "--max-tokens", 8, "--json"))
    from transformers import AutoTokenizer

    # the template says where special tokens go, so the tokenizer adds none
    words = AutoTokenizer.from_pretrained(artifact)("Once upon a time a dog", add_special_tokens=False).input_ids
    assert chat["prompt_tokens"] == len(words)


def test_a_prompt_that_fills_the_context_is_refused(pristine, warm):
    refused(warm("generate", pristine, "dog " * 600), 2, "no room", "512")


def test_prompts_that_are_not_utf8_are_refused(pristine, warm):
    done = warm("generate", pristine, "-", "--max-tokens", 2, input=b"The dog\n\xff\xfe\n")
    assert done.stdout.count("\n") == 1  # the line before was answered
    refused(done, 3, "UTF-8", json_too=True)
    refused(warm("generate", pristine, "\udcff"), 3, "UTF-8")  # what Python makes of such a byte among the arguments


# --- what cannot be used ----------------------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where an artifact would be written; nothing may be left there, and beside it only hidden stages."""
    folder = tmp_path / "results"
    folder.mkdir()
    yield folder / "artifact"
    assert names(folder) in ([], [".artifact.stages"])


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


def flip(file: Path, at: int, bit: int = 7) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(data)


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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tasks", "ppl,nonsense"), "nonsense"),
        (("--window", 600), "512"),
        (("--window", 3), "--window"),
        (("--dump", "none/dump.safetensors"), "none"),
        (("--dump", "."), "--dump"),
        (("--data", "self"), "self"),
    ],
)
def test_wrong_usage_of_eval(warm, pristine, words, said):
    refused(warm("eval", pristine, *words), 2, said)


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


# --- what is there already --------------------------------------------------------------------------------------------


def test_an_artifact_is_replaced_only_on_demand(warm, tinystories, artifact, small):
    before = (artifact / "kvcli.json").read_bytes()
    refused(warm("calibrate", tinystories, "--bits", 4, *small, "-o", artifact), 2, "already holds an artifact")
    refused(warm("solve", artifact, "--bits", 4, "-o", artifact), 2, "already holds an artifact")
    assert (artifact / "kvcli.json").read_bytes() == before
    accepted(warm("calibrate", tinystories, "--bits", 4, *small, "-o", artifact, "--force"))
    assert json.loads((artifact / "kvcli.json").read_text())["budget"]["bits"] == 4
    accepted(warm("solve", artifact, "--bits", 3.5, "-o", artifact, "--force"))
    assert json.loads((artifact / "kvcli.json").read_text())["budget"]["bits"] == 3.5
    assert names(artifact.parent) == ["artifact"]


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_what_is_no_artifact_is_never_replaced(warm, tinystories, pristine, tmp_path, force, small):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("kept")
    for name in ("mine", "file"):
        refused(warm("calibrate", tinystories, "--bits", 4, *small, "-o", tmp_path / name, *force), 2, name)
        refused(warm("solve", pristine, "--bits", 4, "-o", tmp_path / name, *force), 2, name)
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
    assert names(tmp_path) == ["file", "mine"]


def test_an_empty_folder_is_filled(warm, pristine, tmp_path):
    (tmp_path / "A").mkdir()
    accepted(warm("solve", pristine, "--bits", 4, "-o", tmp_path / "A"))
    accepted(warm("inspect", tmp_path / "A"))


# --- dry runs ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing_and_says_so(warm, tinystories, out, small):
    words = ("calibrate", tinystories, "--bits", 4, *small, "-o", out, "--dry-run")
    assert "nothing was written" in accepted(warm(*words))
    found = json.loads(accepted(warm(*words, "--json")))
    assert found["model"] == "TinyStories-656K"
    assert found["num_layers"] == 2
    assert not out.exists()
    assert names(out.parent) == []


@pytest.mark.parametrize(
    ("words", "code"),
    [(("--bits", 1), 4), (("--bits", 4, "--data", "none.txt"), 3), (("--bits", 4, "--recipe", "nonsense"), 3)],
)
def test_a_dry_run_finds_what_the_run_would(warm, tinystories, out, words, code):
    refused(warm("calibrate", tinystories, *words, "-o", out, "--dry-run"), code)


def test_a_dry_run_does_not_run_the_model(warm, tinystories, out, small):
    # which would write its own calibration text for minutes
    words = ("calibrate", tinystories, "--bits", 4, *small, "--data", "self", "-o", out, "--dry-run")
    accepted(warm(*words, interrupt=("kvcli.calibration.selftext", "", "write")))


# --- interruptions ----------------------------------------------------------------------------------------------------

EVERYTHING = ["moments", "sensitivity", "settings", "verify"]
WRITER = ("kvcli.artifact.writer", "ArtifactWriter")
MOMENTS = {
    "while stages run": (("kvcli.calibration.kvtuner", "", "measure_settings"), EVERYTHING[:2]),
    "while the artifact is written": ((*WRITER, "write_json"), EVERYTHING),
    "before it is moved into place": ((*WRITER, "_move"), EVERYTHING),
}


@pytest.fixture(scope="module")
def whole(warm: Run, tinystories: Path, small: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What an uninterrupted calibration prints."""
    out = tmp_path_factory.mktemp("whole") / "A"
    return json.loads(accepted(warm("calibrate", tinystories, "--bits", 4, *small, "--json", "-o", out)))


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_calibration_keeps_its_stages_and_goes_on_from_them(
    whole, moment, tinystories, warm, tmp_path, small
):
    where, finished = MOMENTS[moment]
    folder = tmp_path / "results"
    words = ("calibrate", tinystories, "--bits", 4, *small, "--json", "-o", folder / "A")
    done = warm(*words, interrupt=where)
    assert (done.returncode, done.stderr) == (130, "kvcli: Interrupted; finished stages are kept.\n")
    assert json.loads(done.stdout)["error"]["code"] == 130
    assert names(folder) == [".A.stages"]
    assert sorted({x.name.rsplit("-", 1)[0] for x in (folder / ".A.stages").iterdir()}) == finished
    again = warm(*words)
    assert (again.returncode, again.stderr) == (0, f"Resumed: {', '.join(finished)} taken from an earlier run.\n")
    assert names(folder) == ["A"]
    assert {**json.loads(again.stdout), "path": ""} == {**whole, "path": ""}


def test_fresh_forgets_an_interrupted_run(tinystories, warm, tmp_path, small):
    words = ("calibrate", tinystories, "--bits", 4, *small, "-o", tmp_path / "results/A")
    assert warm(*words, interrupt=MOMENTS["while stages run"][0]).returncode == 130
    accepted(warm(*words, "--fresh"))  # nothing on stderr: nothing was resumed
    assert names(tmp_path / "results") == ["A"]


def test_an_interrupted_replacement_leaves_the_older_artifact(tinystories, warm, artifact, small):
    before = {x.name: x.read_bytes() for x in artifact.iterdir()}
    words = ("calibrate", tinystories, "--bits", 3.5, *small, "-o", artifact, "--force")
    assert warm(*words, interrupt=(*WRITER, "_move")).returncode == 130
    assert {x.name: x.read_bytes() for x in artifact.iterdir()} == before
    assert names(artifact.parent) == [".artifact.stages", "artifact"]
    accepted(warm("inspect", artifact))


def test_ctrl_c_from_outside_stops_a_calibration(tinystories, clean_env, tmp_path):
    # sixty settings, so that there is time to be interrupted in
    recipe = tmp_path / "long.yaml"
    recipe.write_text(
        "search:\n  center: true\n  k: [{bits: [2, 4], group: 16}]\n  v: [{bits: [2, 4], group: 16}]\n"
        f"  residual_windows: {list(range(60))}\n"
    )
    folder = tmp_path / "results"
    words = [*KVCLI.split(), "calibrate", tinystories, "--bits", "9", "--recipe", recipe, "-o", folder / "A"]
    started = subprocess.Popen(list(map(str, words)), stdout=-1, stderr=-1, text=True, env=clean_env)
    kept = folder / ".A.stages"
    deadline = time.monotonic() + 300
    while not (kept.exists() and any(x.name.startswith("sensitivity-") for x in kept.iterdir())):
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started.send_signal(signal.SIGINT)
    said = started.communicate(timeout=60)
    assert (started.returncode, *said) == (130, "", "kvcli: Interrupted; finished stages are kept.\n")
    assert names(folder) == [".A.stages"]
    assert not [x for x in kept.iterdir() if x.suffix == ".part"]


def test_an_interrupted_evaluation_leaves_no_dump(pristine, warm, text, tmp_path):
    words = ("eval", pristine, *text, "--dump", tmp_path / "dump.safetensors")
    assert warm(*words, interrupt=("kvcli.evaluation.fidelity", "", "save_file")).returncode == 130
    assert names(tmp_path) == []


# --- full disks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a file system of so many KiB."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("needs the right to mount a tmpfs")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_too_small_for_the_weights(warm, tinystories, small_disk, small):
    folder = small_disk(1024)  # the weights alone have 1284
    done = warm("calibrate", tinystories, "--bits", 4, *small, "-o", folder / "A")
    refused(done, 1, str(folder / "A"))
    assert re.search(r"disk (is full|has)", done.stderr)
    assert names(folder) == [".A.stages"]


def test_a_disk_too_small_for_the_stages(warm, tinystories, small_disk, small):
    folder = small_disk(4)
    refused(warm("calibrate", tinystories, "--bits", 4, *small, "-o", folder / "A"), 1, "space")
    assert names(folder) in ([], [".A.stages"])


def test_a_disk_too_small_for_what_follows_the_weights(warm, pristine, small_disk):
    # another file system, so that weights are copied: room for them, and for little else
    folder = small_disk(1340)
    refused(warm("solve", pristine, "--bits", 4, "-o", folder / "A"), 1, str(folder / "A"))
    assert names(folder) == []


def test_a_disk_too_small_for_a_dump(warm, pristine, text, small_disk):
    folder = small_disk(64)
    refused(warm("eval", pristine, *text, "--dump", folder / "dump.safetensors"), 1, "space")
    assert names(folder) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(warm, pristine, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(warm("solve", pristine, "--bits", 4, "-o", tmp_path / "locked/A"), 1, "locked")


def test_an_output_that_cannot_be_a_folder_is_refused_before_any_work(warm, tinystories, tmp_path, small):
    (tmp_path / "file").write_text("kept")
    done = warm("calibrate", tinystories, "--bits", 4, *small, "-o", tmp_path / "file/A")
    refused(done, 1, str(tmp_path / "file"))
    assert names(tmp_path) == ["file"]


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_reader_that_leaves_after_a_line_is_quiet(pristine, clean_env):
    script = f"yes The dog | {KVCLI} generate {pristine} - --max-tokens 2 | head -n 2; exit ${{PIPESTATUS[1]}}"
    done = subprocess.run(["bash", "-c", script], env=clean_env, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 2)


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_reader_that_is_gone_from_the_start_is_quiet(pristine, clean_env, more):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*KVCLI.split(), "inspect", str(pristine), *more], stdout=write, stderr=-1, env=clean_env)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_artifact_is_written_although_nobody_reads_what_is_said(pristine, clean_env, tmp_path):
    script = f"{KVCLI} solve {pristine} --bits 4 -o {tmp_path / 'A'} --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], env=clean_env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert names(tmp_path) == ["A"]
    assert (tmp_path / "A/kvcli.json").exists()


def test_progress_shows_on_a_terminal_and_beside_the_data(pristine, clean_env):
    terminal, end = pty.openpty()
    words = [*KVCLI.split(), "inspect", str(pristine), "--json"]
    done = subprocess.run(words, stdout=-1, stderr=end, env={**clean_env, "TERM": "xterm"})
    os.close(end)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert done.returncode == 0
    assert "checking" in shown
    assert json.loads(done.stdout)["context"] == 512


@pytest.mark.parametrize("words", [("eval",), ("solve", "--bits", 4)])
def test_progress_is_for_terminals_only(pristine, warm, text, tmp_path, words):
    more = text if words[0] == "eval" else ("-o", tmp_path / "A")
    accepted(warm(*words, pristine, *more, env={"FORCE_COLOR": "1", "TERM": "xterm", "TTY_COMPATIBLE": "1"}))


# --- never a traceback ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["calibrate", "solve", "eval", "generate", "inspect"])
@pytest.mark.parametrize("rubbish", ["", ".", "/dev/null", "\x00", "a" * 5000, "-1", "~nobody/x", "hub:", "x.gguf"])
def test_rubbish_for_a_model_is_answered_in_one_sentence(warm, tmp_path, command, rubbish):
    more = ["--bits", "4", "-o", str(tmp_path / "out")] if command in ("calibrate", "solve") else []
    if "\x00" in rubbish:
        rubbish = "a\nb"  # no argument holds a NUL; a newline must not break the sentence
    done = warm(command, rubbish, *more, cwd=tmp_path)
    refused(done, 2 if done.returncode == 2 else 3)
    assert names(tmp_path) == []
