"""What every command does alike: exit codes, errors, pipes, help, environment variables."""

from __future__ import annotations

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from kvcli.cli import console
from kvcli.cli.options import option

KVCLI = [sys.executable, "-m", "kvcli"]
SHELL = " ".join(map(shlex.quote, KVCLI))

# A command line with one more command, which does what its option says.
TROUBLE = """
import errno, os, sys
from typing import Annotated
import typer
from kvcli.cli import app, main
from kvcli.cli.console import emit, progress, say
from kvcli.cli.options import JsonFlag, SeedOption, ThreadsOption, option
from kvcli.errors import *

def trouble(
    what: str,
    json: JsonFlag = False,
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
):
    '''Make trouble.

    Raises
    ------
    InputError
        Always.
    '''
    match what:
        case "input": raise InputError("the model is a\\n  sandwich.")
        case "budget": raise BudgetError("no.")
        case "usage": raise UsageError("no.")
        case "failure": raise KvcliError("no.")
        case "eof": raise EOFError
        case "bug": raise ZeroDivisionError("by nought")
        case "interrupt": raise KeyboardInterrupt
        case "full": raise OSError(errno.ENOSPC, "No space left on device", "a/b")
        case "rust": raise RuntimeError("I/O error: No space left on device (os error 28)")
        case "denied": raise PermissionError(errno.EACCES, "Permission denied", "a/b")
        case "memory": raise MemoryError
        case "socket": raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        case "exit": raise typer.Exit(7)
        case "seed": emit({"seed": seed})
        case "threads":
            assert "torch" not in sys.modules
            import torch
            emit({"asked": threads, "torch": torch.get_num_threads()})
        case "markup": say("[red]kept[/red] as it is " + "x" * 200)
        case "progress":
            with progress("working", total=2) as bar:
                bar.advance()
                bar.describe("still working")
                bar.advance()
        case "surrogate": emit({"text": "é \\ud800"})
        case "wait":
            print("ready", flush=True)
            import time
            time.sleep(60)

build = app.build
def with_trouble():
    made = build()
    made.command("trouble", help=app._help(trouble))(trouble)
    return made
app.build = with_trouble
main.main()
"""


@pytest.fixture
def trouble(tmp_path, run_kvcli):
    script = tmp_path / "trouble.py"
    script.write_text(TROUBLE)
    return partial(run_kvcli, "trouble", script=script)


@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        ("failure", 1, "no."),
        ("usage", 2, "no."),
        ("input", 3, "the model is a sandwich."),
        ("budget", 4, "no."),
        ("interrupt", 130, "Interrupted; finished stages are kept."),
        ("full", 1, "no space left on the disk: a/b."),
        ("rust", 1, "no space left on the disk."),
        ("denied", 1, "Permission denied: a/b."),
        ("memory", 4, "not enough memory."),
        ("socket", 1, "Broken pipe."),
        ("bug", 1, "internal error: ZeroDivisionError: by nought; rerun with --debug for the traceback"),
    ],
)
def test_an_error_is_one_sentence_and_a_code(trouble, what, code, message):
    plain = trouble(what)
    assert (plain.returncode, plain.stdout, plain.stderr) == (code, "", f"kvcli: {message}\n")
    as_json = trouble(what, "--json")
    assert as_json.returncode == code
    assert json.loads(as_json.stdout) == {"error": {"code": code, "message": message}}


def test_the_end_of_a_file_is_no_interrupt(trouble):
    done = trouble("eof")
    assert done.returncode == 1
    assert done.stderr.strip() == "kvcli: internal error: EOFError; rerun with --debug for the traceback"


def test_a_command_can_choose_its_exit_code(trouble):
    assert trouble("exit").returncode == 7


@pytest.mark.parametrize("words", [("bug", "--debug"), ("input", "--debug")])
def test_debug_shows_the_traceback_after_the_command(trouble, words):
    assert "Traceback" in trouble(*words).stderr


def test_debug_shows_the_traceback_before_the_command_and_by_variable(trouble, run_kvcli, tmp_path):
    assert "Traceback" in run_kvcli("--debug", "trouble", "bug", script=tmp_path / "trouble.py").stderr
    assert "Traceback" in trouble("bug", env={"KVCLI_DEBUG": "1"}).stderr
    assert "Traceback" not in trouble("bug", env={"KVCLI_DEBUG": "0"}).stderr


@pytest.mark.parametrize("words", [["nonsense"], ["plugins", "--nonsense"], ["plugins", "stray"], []])
def test_wrong_usage_exits_with_2(run_kvcli, words):
    done = run_kvcli(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("kvcli: ")
    assert done.stderr.count("\n") == 1
    done = run_kvcli(*words, "--json") if words else run_kvcli(env={"KVCLI_JSON": "1"})
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["code"] == 2


def test_words_after_a_double_dash_are_no_options(run_kvcli):
    done = run_kvcli("plugins", "--", "--json")
    assert (done.returncode, done.stdout) == (2, "")


def test_options_come_from_the_environment(trouble):
    assert json.loads(trouble("seed", env={"KVCLI_SEED": "5", "KVCLI_JSON": "1"}).stdout) == {"seed": 5}
    done = trouble("seed", env={"KVCLI_SEED": "many"})
    assert done.returncode == 2
    assert "KVCLI_SEED" in done.stderr


def test_an_option_is_named_after_its_long_name():
    assert option("--max-tokens", "-n", help="").envvar == "KVCLI_MAX_TOKENS"
    assert option("--resume/--fresh", help="").envvar == "KVCLI_RESUME"
    with pytest.raises(ValueError, match="no long name"):
        option("-n", help="")


@pytest.mark.parametrize(
    ("words", "env", "threads"),
    [
        (("--threads", "1"), {}, 1),
        ((), {"OMP_NUM_THREADS": "1"}, 1),
        (("--threads", "2"), {"OMP_NUM_THREADS": "1"}, 2),
    ],
)
def test_threads_reach_torch(trouble, words, env, threads):
    done = trouble("threads", *words, env={"OMP_NUM_THREADS": "", **env})
    assert json.loads(done.stdout) == {"asked": threads, "torch": threads}


def test_threads_default_to_physical_cores(trouble):
    import psutil

    cores = min(psutil.cpu_count(logical=False), len(os.sched_getaffinity(0)))
    assert json.loads(trouble("threads", env={"OMP_NUM_THREADS": ""}).stdout)["asked"] == cores


def test_help_lists_variables_and_hides_what_is_raised(trouble, run_kvcli):
    shown = trouble("--help").stdout
    assert "Make trouble." in shown
    assert "KVCLI_SEED" in shown
    assert "Raises" not in shown
    everything = run_kvcli("--help").stdout
    for name in ("plugins", "doctor", "KVCLI_DEBUG"):
        assert name in everything


def test_every_option_of_every_command_has_a_variable():
    from typer.main import get_command

    from kvcli.cli.app import build

    commands = get_command(build()).commands
    assert {"plugins", "doctor"} <= set(commands)
    bare = [
        f"{name} {parameter.opts[0]}"
        for name, command in commands.items()
        for parameter in command.params
        if parameter.param_type_name == "option" and not str(parameter.envvar).startswith("KVCLI_")
    ]
    assert bare == []


def test_help_needs_nothing_heavy():
    code = (
        "import sys, kvcli.cli.app as a; a.build(); print(*(x for x in ('torch', 'transformers') if x in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_version(run_kvcli):
    import kvcli

    assert run_kvcli("--version").stdout == f"kvcli {kvcli.__version__}\n"


def test_completion(run_kvcli, clean_env):
    env = {"_KVCLI_COMPLETE": "complete_bash", "COMP_WORDS": "kvcli plu", "COMP_CWORD": "1"}
    assert run_kvcli(env=env).stdout.split() == ["plugins"]
    done = subprocess.run(["bash", "-c", f"{SHELL} --show-completion; exit $?"], capture_output=True, env=clean_env)
    assert done.returncode == 0
    assert b"_KVCLI_COMPLETE=complete_bash" in done.stdout


@pytest.mark.parametrize("words", ["plugins --json", "--help"])
@pytest.mark.parametrize("reader", ["head -c 1", "true"])
def test_a_reader_that_leaves_early_is_quiet(clean_env, words, reader):
    script = f"{SHELL} {words} | {reader} > /dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=clean_env)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", ["plugins --json", "--help", "doctor"])
def test_a_pipe_that_was_closed_before_is_quiet(clean_env, words):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*KVCLI, *words.split()], stdout=write, stderr=subprocess.PIPE, env=clean_env)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", ["plugins --json", "--version"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_stdout_is_an_error(clean_env, words, unbuffered):
    env = {**clean_env, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run([*KVCLI, *words.split()], stdout=full, stderr=subprocess.PIPE, text=True, env=env)
    assert (done.returncode, done.stderr) == (1, "kvcli: no space left on the disk.\n")


def test_ctrl_c_leaves_with_130(trouble, clean_env, tmp_path):
    script = tmp_path / "trouble.py"
    started = subprocess.Popen(
        [sys.executable, script, "trouble", "wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_env,
    )
    assert started.stdout.readline() == "ready\n"
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=30)
    assert (started.returncode, said) == (130, "kvcli: Interrupted; finished stages are kept.\n")


def test_progress_is_for_terminals_only(trouble):
    assert trouble("progress", env={"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}).stderr == ""


def test_progress_shows_on_a_terminal(trouble, clean_env, tmp_path):
    terminal, end = pty.openpty()
    subprocess.run(
        [sys.executable, tmp_path / "trouble.py", "trouble", "progress"],
        stdout=subprocess.PIPE,
        stderr=end,
        env={**clean_env, "TERM": "xterm"},
        check=True,
    )
    os.close(end)
    shown = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert "working" in shown


def test_messages_are_printed_as_they_are(trouble):
    assert trouble("markup").stderr == "[red]kept[/red] as it is " + "x" * 200 + "\n"


def test_stdout_is_utf8_in_every_locale(trouble):
    done = trouble("surrogate", env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"})
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"text": "é \ud800"}


def test_emit_prints_one_line_of_plain_json(capsys):
    console.emit(
        {"a": float("nan"), "b": [np.float32(1.5), np.float64("inf"), torch.tensor([1, 2])], 3: Path("x"), "é": True}
    )
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "é" in out
    assert json.loads(out) == {"a": None, "b": [1.5, None, [1, 2]], "3": "x", "é": True}


def test_a_table_is_not_cut_off_in_a_pipe(capsys):
    console.table(("name", "text"), [("a", "[b]" + "x" * 300), ("c", 5)])
    assert "[b]" + "x" * 300 in capsys.readouterr().out


HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FAULTS = """
import resource, sys
import kvcli.cli.main as cli
cli._run = lambda words: torch_faults()

def torch_faults():
    import torch
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return 0

cli.main([])
"""


@pytest.mark.skipif("[never]" in (HUGE.read_text() if HUGE.exists() else "[never]"), reason="no huge pages here")
def test_large_tensors_lie_on_huge_pages():
    plain, own = (
        int(subprocess.run([sys.executable, "-c", FAULTS], env={**os.environ, "THP_MEM_ALLOC_ENABLE": x},
                           capture_output=True, check=True).stdout)
        for x in ("0", "1")
    )  # fmt: skip
    env = {x: y for x, y in os.environ.items() if x != "THP_MEM_ALLOC_ENABLE"}
    found = int(subprocess.run([sys.executable, "-c", FAULTS], env=env, capture_output=True, check=True).stdout)
    assert found < 2 * own < plain
