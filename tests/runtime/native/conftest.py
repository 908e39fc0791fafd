"""The variants of the CPU library, one after the other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("cpu_cases")
sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from cpu_store import available, cpu_library  # noqa: E402


@pytest.fixture
def variant_is_put_back() -> Iterator[None]:
    before = cpu_library().variant
    yield
    cpu_library().use(before)


@pytest.fixture(params=available())
def variant(request: pytest.FixtureRequest) -> str:
    cpu_library().use(request.param)
    return str(request.param)
