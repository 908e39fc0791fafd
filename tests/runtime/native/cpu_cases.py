"""Plans, tokens and queries for the CPU library, and what its pages and results are compared with."""

from __future__ import annotations

from typing import Any, Literal

import torch
from cpu_store import Store, available, cpu_library, means_of, rope_of
from hypothesis import strategies as st
from torch import Tensor

from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.packed_layer import PackedLayer

VARIANTS = available()
INVALID, UNSUPPORTED = "invalid argument", "not supported"


def bound() -> float:
    """Error of an output relative to the largest value: the wide kernels take queries and weights to 16 bits."""
    return 5e-4 if cpu_library().variant == "avx512" else 2e-5


def tokens(layer: LayerPlan, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Keys and values, [2, heads, n, dim]: channels and tokens of very different size, and now and then a zero."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, layer.num_kv_heads, n, layer.head_dim, generator=g) * torch.linspace(0.3, 3, layer.head_dim)
    x = x * torch.rand(n, 1, generator=g).mul(4).exp2() / 4
    if n > 3:
        x[:, :, 2] = 0  # an empty group has a scale of zero
        x[:, :, 3] *= 1e-6  # and a tiny one a subnormal scale
    x[0] *= 0.3  # scores as a model has them: a softmax that is not one token's
    return x.to(dtype)


def queries(batch: int, heads: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, heads, dim, generator=torch.Generator().manual_seed(seed + 100))


@st.composite
def formats(draw: st.DrawFn, dim: int, block: int) -> KVFormat:
    bits = draw(st.sampled_from((2, 3, 4, 8, 4, 16)))
    if bits == 16:
        return KVFormat(16)
    axis: Literal["token", "channel"] = draw(st.sampled_from(("token", "channel")))
    size = dim if axis == "token" else block
    group = draw(st.sampled_from([g for g in (8, 16, 32, 64, size) if size % g == 0]))
    scale = draw(st.sampled_from(("float16", "e5m3")))
    kind = draw(st.sampled_from(("symmetric", "asymmetric", "gaussian")))
    if kind == "gaussian" and bits < 8:
        return KVFormat(bits, axis, group, grid="gaussian", scale_dtype=scale)
    return KVFormat(bits, axis, group, kind != "asymmetric", scale_dtype=scale)


@st.composite
def plans(draw: st.DrawFn) -> CachePlan:
    dim = draw(st.sampled_from((16, 64, 80, 96, 128)))
    block = draw(st.sampled_from((16, 32, 64)))
    window = draw(st.sampled_from((None, None, None, 5, 24, 50)))
    layer = LayerPlan(
        draw(st.integers(1, 3)), dim, draw(formats(dim, block)), draw(formats(dim, block)),
        kind="full" if window is None else "sliding", window=window, rope=draw(st.sampled_from(("before", "after"))),
        transform=draw(st.sampled_from(("none", "hadamard"))), center=draw(st.booleans()),
    )  # fmt: skip
    return CachePlan(
        (layer,), block_size=block, sink_tokens=draw(st.sampled_from((0, 0, 1, 4, 20))),
        residual_window=draw(st.sampled_from((0, 0, 1, 7, 20, 40))),
        dtype=draw(st.sampled_from(("float32", "float16", "bfloat16"))),
    )  # fmt: skip


def pair(plan: CachePlan, batch: int, capacity: int, group: int = 1, **options: Any) -> tuple[Store, PackedLayer]:
    layer = plan.layers[0]
    rope, means = rope_of(layer.head_dim), means_of(layer)
    store = Store(
        plan, rope=rope, tensors=means, batch=batch, capacity=capacity, num_heads=group * layer.num_kv_heads, **options
    )
    return store, PackedLayer(plan, 0, batch_size=batch, rope=rope, tensors=means)


def feed(layer: PackedLayer, row: int, kv: Tensor) -> None:
    if kv.shape[2]:
        layer.append(row, layer.exact(row, kv[0], kv[1]))


def assert_same_storage(store: Store, layer: PackedLayer) -> None:
    for row in range(len(layer.lengths)):
        n = layer.lengths[row]
        assert int(store.lengths[row]) == n
        for logical, page in enumerate(layer.block_tables[row]):
            if page >= 0:
                assert torch.equal(store.page(row, logical), layer.pages[page]), f"page {logical} of sequence {row}"
        kept = n - layer.boundary(n)
        assert torch.equal(store.tail_of(row), layer.tail[:, row, :, :kept])
        sinks = min(n, layer.sinks.shape[3])
        assert torch.equal(store.sinks[int(store.slots[row])][:, :, :sinks], layer.sinks[:, row, :, :sinks])


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], values: Tensor, row: int) -> None:
    scale = {"out": float(values[1].abs().max()), "key_sum": float(values[0].abs().max()) + 1}
    for name, x in expected.items():
        torch.testing.assert_close(
            found[name][row].double(), x, rtol=1e-5 if name == "lse" else 0,
            atol=bound() * max(1e-3, scale.get(name, 1)), msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip
