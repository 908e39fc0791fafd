"""What the tests of speed run on: the native kernels and the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcli.models.loading import LoadedModel, load
from kvcli.runtime import kvrt


@pytest.fixture(scope="module")
def native() -> kvrt.Library:
    try:
        return kvrt.library("cpu")
    except kvrt.NativeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def loaded(tinystories: Path) -> LoadedModel:
    return load(str(tinystories), dtype="float32")
