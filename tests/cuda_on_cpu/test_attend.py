"""Attention with the CUDA kernels, run on the CPU, against the plain reference in float64."""

from __future__ import annotations

import sys
from ctypes import byref
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime import kvrt

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from kernel_checks import FORMATS, SCALAR, SCHEDULES, TENSOR, check_attention, means_of, pair, queries, rope_of, tokens

pytestmark = pytest.mark.usefixtures("stores_use_it")


@pytest.mark.parametrize("variant", [SCALAR, TENSOR])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_format(fmt: KVFormat, variant: str) -> None:
    other = FORMATS[(FORMATS.index(fmt) + 11) % len(FORMATS)]
    layer = LayerPlan(1, 64, fmt, other, transform="hadamard", center=True)
    check_attention(CachePlan((layer,), sink_tokens=2), (39,), group=3, variant=variant, splits=2)


@pytest.mark.parametrize("variant", [SCALAR, TENSOR])
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [3, 4, 16])
def test_every_head_size(dim: int, bits: int, variant: str) -> None:
    k, v = KVFormat(bits, "token", dim), KVFormat(bits, "token", 16 if bits == 3 else dim, bits == 16)
    layer = LayerPlan(1, dim, k, v, transform="hadamard", center=True)
    check_attention(CachePlan((layer,), dtype="bfloat16"), (70,), group=2, variant=variant, splits=2)


@pytest.mark.parametrize("variant", [SCALAR, TENSOR])
@pytest.mark.parametrize("group", [1, 3, 4, 8, 12])
def test_query_groups(group: int, variant: str) -> None:
    layer = LayerPlan(2, 64, KVFormat(4), KVFormat(4), transform="hadamard", center=True)
    check_attention(CachePlan((layer,), sink_tokens=4, residual_window=8), (50, 0, 23), group=group, variant=variant,
                    splits=3, head_tables=True)  # fmt: skip


@pytest.mark.parametrize("variant", [SCALAR, TENSOR])
@pytest.mark.parametrize("window", [0, 7, 16])
@pytest.mark.parametrize("block", [16, 32])
def test_lengths_around_borders(block: int, window: int, variant: str) -> None:
    fmt = KVFormat(3, "channel", 16)
    plan = CachePlan((LayerPlan(1, 64, fmt, fmt),), block_size=block, sink_tokens=4, residual_window=window)
    borders = [k * block + w + e - 1 for k, w, e in product((1, 2), (0, window), (-1, 0, 1))]
    check_attention(plan, (*borders, 0, window), group=1, variant=variant, splits=2)


@pytest.mark.parametrize("variant", [SCALAR, TENSOR])
@pytest.mark.parametrize("window", [5, 16, 24, 50])
@pytest.mark.parametrize("bits", [4, 16])
def test_sliding_windows(bits: int, window: int, variant: str) -> None:
    layer = LayerPlan(1, 64, KVFormat(bits), KVFormat(bits, "channel", 16), kind="sliding", window=window, center=True)
    for residual in (0, 20):
        plan = CachePlan((layer,), residual_window=residual)
        check_attention(plan, (10, 47, 90), group=3, variant=variant, splits=3)


@pytest.mark.parametrize("variant", [SCALAR, TENSOR])
@pytest.mark.parametrize(("splits", "split_pages"), [(1, 0), (2, 0), (5, 0), (1, 1), (3, 2), (5, 1)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_splits_and_schedules(splits: int, split_pages: int, schedule: int, variant: str) -> None:
    layer = LayerPlan(1, 64, KVFormat(4), KVFormat(2, "token", 32, False), transform="hadamard", center=True)
    check_attention(CachePlan((layer,), sink_tokens=3), (200, 31), group=3, variant=variant, splits=splits,
                    split_pages=split_pages, schedule=schedule)  # fmt: skip


@pytest.mark.parametrize("variant", [SCALAR, TENSOR])
@pytest.mark.parametrize("parts", [kvrt.PACKED, kvrt.EXACT])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_parts_and_caps(parts: int, softcap: float, variant: str) -> None:
    layer = LayerPlan(1, 64, KVFormat(4), KVFormat(8, "token", 64, False), center=True)
    plan = CachePlan((layer,), sink_tokens=20, residual_window=3)
    check_attention(plan, (45, 5), group=4, variant=variant, parts=parts, softcap=softcap)


@pytest.mark.parametrize("variant", [SCALAR, TENSOR])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_queries(variant: str, dtype: torch.dtype) -> None:
    plan = CachePlan((LayerPlan(2, 64, KVFormat(4), KVFormat(8)),), residual_window=20, dtype=str(dtype)[6:])
    check_attention(plan, (100,), group=3, variant=variant, dtype=dtype)


@pytest.mark.parametrize("variant", [SCALAR, TENSOR])
def test_scaled_rotary_embeddings_and_keys_before_them(variant: str) -> None:
    for rope in ("after", "before"):
        layer = LayerPlan(1, 64, KVFormat(4), KVFormat(4), transform="hadamard", center=True, rope=rope)
        exact = variant if rope == "after" else SCALAR  # keys before RoPE are for the ordinary cores
        check_attention(CachePlan((layer,)), (90,), group=2, variant=exact, rope=rope_of(64, 1.3))


@pytest.mark.parametrize("bits", [32, 4])
def test_exact_storage(bits: int) -> None:
    layer = LayerPlan(1, 64, KVFormat(32), KVFormat(bits), rope="before")
    check_attention(CachePlan((layer,), sink_tokens=2), (90, 3), group=2, variant=SCALAR, splits=2)


@pytest.mark.parametrize("variant", [SCALAR, TENSOR])
def test_fixed_cuts_give_the_same_bits(variant: str) -> None:
    fmt = KVFormat(4, "token", 32)
    layer = LayerPlan(1, 64, fmt, fmt, transform="hadamard", center=True)
    plan, q = CachePlan((layer,)), queries(2, 3, 64)
    kv = [tokens(layer, n, n) for n in (150, 90)]
    stores = [pair(plan, b, 256, 3)[0] for b in (2, 1)]
    stores[0].library.use(variant)
    for store, some in zip(stores, (kv, kv[:1]), strict=True):
        store.append(some)
        store.append([tokens(layer, 1, r) for r in range(len(some))], advance=False)
    for split_pages in (1, 3):
        results = [stores[0].attend(q, splits=s, split_pages=split_pages) for s in (1, 2, 7)]
        results.append(stores[1].attend(q[:1], splits=5, split_pages=split_pages))
        for other, name in product(results[1:], results[0]):
            width = other[name].shape[-1] if name != "mass" else 151
            assert torch.equal(other[name][0, ..., :width], results[0][name][0, ..., :width]), name


@pytest.mark.parametrize("rope", ["before", "after"])
@pytest.mark.parametrize("window", [None, 24])
def test_positions_may_be_given(rope: Any, window: int | None) -> None:
    # two thirds of the slots were evicted: slot i holds position 3 i, and a window counts positions
    kind: Any = "full" if window is None else "sliding"
    spec = LayerPlan(1, 64, KVFormat(8), KVFormat(8), kind=kind, window=window, rope=rope, center=True)
    plan = CachePlan((spec,), residual_window=4)
    n, kv = 50, tokens(spec, 50)
    store, _ = pair(plan, 1, 256, 3)
    store.positions = (3 * torch.arange(64, dtype=torch.int32)).view(1, 64).contiguous()
    store.append([kv], advance=False)
    store.lengths += n - 1
    q = queries(1, 3, 64)
    a = store.attend_args(q)
    at = torch.tensor([3 * (n - 1)], dtype=torch.int32)
    a.query_positions = at.data_ptr()
    store.library.call("attend", byref(store.struct), byref(a), None)
    boundary = plan.boundary(0, n)
    k, v = torch.cat((store.expand(0, 0, boundary), kv[:, :, boundary:].half().float()), dim=2)[:, 0]
    scores = (q[0] @ k.T).double() * 64**-0.5
    if window is not None:
        scores[:, 3 * torch.arange(n) <= 3 * (n - 1) - window] = -torch.inf
    torch.testing.assert_close(a.results["out"][0].double(), scores.softmax(-1) @ v.double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(a.results["mass"][0, :, :n].double(), scores.softmax(-1), rtol=0, atol=2e-5)
    plain = store.expand(0, 0, boundary, before=True)[0]
    weights = scores.softmax(-1)[:, :boundary]
    expected = torch.einsum("hs,jsd->hjd", weights, plain.double())
    torch.testing.assert_close(a.results["key_sum"][0].double(), expected, rtol=0, atol=1e-4)
    # and the codes are those of keys turned back from these positions
    mean = means_of(spec)["layer.0.k.mean"][0]
    back = store.rope.unrotate(kv[0, 0, :boundary].half().float(), store.positions[0, :boundary].long())
    torch.testing.assert_close(plain[0], back, rtol=0, atol=0.02 * float((back - mean).abs().max()))
