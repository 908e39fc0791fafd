"""Every instruction set's inner loops against plain loops in double, in C++: see ops_check.cpp."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

import kvcli.runtime

HERE = Path(__file__).parent
SOURCES = Path(next(iter(kvcli.runtime.__path__))) / "csrc"
SETS = {
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512vnni -mavx2 -mfma -mf16c",
}


@pytest.mark.slow
def test_every_loop(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64")
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-w", f"-I{SOURCES}", f"-I{SOURCES / 'cpu'}"]
    objects = []
    for name, more in SETS.items():
        objects.append(str(tmp_path / f"{name}.o"))
        source = SOURCES / "cpu" / f"{name}_ops.cpp"
        subprocess.run([compiler, *flags, *more.split(), "-c", str(source), "-o", objects[-1]], check=True)
    program = tmp_path / "check"
    subprocess.run([compiler, *flags, str(HERE / "ops_check.cpp"), *objects, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS portable" in done.stdout
