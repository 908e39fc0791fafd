"""The benchmark of learned transforms, on a toy: it writes an entry at a time and repeats none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "transforms.py"


@pytest.mark.slow
def test_entries_are_kept_and_not_measured_again(tinystories: Path, smollm2: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Tim saw a red bird near the old tree and sang to it. " * 80)
    words = [
        "--data", text, "--model", tinystories, "--rows", "kv3,weights",
        "--arms", "hadamard;all, closed form;plain rotation",
        "--window", 128, "--limit", 1, "--work", tmp_path / "work", "--out", tmp_path / "out.json",
    ]  # fmt: skip
    printed = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert printed[1] == ""
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    rows = {(x["row"], x["arm"]): x for x in found}
    assert len(rows) == len(found) == printed[0].count("\n") == 7
    first, second = rows["KV3", "hadamard"], rows["KV3", "all, closed form"]
    assert first["effective_bits"] == second["effective_bits"]
    assert first["kl"]["mean"] != second["kl"]["mean"]
    costs = [rows[x, "plain rotation"]["kl"]["mean"] for x in ("W4", "W4KV3", "W4A4KV4")]
    assert costs == sorted(costs)
