"""What tests of the command line share: how a command says no and yes, and ways to damage files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]

KVCLI = f"{sys.executable} -m kvcli"
CORPUS = "\n".join(f"On day {i} Tim saw {i * i} red birds near the old tree and sang to them." for i in range(120))


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


def generated(warm: Run, *args: object, **more: Any) -> str:
    return accepted(warm("generate", *args, **more))


def rewritten(artifact: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change an artifact's kvcli.json."""
    file = artifact / "kvcli.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    return artifact


def flip(file: Path, at: int, bit: int = 7) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(data)
