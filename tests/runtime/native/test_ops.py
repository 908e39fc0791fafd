"""The custom ops compute what the library does, and compilers see through them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from kvcli.models.architectures import LayerGeometry, Rope
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant import transforms
from kvcli.quant.format import KVFormat
from kvcli.runtime import ops
from kvcli.runtime.attention import attend
from kvcli.runtime.native_cache import NativeCache
from kvcli.runtime.packed_layer import PackedLayer

ROPE = Rope(1e4 ** -(torch.arange(32) / 32))


def make(seed: int = 0) -> tuple[CachePlan, NativeCache]:
    layer = LayerPlan(2, 64, KVFormat(4, scale_dtype="e5m3"), KVFormat(3, group=32), transform="hadamard")
    plan = CachePlan((layer,), sink_tokens=2, residual_window=8)
    return plan, NativeCache(plan, (LayerGeometry(2, 6, 64),), capacity=256, rope=ROPE, threads=1)


def step(q, k, v, store, lengths, number: int):
    torch.ops.kvcli.append(k, v, store.pages, store.tail, store.sinks, lengths, number, 0)
    return torch.ops.kvcli.attend(q, store.pages, store.tail, store.sinks, lengths, number, 0) * 2


def test_a_compiled_step_is_one_graph_and_equals_the_reference() -> None:
    plan, cache = make()
    store, number = cache.layers[0], ops.register(cache)
    reference = PackedLayer(plan, 0, rope=ROPE)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    g = torch.Generator().manual_seed(0)
    for _ in range(70):
        q, k, v = (torch.randn(1, heads, 64, generator=g) for heads in (6, 2, 2))
        out = compiled(q, k, v, store, cache.lengths, number)
        cache.advance()
        expected = attend(reference, 0, q[0][:, None], k[0][:, None], v[0][:, None], 64**-0.5)[:, 0]
        torch.testing.assert_close(out[0], expected * 2, atol=3e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_small_ops(dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, 96, generator=g).to(dtype), torch.rand(96, generator=g).to(dtype)
    wide = x.float()
    normal = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(dtype) * w
    torch.testing.assert_close(ops.rms_norm(x, w, 1e-5), normal)
    gate, up = wide.chunk(2, -1)
    torch.testing.assert_close(ops.silu_mul(x), (silu(gate) * up).to(dtype))
    assert torch.equal(ops.hadamard(wide), transforms.hadamard(wide))


def test_schemas_and_fakes() -> None:
    x = torch.randn(3, 64)
    torch.library.opcheck(ops.hadamard, (x,))
    torch.library.opcheck(ops.silu_mul, (x,))
    torch.library.opcheck(ops.rms_norm, (x, torch.ones(64), 1e-5))
    _, cache = make()
    store, number = cache.layers[0], ops.register(cache)
    k, q = torch.randn(1, 2, 64), torch.randn(1, 6, 64)
    kept = ("test_schema", "test_faketensor")
    stored = (store.pages, store.tail, store.sinks, cache.lengths, number, 0)
    torch.library.opcheck(ops.append, (k, k, *stored), test_utils=kept)
    torch.library.opcheck(ops.attend, (q, *stored), test_utils=kept)
