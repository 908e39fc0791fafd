"""Attention with the CPU library against the plain reference in float64."""

from __future__ import annotations

import sys
from ctypes import byref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime import kvrt
from kvcli.runtime.attention import attend
from kvcli.runtime.packed_layer import PackedLayer

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from cpu_cases import VARIANTS, assert_close, bound, feed, means_of, pair, plans, queries, rope_of, tokens
from cpu_store import Store, cpu_library, reference

pytestmark = pytest.mark.usefixtures("variant_is_put_back")


@given(plans(), st.tuples(st.integers(0, 200), st.integers(0, 40), st.just(0)), st.integers(1, 8), st.integers(1, 4),
       st.sampled_from((0, 0, 1, 2)), st.sampled_from((3, 3, 1, 2)), st.sampled_from(VARIANTS), st.booleans(),
       st.sampled_from((0.0, 0.0, 5.0)))  # fmt: skip
@settings(max_examples=60)
def test_attention_equals_the_reference(
    plan: CachePlan, lengths: tuple[int, ...], group: int, splits: int, split_pages: int, parts: int, variant: str,
    heads: bool, softcap: float,
) -> None:  # fmt: skip
    cpu_library().use(variant)
    spec = plan.layers[0]
    store, layer = pair(plan, 3, 256, group, head_tables=heads, softcap=softcap)
    before = [tokens(spec, n, r) for r, n in enumerate(lengths)]
    if any(lengths):
        store.append(before)
    new = [tokens(spec, 1, 50 + r) for r in range(3)]
    store.append(new, advance=False)
    q = queries(3, store.num_heads, spec.head_dim)
    found = store.attend(q, parts=parts, splits=splits, split_pages=split_pages)
    width = found["mass"].shape[-1]
    for row in range(3):
        feed(layer, row, before[row])
        feed(layer, row, new[row])
        expected = reference(layer, row, q[row], rope=store.rope, parts=parts, softcap=softcap, width=width)
        assert_close(found, expected, torch.cat((before[row], new[row]), 2), row)


@given(plans(), st.integers(1, 4), st.sampled_from(VARIANTS))
@settings(max_examples=15)
def test_decoding_equals_kvcli_s_attention(plan: CachePlan, group: int, variant: str) -> None:
    cpu_library().use(variant)
    spec = plan.layers[0]
    store, layer = pair(plan, 1, 128, group)
    kv = tokens(spec, 90)
    store.append([kv[:, :, :20]])
    feed(layer, 0, kv[:, :, :20])
    layer.release(0)
    scale = float(kv[1].abs().max())
    for t in range(20, 90):
        q, new = queries(1, store.num_heads, spec.head_dim, t), kv[:, :, t : t + 1]
        store.append([new], advance=False)
        found = store.attend(q, splits=2)["out"][0]
        store.lengths += 1
        expected = attend(layer, 0, q[0][:, None], new[0], new[1], spec.head_dim**-0.5)[:, 0]
        torch.testing.assert_close(found, expected, rtol=0, atol=bound() * scale)


@given(plans(), st.sampled_from(VARIANTS))
@settings(max_examples=20)
def test_parts_merge_by_their_log_sums(plan: CachePlan, variant: str) -> None:
    cpu_library().use(variant)
    spec = plan.layers[0]
    store, _ = pair(plan, 1, 256, 2)
    store.append([tokens(spec, 130)])
    store.append([tokens(spec, 1, 9)], advance=False)
    q = queries(1, store.num_heads, spec.head_dim)
    both, packed, exact = (store.attend(q, parts=p) for p in (kvrt.ALL, kvrt.PACKED, kvrt.EXACT))
    lse = torch.logaddexp(packed["lse"], exact["lse"])
    torch.testing.assert_close(lse, both["lse"], rtol=1e-5, atol=2e-5)
    merged = sum(x["out"] * (x["lse"] - lse).exp()[..., None] for x in (packed, exact))
    torch.testing.assert_close(merged, both["out"], rtol=0, atol=1e-5 * 40)


@given(plans(), st.sampled_from(VARIANTS), st.sampled_from((1, 3)))
@settings(max_examples=20)
def test_fixed_cuts_give_the_same_bits(plan: CachePlan, variant: str, split_pages: int) -> None:
    cpu_library().use(variant)
    spec = plan.layers[0]
    q = queries(3, 2 * spec.num_kv_heads, spec.head_dim)
    kv = [tokens(spec, n, n) for n in (200, 90, 31)]
    stores = [pair(plan, b, 256, 2)[0] for b in (3, 1)]
    for store, some in zip(stores, (kv, kv[:1]), strict=True):
        store.append(some)
        store.append([tokens(spec, 1, r) for r in range(len(some))], advance=False)
    results = [stores[0].attend(q, splits=s, split_pages=split_pages, threads=t) for s in (1, 2, 7) for t in (1, 3)]
    results.append(stores[1].attend(q[:1], splits=5, split_pages=split_pages))
    for other in results[1:]:
        for name, x in other.items():
            width = x.shape[-1] if name != "mass" else 201
            assert torch.equal(x[0, ..., :width], results[0][name][0, ..., :width]), name


def test_threads_and_splits_agree(variant: str) -> None:
    plan = CachePlan((LayerPlan(2, 128, KVFormat(4), KVFormat(4), transform="hadamard", center=True),))
    store, layer = pair(plan, 2, 1024, 4)
    kv = [tokens(plan.layers[0], n, n) for n in (1000, 333)]
    store.append(kv, advance=False)
    store.lengths += torch.tensor([999, 332], dtype=torch.int32)
    q = queries(2, 8, 128)
    for row in range(2):
        feed(layer, row, kv[row])
    for splits, threads in ((1, 1), (5, 1), (16, 3), (16, 0)):
        found = store.attend(q, splits=splits, threads=threads)
        for row in range(2):
            expected = reference(layer, row, q[row], rope=store.rope, width=found["mass"].shape[-1])
            assert_close(found, expected, kv[row], row)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_queries(variant: str, dtype: torch.dtype) -> None:
    plan = CachePlan((LayerPlan(2, 64, KVFormat(4), KVFormat(8)),), residual_window=20, dtype="float16")
    store, layer = pair(plan, 1, 256, 3)
    kv = tokens(plan.layers[0], 150, dtype=dtype)
    store.append([kv], advance=False)
    store.lengths += 149
    feed(layer, 0, kv)
    q = queries(1, 6, 64).to(dtype)
    found = store.attend(q)
    expected = reference(layer, 0, q[0], rope=store.rope, width=found["mass"].shape[-1])
    torch.testing.assert_close(found["out"][0], expected["out"].to(dtype), rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(found["lse"][0].double(), expected["lse"], rtol=1e-5, atol=bound())


@pytest.mark.parametrize("rope", ["before", "after"])
@pytest.mark.parametrize("window", [None, 24])
def test_positions_may_be_given(variant: str, rope: Any, window: int | None) -> None:
    # two thirds of the slots were evicted: slot i holds position 3 i, and a window counts positions
    kind: Any = "full" if window is None else "sliding"
    spec = LayerPlan(1, 64, KVFormat(8), KVFormat(8), kind=kind, window=window, rope=rope, center=True)
    plan = CachePlan((spec,), residual_window=4)
    n, kv = 50, tokens(spec, 50)
    store, _ = pair(plan, 1, 256, 2)
    store.positions = (3 * torch.arange(64, dtype=torch.int32)).view(1, 64).contiguous()
    store.append([kv], advance=False)
    store.lengths += n - 1
    q = queries(1, 2, 64)
    a = store.attend_args(q)
    at = torch.tensor([3 * (n - 1)], dtype=torch.int32)
    a.query_positions = at.data_ptr()
    store.library.call("attend", byref(store.struct), byref(a), None)
    boundary = plan.boundary(0, n)
    k, v = torch.cat((store.expand(0, 0, boundary), kv[:, :, boundary:].half().float()), dim=2)[:, 0]
    scores = (q[0] @ k.T).double() * 64**-0.5
    if window is not None:
        scores[:, 3 * torch.arange(n) <= 3 * (n - 1) - window] = -torch.inf
    error = bound() * float(v.abs().max())
    torch.testing.assert_close(a.results["out"][0].double(), scores.softmax(-1) @ v.double(), rtol=0, atol=error)
    torch.testing.assert_close(a.results["mass"][0, :, :n].double(), scores.softmax(-1), rtol=0, atol=bound())
    plain = store.expand(0, 0, boundary, before=True)[0]
    weights = scores.softmax(-1)[:, :boundary]
    expected = torch.einsum("hs,jsd->hjd", weights, plain.double())
    torch.testing.assert_close(a.results["key_sum"][0].double(), expected, rtol=0, atol=1e-4)
    # and the codes are those of keys turned back from these positions
    mean = means_of(spec)["layer.0.k.mean"][0]
    back = store.rope.unrotate(kv[0, 0, :boundary].half().float(), store.positions[0, :boundary].long())
    torch.testing.assert_close(plain[0], back, rtol=0, atol=0.02 * float((back - mean).abs().max()))


def test_heads_may_be_of_unequal_length(variant: str) -> None:
    spec = LayerPlan(2, 64, KVFormat(4), KVFormat(4))
    q, lengths = queries(2, 6, 64), torch.tensor([[39, 70], [88, 0]], dtype=torch.int32)

    def run(each: Tensor) -> tuple[Store, dict[str, Tensor]]:
        store, _ = pair(CachePlan((spec,)), 2, 128, 3, head_tables=True)
        store.append([tokens(spec, 90, r) for r in range(2)], advance=False)
        store.head_lengths, store.lengths = each, each.amax(1).int()
        store.append([tokens(spec, 1, 7)] * 2, advance=False)
        return store, store.attend(q)

    store, found = run(lengths)
    for row in range(2):
        for head in range(2):
            alone, expected = run(torch.full_like(lengths, int(lengths[row, head])))
            mine = slice(3 * head, 3 * head + 3)
            for name in ("out", "lse", "packed_mass"):
                assert torch.equal(found[name][row, mine], expected[name][row, mine])
            assert torch.equal(store.expand(row, 0, 90)[:, head], alone.expand(row, 0, 90)[:, head])


def test_scaled_rotary_embeddings(variant: str) -> None:
    spec = LayerPlan(1, 64, KVFormat(4), KVFormat(4), center=True)
    plan, rope = CachePlan((spec,)), rope_of(64, 1.3)
    store = Store(plan, rope=rope, tensors=means_of(spec), batch=1, capacity=256, num_heads=2)
    layer = PackedLayer(plan, 0, rope=rope, tensors=means_of(spec))
    kv = tokens(spec, 200)
    store.append([kv], advance=False)
    store.lengths += 199
    feed(layer, 0, kv)
    q = queries(1, 2, 64)
    found = store.attend(q)
    assert_close(found, reference(layer, 0, q[0], rope=rope, width=found["mass"].shape[-1]), kv, 0)
