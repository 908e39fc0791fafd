"""The C program in docs/runtime.md compiles without warnings and runs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvcli.runtime import kvrt

ROOT = Path(__file__).parents[3]


def test_the_program_in_the_documentation(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    text = (ROOT / "docs" / "runtime.md").read_text()
    found = re.search(r"```c\n(.*?)```", text, re.DOTALL)
    assert found
    source, program = tmp_path / "example.c", tmp_path / "example"
    source.write_text(found[1])
    library = kvrt.LIBRARIES / "libkvrt_cpu.so"
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'kvcli/runtime/csrc'}"]
    built = subprocess.run(
        [compiler, *flags, str(source), str(library), f"-Wl,-rpath,{kvrt.LIBRARIES}", "-o", str(program)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (built.returncode, built.stderr) == (0, "")
    ran = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    first, last = map(float, ran.stdout.split())
    # 1 in mid-rise 4 bits: the scale is 2/15 rounded to float16, and 15 / 2 of it
    assert abs(first - 1) < 1e-3
    assert abs(last - 1) < 1e-3
