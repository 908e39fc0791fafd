"""Every command as its user meets it: data on stdout, one sentence on stderr, an exit code, no half-written file."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from cli_checks import CORPUS, KVCLI, Done, accepted, generated, names, refused

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
