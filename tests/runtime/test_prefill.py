"""Attention of chunks against the plain reference on the same keys and values: where each query looks, to the digit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvcli.models.architectures import LayerGeometry, Rope
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime import kvrt, prefill
from kvcli.runtime.attention import attend
from kvcli.runtime.native_cache import NativeCache
from kvcli.runtime.packed_layer import PackedLayer
from kvcli.runtime.prefill import ChunkAttention, TokenAttention

HEADS, KV_HEADS, DIM, TOKENS = 6, 2, 16, 210
TOKEN4, TOKEN8 = KVFormat(4, group=8), KVFormat(8, group=8)
CHANNEL2 = KVFormat(2, "channel", 16, symmetric=False)
ROPE = Rope(10000.0 ** -(torch.arange(0, DIM, 2) / DIM))
CASES: dict[str, dict[str, Any]] = {
    "exact": {"k": KVFormat(16), "v": KVFormat(16)},
    "portable": {"k": TOKEN8, "v": TOKEN4},
    "window": {"k": TOKEN8, "v": TOKEN8, "residual_window": 8},
    "no window": {"k": CHANNEL2, "v": CHANNEL2},
    "wide": {"k": TOKEN8, "v": TOKEN4, "sink_tokens": 70, "residual_window": 50, "block_size": 64},
    "everything": {
        "k": CHANNEL2, "v": TOKEN4, "sink_tokens": 4, "residual_window": 8,
        "rope": "before", "center": True, "transform": "hadamard",
    },
}  # fmt: skip

try:
    kvrt.library("cpu")
except kvrt.NativeError as error:
    pytest.skip(f"needs the native kernels: {error}", allow_module_level=True)


def make(case: dict[str, Any], window: int | None) -> tuple[NativeCache, PackedLayer]:
    fields = dict(case)
    shared = {x: fields.pop(x) for x in ("sink_tokens", "residual_window", "block_size") if x in fields}
    kind: Any = "sliding" if window else "full"
    plan = CachePlan((LayerPlan(KV_HEADS, DIM, kind=kind, window=window, **fields),), **shared)
    generator = torch.Generator().manual_seed(1)
    tensors = {f"layer.0.{w}.mean": torch.randn(KV_HEADS, DIM, generator=generator) for w in "kv"}
    geometry = (LayerGeometry(KV_HEADS, HEADS, DIM, kind, window),)
    cache = NativeCache(plan, geometry, capacity=TOKENS, batch_size=2, rope=ROPE, tensors=tensors, threads=1)
    return cache, PackedLayer(plan, 0, rope=ROPE, tensors=tensors)


def random_qkv() -> tuple[Tensor, Tensor, Tensor]:
    """[tokens, heads, DIM] each, in one buffer as a projection leaves them."""
    qkv = torch.randn(TOKENS, HEADS + 2 * KV_HEADS, DIM, generator=torch.Generator().manual_seed(0))
    q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], 1)
    return q, k, v


def reference(layer: PackedLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(layer, 0, q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), DIM**-0.5).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 1, 7, 24, 100])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [TOKENS, 64, 33, 5])
def test_a_chunk_sees_what_the_reference_sees(
    case: str, window: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "SEGMENT", 80)
    monkeypatch.setattr(prefill, "QUERY_BLOCK", 50)
    cache, layer = make(CASES[case], window)
    q, k, v = random_qkv()
    run = ChunkAttention(cache, chunk, torch.float32)
    positions = torch.arange(TOKENS, dtype=torch.int32)
    for begin in range(0, TOKENS, chunk):
        part = slice(begin, begin + chunk)
        expected = reference(layer, q[part], k[part], v[part])
        found = torch.full_like(expected, torch.nan).contiguous()
        run.begin(positions[part])
        run(0, 1, q[part], k[part], v[part], found)
        cache.advance(len(found), 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("native", [False, True])
def test_torch_and_the_kernel_attend_alike(native: bool, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "SEGMENT", 80)
    cache, layer = make(CASES["everything"], window)
    q, k, v = random_qkv()
    run, found = ChunkAttention(cache, TOKENS, torch.float32), torch.full_like(q, torch.nan).contiguous()
    run._native = native
    run.begin(torch.arange(TOKENS, dtype=torch.int32))
    run(0, 1, q, k, v, found)
    torch.testing.assert_close(found, reference(layer, q, k, v), rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("case", CASES)
def test_token_by_token_sees_the_same(case: str, window: int | None) -> None:
    cache, layer = make(CASES[case], window)
    q, k, v = random_qkv()
    expected = reference(layer, q, k, v)
    found, run = torch.full_like(q, torch.nan).contiguous(), TokenAttention(cache, TOKENS, torch.float32)
    run.begin(torch.arange(TOKENS, dtype=torch.int32))
    run(0, 1, q, k, v, found)
    # the AVX-512 kernel sums channel-axis values at less than float32's precision; the portable one agrees to 1e-6
    coarse = CASES[case]["v"].axis == "channel"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 if coarse else 2e-5)
