"""Appending with the CUDA kernels, run on the CPU: pages are the reference's, byte for byte."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from kernel_checks import FORMATS, SCHEDULES, Emulated, assert_same_storage, check_token_by_token, feed, pair, tokens

pytestmark = pytest.mark.usefixtures("stores_use_it")


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("options", [{}, {"transform": "hadamard", "center": True}, {"rope": "before", "center": True}],
                         ids=["plain", "centred", "before-rope"])  # fmt: skip
def test_pages_are_the_reference_s_bytes(fmt: KVFormat, options: dict[str, Any]) -> None:
    plan = CachePlan((LayerPlan(2, 64, fmt, fmt, **options),), sink_tokens=4, residual_window=5, dtype="bfloat16")
    store, layer = pair(plan, 3, 128)
    for i, counts in enumerate(((40, 3, 0), (1, 1, 1), (16, 30, 1))):
        new = [tokens(plan.layers[0], n, 10 * i + r) for r, n in enumerate(counts)]
        store.append(new)
        for row, kv in enumerate(new):
            feed(layer, row, kv)
    assert_same_storage(store, layer)


@pytest.mark.parametrize(("dim", "group", "bits"), [
    (80, 80, 4), (80, 16, 3), (80, 5, 2), (16, 16, 3), (256, 256, 4), (8, 8, 2), (96, 96, 8), (24, 4, 3),
])  # fmt: skip
def test_head_sizes(dim: int, group: int, bits: int) -> None:
    grid = "uniform" if bits == 8 else "gaussian"
    k, v = KVFormat(bits, "token", group, grid=grid), KVFormat(bits, "channel", 32, False)
    plan = CachePlan((LayerPlan(1, dim, k, v, transform="hadamard", center=True),), block_size=32)
    store, layer = pair(plan, 1, 128)
    for i, count in enumerate((45, 33)):
        kv = tokens(plan.layers[0], count, i)
        store.append([kv])
        feed(layer, 0, kv)
    assert_same_storage(store, layer)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("window", [0, 1, 7, 20])
def test_token_by_token(window: int, schedule: int, library: Emulated) -> None:
    check_token_by_token(window, schedule, library)


def test_pages_used_in_turn_hold_what_came_last() -> None:
    layer = LayerPlan(1, 64, KVFormat(4), KVFormat(4), kind="sliding", window=24)
    store, plain = (pair(CachePlan((layer,)), 1, 256)[0] for _ in range(2))
    store.tables = (torch.arange(16) % 3).to(torch.int32).view(1, 1, 16)
    kv = tokens(layer, 192)
    store.append([kv])
    plain.append([kv])
    for logical in (9, 10, 11):
        assert torch.equal(store.page(0, logical), plain.page(0, logical))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, 3e38, 1e-40])
@pytest.mark.parametrize("fmt", [KVFormat(4), KVFormat(2, "channel", 16, False, scale_dtype="e5m3"),
                                 KVFormat(3, grid="gaussian")], ids=str)  # fmt: skip
def test_unusual_values(fmt: KVFormat, value: float) -> None:
    plan = CachePlan((LayerPlan(1, 64, fmt, fmt),))
    store, layer = pair(plan, 1, 64)
    kv = tokens(plan.layers[0], 16)
    kv[:, :, 5, 7] = value
    store.append([kv])
    feed(layer, 0, kv)
    assert_same_storage(store, layer)
