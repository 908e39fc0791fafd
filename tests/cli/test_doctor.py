"""``kvcli doctor`` says what is there and what is not."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import psutil

import kvcli
from kvcli.cli import doctor


def test_json_holds_the_facts(run_kvcli, tmp_path):
    done = run_kvcli("doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0
    facts = json.loads(done.stdout)
    assert facts["kvcli"] == kvcli.__version__
    assert facts["python"] == platform.python_version()
    assert facts["libraries"]["torch"]
    assert facts["cpu"]["logical_cores"] == psutil.cpu_count()
    assert 0 < facts["memory"]["available_bytes"] <= facts["memory"]["total_bytes"] == psutil.virtual_memory().total
    assert facts["disk"]["folder"] == str(tmp_path)
    assert facts["disk"]["free_bytes"] > 0
    assert facts["torch"]["cpu_capability"]
    assert facts["backends"]["reference"] == {"kernels": None, "missing": None}
    cpu, cuda = facts["backends"]["cpu"], facts["backends"]["cuda"]
    assert cpu["kernels"] in {"avx512", "avx2", "portable"}
    assert cpu["missing"] is None
    assert cuda["kernels"] == "cuda" or cuda["missing"]
    assert facts["hub"] is None


def test_missing_packages_say_what_they_are_for(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-package": "dreams", "pytest": "tests"})
    doctor.doctor()
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["no-such-package"] == ["no-such-package", "missing", "dreams"]
    assert lines["pytest"][1][0].isdigit()


def test_a_broken_torch_is_a_finding(tmp_path, clean_env):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch is not there')")
    env = {**clean_env, "PYTHONPATH": f"{tmp_path}:{clean_env['PYTHONPATH']}"}
    run = [sys.executable, "-m", "kvcli", "doctor"]
    done = subprocess.run([*run, "--json"], capture_output=True, text=True, env=env, check=True)
    assert json.loads(done.stdout)["torch"] == {"error": "ImportError: libtorch is not there"}
    assert "libtorch is not there" in subprocess.run(run, capture_output=True, text=True, env=env, check=True).stdout


def test_nothing_leaves_the_machine_unless_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(doctor, "_hub_answers", lambda: asked.append(True) or False)
    assert doctor.examine()["hub"] is None
    assert not asked
    assert doctor.examine(network=True)["hub"] is False


def test_a_hub_that_cannot_be_reached_does_not_answer(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert doctor._hub_answers() is False
