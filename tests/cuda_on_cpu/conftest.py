"""The kernels, compiled for the CPU once, in the place of the CPU library."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

pytest.register_assert_rewrite("kernel_checks")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "runtime" / "native")]  # tests are no package

import cpu_store  # noqa: E402
from kernel_checks import Emulated, built  # noqa: E402


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    if path := os.environ.get("KVCLI_TEST_KVRT_EMULATED"):  # the sanitized run, and mutants
        return Emulated(Path(path))
    return Emulated(built(tmp_path_factory.mktemp("kernels") / "libkvrt_emulated.so"))


@pytest.fixture
def stores_use_it(library: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_store, "cpu_library", lambda: library)
    library.schedule(int(os.environ.get("KVCLI_TEST_SCHEDULE", 0)))
    library.use(None)
