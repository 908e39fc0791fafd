"""The wheel holds everything a user needs, and nothing is left behind in the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"kvcli": "kvcli", "plugins": "kvcli_plugins", "calib": "kvcli_calib"}
JUNK = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info", "lib")


def _sources(folder: Path) -> set[Path]:
    skipped = {"__pycache__", "lib"}  # compiled code, which every build makes anew
    return {x.relative_to(folder) for x in folder.rglob("*") if x.is_file() and not skipped & set(x.parts)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> ZipFile:
    """Build from a copy, so that the repository stays as it is."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=JUNK)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(out),
        ".",
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # for the CMake installed beside Python
    env = {**os.environ, "KVCLI_CUDA": "off", "PATH": path}
    done = subprocess.run(build, cwd=source, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("kvcli-*.whl")
    return ZipFile(built)


@pytest.mark.slow
def test_the_wheel_holds_every_file(wheel):
    names = set(wheel.namelist())
    missing = [
        f"{folder}/{path}"
        for folder, package in FOLDERS.items()
        for path in _sources(ROOT / folder)
        if f"{package}/{path.as_posix()}" not in names
    ]
    assert missing == []


@pytest.mark.slow
def test_the_wheel_carries_the_kernels_for_any_python(wheel):
    assert "kvcli/runtime/lib/libkvrt_cpu.so" in wheel.namelist()
    assert "-py3-none-" in Path(str(wheel.filename)).name


@pytest.mark.slow
def test_the_wheel_says_what_it_is(wheel):
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert metadata["Name"] == "kvcli"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    entries = wheel.read(f"{info}/entry_points.txt").decode()
    assert "kvcli = kvcli.cli.main:main" in entries
    assert "kivi = kvcli_plugins.kivi:KIVI" in entries


@pytest.mark.slow
def test_an_unpacked_wheel_runs(wheel, tmp_path, clean_env):
    wheel.extractall(tmp_path)
    code = (
        "import kvcli, kvcli_plugins, importlib.resources as r, kvcli.plugins as p, kvcli.runtime.kvrt as n;"
        "print(kvcli.__file__, kvcli_plugins.__file__, r.files('kvcli_calib'), n.__file__, n.library('cpu').kind, "
        "*(x.name for x in p.discover()))"
    )
    env = {**clean_env, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path, check=True
    )
    *places, kind, plugin = done.stdout.split()
    assert kind == "cpu"
    assert all(Path(x).is_relative_to(tmp_path) for x in places)
    assert plugin == "kivi"


def test_an_install_finds_the_other_folders():
    """However kvcli got here, its plug-ins and data are importable under their package names from anywhere."""
    code = "import kvcli_plugins, importlib.resources as r; print((r.files('kvcli_calib') / '__init__.py').is_file())"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


def test_every_dependency_of_ours_is_pinned():
    """Whatever pyproject.toml asks for by range, constraints.txt pins (extras that CI does not install left out)."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {x.split(">")[0].strip().lower() for x in asked}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {x.split("==")[0].lower() for x in lines if "==" in x}
    assert names - pinned == set()
    assert not any("+" in x for x in lines), "a local version tag fits one build only"
