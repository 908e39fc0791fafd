"""Values predicted from their own layer's keys, and layers that are rebuilt, with the CUDA kernels run on the CPU."""

from __future__ import annotations

import sys
from ctypes import byref
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime import kvrt

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from cpu_store import predicting
from kernel_checks import SCALAR, SCHEDULES, TENSOR, Emulated, check_predicted, pair, queries, tokens

pytestmark = pytest.mark.usefixtures("stores_use_it")

TOKEN, CHANNEL = KVFormat(3, "token", 32), KVFormat(4, "channel", 32, False)


@pytest.mark.parametrize("variant", [SCALAR, TENSOR])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("rope", ["before", "after"])
def test_absorbed(rope: Any, group: int, dim: int, variant: str) -> None:
    layer = LayerPlan(2, dim, TOKEN, TOKEN, rope=rope, transform="hadamard", center=True)
    plan = CachePlan((layer,), sink_tokens=2, residual_window=5, block_size=32)
    check_predicted(plan, ((70, 3), (1, 50)), group=group, variant=variant)
