"""What the README shows must be true: its commands exist, its links lead somewhere, its Python runs."""

import re
from pathlib import Path

import pytest

from kvcli.cli.app import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_command_shown_exists():
    shown = set(re.findall(r"kvcli ([a-z]+) ", README))
    assert shown
    assert shown <= set(COMMANDS)


@pytest.mark.parametrize("command", ["calibrate", "solve", "eval", "generate"])
def test_every_option_shown_exists(command, run_kvcli):
    shown = set(re.findall(r"--[a-z-]+", " ".join(re.findall(rf"kvcli {command} ([^|`\n]*)", README))))
    assert shown <= set(re.findall(r"--[a-z-]+", run_kvcli(command, "--help").stdout))


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_python_runs(tinystories, run_kvcli, tmp_path, monkeypatch):
    out = tmp_path / "OUT"
    done = run_kvcli(
        "calibrate", str(tinystories), "--bits", "5", "--context", "512", "--tokens", "2048", "-o", str(out)
    )
    assert done.returncode == 0, done.stderr
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    from transformers import AutoTokenizer

    scope = {"inputs": dict(AutoTokenizer.from_pretrained(out)("Once upon a time", return_tensors="pt"))}
    exec(code, scope)
    assert scope["cache"].lengths[0] > 5
