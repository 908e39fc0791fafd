"""Appending with the CPU library: pages are the reference's, byte for byte."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from cpu_cases import VARIANTS, assert_same_storage, feed, pair, plans, tokens
from cpu_store import cpu_library

pytestmark = pytest.mark.usefixtures("variant_is_put_back")

# once had a group whose codes depend on the last bit of its standard deviation, which torch.sqrt got wrong
ODD_ROOT = CachePlan(
    (LayerPlan(1, 64, KVFormat(2, group=8), KVFormat(3, "channel", 16, grid="gaussian"), rope="before"),),
    block_size=16, dtype="float32",
)  # fmt: skip


@given(plans(), st.lists(st.tuples(st.integers(0, 70), st.integers(0, 45), st.integers(0, 3)), min_size=1, max_size=3),
       st.sampled_from(VARIANTS), st.sampled_from((torch.float32, torch.bfloat16, torch.float16)), st.booleans(),
       st.integers(0, 5))  # fmt: skip
@example(ODD_ROOT, [(5, 0, 0), (68, 0, 0)], "portable", torch.float32, False, 5)
@settings(max_examples=80)
def test_pages_are_the_reference_s_bytes(
    plan: CachePlan, steps: list[tuple[int, int, int]], variant: str, dtype: torch.dtype, heads: bool, seed: int
) -> None:
    cpu_library().use(variant)
    store, layer = pair(plan, 3, 256, head_tables=heads)
    for i, counts in enumerate(steps):
        new = [tokens(plan.layers[0], n, seed + 10 * i + r, dtype) for r, n in enumerate(counts)]
        store.append(new)
        for row, kv in enumerate(new):
            feed(layer, row, kv)
    assert_same_storage(store, layer)


@given(plans(), st.sampled_from(VARIANTS))
@settings(max_examples=15)
def test_token_by_token_gives_the_same_bytes(plan: CachePlan, variant: str) -> None:
    cpu_library().use(variant)
    store, layer = pair(plan, 1, 128)
    kv = tokens(plan.layers[0], 85)
    for t in range(85):
        store.append([kv[:, :, t : t + 1]])
        feed(layer, 0, kv[:, :, t : t + 1])
    assert_same_storage(store, layer)


def test_threads_do_not_change_pages(variant: str) -> None:
    plan = CachePlan((LayerPlan(3, 64, KVFormat(4), KVFormat(3, "channel", 16), transform="hadamard"),))
    stores = [pair(plan, 2, 512)[0] for _ in range(2)]
    new = [tokens(plan.layers[0], 400, r) for r in range(2)]
    stores[0].append(new)
    stores[1].append(new, threads=3)
    assert torch.equal(stores[0].pages, stores[1].pages)
    assert torch.equal(stores[0].tail.nan_to_num(), stores[1].tail.nan_to_num())


def test_pages_used_in_turn_hold_what_came_last() -> None:
    layer = LayerPlan(1, 64, KVFormat(4), KVFormat(4), kind="sliding", window=24)
    store, plain = (pair(CachePlan((layer,)), 1, 512)[0] for _ in range(2))
    store.tables = (torch.arange(32) % 3).to(torch.int32).view(1, 1, 32)
    kv = tokens(layer, 400)
    for x in (store, plain):
        x.append([kv], threads=4)
    for logical in (22, 23, 24):
        assert torch.equal(store.page(0, logical), plain.page(0, logical))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38, 1e-40])
@pytest.mark.parametrize("fmt", [KVFormat(4), KVFormat(2, "channel", 16, False, scale_dtype="e5m3"),
                                 KVFormat(3, grid="gaussian")], ids=str)  # fmt: skip
def test_unusual_values_only_spoil_their_groups(fmt: KVFormat, value: float) -> None:
    plan = CachePlan((LayerPlan(1, 64, fmt, fmt),))
    store, layer = pair(plan, 1, 64)
    kv = tokens(plan.layers[0], 16)
    kv[:, :, 5, 7] = value
    store.append([kv])
    feed(layer, 0, kv)
    if value == value:  # what a code of NaN is, nobody says
        assert_same_storage(store, layer)
