"""A command line that starts warm, and one calibrated artifact that all tests share."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("cli_checks")
sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from cli_checks import CORPUS, Run, names  # noqa: E402

RECIPE = """
search:
  center: true
  k: [{bits: [2, 4, 8], group: 16, scale_dtype: e5m3}]
  v: [{bits: [2, 4, 8], group: 16, scale_dtype: e5m3}]
  residual_windows: [0, 16]
"""

# Importing torch and transformers takes seconds. This imports them once and forks for every command line: each is a
# process of its own, with its own arguments, environment, streams and exit code.
SERVER = """
import gc, importlib, json, os, signal, sys
import kvcli.calibration.pipeline, kvcli.cli.app, kvcli.evaluation.fidelity, kvcli.runtime.generation
import transformers.models.llama.modeling_llama
from kvcli.cli.main import main

kvcli.cli.app.build()  # imports every command
gc.freeze()
def interrupt(module, owner, name):
    "Press Ctrl-C when a function is called."
    place = importlib.import_module(module)
    place = getattr(place, owner) if owner else place
    work = getattr(place, name)

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return work(*args, **kwargs)

    setattr(place, name, interrupted)


print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        os.environ.clear()
        os.environ.update(job["env"])
        os.chdir(job["cwd"])
        for number, (path, mode) in enumerate(zip(job["streams"], "rww")):
            file = open(path, mode)
            os.dup2(file.fileno(), number)
        sys.stdin, sys.stdout, sys.stderr = (open(i, mode) for i, mode in enumerate("rww"))
        if job["interrupt"]:
            interrupt(*job["interrupt"])
        try:
            main(job["arguments"])
        except SystemExit as left:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(left.code or 0)  # tearing torch down would take longer than the command
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def warm(clean_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run ``kvcli`` as ``run_kvcli`` does, in a process that need not import torch first.

    ``interrupt=(module, class or "", function)`` sends it SIGINT when it calls that function.
    """
    folder = tmp_path_factory.mktemp("streams")
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SERVER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**clean_env, **quiet},
    )  # fmt: skip
    assert server.stdin is not None
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"

    def run(
        *args: object,
        input: str | bytes = "",
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        interrupt: tuple[str, str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        assert server.stdin is not None
        assert server.stdout is not None
        streams = [folder / name for name in ("in", "out", "err")]
        streams[0].write_bytes(input if isinstance(input, bytes) else input.encode())
        job = {
            "arguments": list(map(str, args)), "env": {**clean_env, **quiet, **(env or {})},
            "cwd": str(cwd or folder), "streams": list(map(str, streams)), "interrupt": interrupt,
        }  # fmt: skip
        print(json.dumps(job), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(list(map(str, args)), code, streams[1].read_text(), streams[2].read_text())

    yield run
    server.stdin.close()
    server.wait(timeout=30)


@pytest.fixture(scope="session")
def calibrated(
    warm: Run, tinystories: Path, tmp_path_factory: pytest.TempPathFactory
) -> subprocess.CompletedProcess[str]:
    """What calibrating TinyStories to 5 bits printed; its last argument is the artifact."""
    out = tmp_path_factory.mktemp("shared") / "artifact"
    done = warm("calibrate", tinystories, "--bits", 5, "--context", 512, "--tokens", 2048, "--json", "-o", out)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def pristine(calibrated: subprocess.CompletedProcess[str]) -> Path:
    """An artifact that no test may change."""
    return Path(calibrated.args[-1])


@pytest.fixture
def artifact(pristine: Path, tmp_path: Path) -> Path:
    """An artifact to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "artifact"))


@pytest.fixture
def model(tinystories: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    copied = tmp_path / "model"
    shutil.copytree(tinystories, copied, copy_function=shutil.copyfile)
    copied.chmod(0o755)
    return copied


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Options that calibrate in a second."""
    recipe = tmp_path_factory.mktemp("small") / "small.yaml"
    recipe.write_text(RECIPE)
    return ("--context", 512, "--tokens", 1024, "--recipe", recipe)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Options that evaluate on a text of our own, in a moment."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(CORPUS)
    return ("--data", file, "--window", 64, "--limit", 1)


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where an artifact would be written; nothing may be left there, and beside it only hidden stages."""
    folder = tmp_path / "results"
    folder.mkdir()
    yield folder / "artifact"
    assert names(folder) in ([], [".artifact.stages"])
