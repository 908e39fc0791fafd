"""The CPU library against the plain reference: pages byte for byte, attention in float64, and every error."""

from __future__ import annotations

import os
import subprocess
import sys
from ctypes import byref
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcli.models.architectures import Rope
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant import transforms
from kvcli.quant.format import KVFormat
from kvcli.runtime import kvrt
from kvcli.runtime.attention import attend
from kvcli.runtime.packed_layer import PackedLayer

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from cpu_store import Store, available, cpu_library, reference

VARIANTS = available()
INVALID, UNSUPPORTED = "invalid argument", "not supported"


@pytest.fixture(autouse=True)
def _variant_is_put_back():
    before = cpu_library().variant
    yield
    cpu_library().use(before)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    cpu_library().use(request.param)
    return str(request.param)


def bound() -> float:
    """Error of an output relative to the largest value: the wide kernels take queries and weights to 16 bits."""
    return 5e-4 if cpu_library().variant == "avx512" else 2e-5


def rope_of(dim: int, scaling: float = 1.0) -> Rope:
    return Rope(10000.0 ** -(torch.arange(0, dim, 2) / dim), scaling)


def means_of(layer: LayerPlan) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    return {f"layer.0.{w}.mean": torch.randn(layer.num_kv_heads, layer.head_dim, generator=g) for w in "kv"}


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


# --- append ---------------------------------------------------------------------------------------------------------


@given(plans(), st.lists(st.tuples(st.integers(0, 70), st.integers(0, 45), st.integers(0, 3)), min_size=1, max_size=3),
       st.sampled_from(VARIANTS), st.sampled_from((torch.float32, torch.bfloat16, torch.float16)), st.booleans(),
       st.integers(0, 5))  # fmt: skip
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


# --- attend ---------------------------------------------------------------------------------------------------------


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], values: Tensor, row: int) -> None:
    scale = {"out": float(values[1].abs().max()), "key_sum": float(values[0].abs().max()) + 1}
    for name, x in expected.items():
        torch.testing.assert_close(
            found[name][row].double(), x, rtol=1e-5 if name == "lse" else 0,
            atol=bound() * max(1e-3, scale.get(name, 1)), msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


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


# --- expand ---------------------------------------------------------------------------------------------------------


@given(plans(), st.integers(1, 200), st.sampled_from(VARIANTS), st.data())
@settings(max_examples=40)
def test_expanding_equals_reading(plan: CachePlan, n: int, variant: str, data: st.DataObject) -> None:
    cpu_library().use(variant)
    store, layer = pair(plan, 2, 256)
    kv = [tokens(plan.layers[0], m, m) for m in (3, n)]
    store.append(kv)
    for row in range(2):
        feed(layer, row, kv[row])
    boundary = layer.boundary(n)
    if not boundary:
        return
    first = data.draw(st.integers(0, boundary - 1))
    count = data.draw(st.integers(1, boundary - first))
    k, v, _ = layer.read(1)
    found = store.expand(1, first, count)
    for x, expected in zip(found, (k, v), strict=True):
        torch.testing.assert_close(x, expected[:, first : first + count].float(), rtol=1e-6, atol=1e-6)
    before = store.expand(1, first, count, before=True)[0]
    expected = store.rope.unrotate(k[:, first : first + count].float(), torch.arange(first, first + count))
    torch.testing.assert_close(before, expected, rtol=1e-5, atol=1e-5)
    sinks = layer.sinks[:, 1, :, first : min(layer.sinks.shape[3], first + count)].float()
    whole = store.expand(1, first, count, with_sinks=True)
    assert torch.equal(whole[:, :, : sinks.shape[2]], sinks)
    assert torch.equal(whole[:, :, sinks.shape[2] :], found[:, :, sinks.shape[2] :])
    assert torch.equal(store.expand(1, first, count, torch.bfloat16), found.bfloat16())
    assert torch.equal(store.expand(1, first, count, torch.float16, threads=2), found.half())


# --- the small operations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5, 700])
@pytest.mark.parametrize("dim", [8, 16, 64, 80, 96, 128, 256])
def test_hadamard_is_the_reference_s_bit_for_bit(variant: str, dim: int, rows: int) -> None:
    x = queries(1, rows, dim)[0]
    out = torch.empty_like(x)
    cpu_library().call("hadamard", out.data_ptr(), x.data_ptr(), rows, dim, byref(kvrt.Exec(2, 0)))
    assert torch.equal(out, transforms.hadamard(x))
    cpu_library().call("hadamard", x.data_ptr(), x.data_ptr(), rows, dim, None)
    assert torch.equal(out, x)


TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    torch.float16: {"rtol": 2e-3, "atol": 1e-4},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-3},
}


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rms_norm_and_silu(dtype: torch.dtype, rows: int) -> None:
    width = 200
    x, residual = queries(2, rows, width).to(dtype)
    weight = (queries(1, 1, width, 5)[0, 0] + 1).to(dtype)
    y, kept = torch.empty_like(x), residual.clone()
    library, run = cpu_library(), byref(kvrt.Exec(2, 0))
    for res in (None, kept):
        library.call("rms_norm", y.data_ptr(), x.data_ptr(), kvrt.pointer(res), weight.data_ptr(), rows, width, 1e-5,
                     kvrt.DTYPES[dtype], run)  # fmt: skip
        total = x if res is None else residual + x
        wide = total.float()
        expected = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(dtype)
        torch.testing.assert_close(y, expected, **TOLERANCE[dtype])
    assert torch.equal(kept, residual + x)
    both = torch.cat((x * 8, residual), dim=-1).contiguous()
    library.call("silu_mul", y.data_ptr(), both.data_ptr(), rows, width, kvrt.DTYPES[dtype], run)
    gate, up = both.float().chunk(2, -1)
    torch.testing.assert_close(y, (torch.nn.functional.silu(gate) * up).to(dtype), **TOLERANCE[dtype])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rope_with_and_without_norms(dtype: torch.dtype, norm: bool) -> None:
    rope, positions = rope_of(64), torch.tensor([3, 0, 99], dtype=torch.int32)
    qkv = queries(3, 6 + 2 * 2, 64).to(dtype)
    weights = (queries(2, 1, 64, 1)[:, 0] + 1).to(dtype)
    table = rope.table(128)[:128].contiguous()
    expected = qkv.clone()
    for part, weight in ((slice(0, 6), weights[0]), (slice(6, 8), weights[1])):
        x = qkv[:, part]
        if norm:
            wide = x.float()
            x = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(dtype)
        expected[:, part] = rope.rotate(x.float(), positions.long()[:, None]).to(dtype)
    arguments = [positions.data_ptr(), table.data_ptr(), 128, *(kvrt.pointer(w) if norm else None for w in weights)]
    cpu_library().call("rope", qkv.data_ptr(), *arguments, 1e-6, 3, 6, 2, 64, kvrt.DTYPES[dtype], None)
    torch.testing.assert_close(qkv, expected, **TOLERANCE[dtype])
    arguments[2] = 99
    with pytest.raises(kvrt.NativeError, match=INVALID):
        cpu_library().call("rope", qkv.data_ptr(), *arguments, 1e-6, 3, 6, 2, 64, kvrt.DTYPES[dtype], None)


# --- what the library says of itself, and what it refuses -----------------------------------------------------------


def test_variants() -> None:
    library = cpu_library()
    assert library.kind == "cpu"
    assert list(library.variants()) == ["avx512", "avx2", "portable"]
    assert library.variants()["portable"] is None
    for name, reason in library.variants().items():
        if reason is None:
            library.use(name)
            assert library.variant == name
        else:
            with pytest.raises(kvrt.NativeError, match=UNSUPPORTED):
                library.use(name)
    library.use(None)
    assert library.variant == VARIANTS[0]
    with pytest.raises(kvrt.NativeError, match=INVALID):
        library.use("abacus")


@pytest.mark.parametrize(("wanted", "used"), [("portable", "portable"), ("abacus", VARIANTS[0]), ("", VARIANTS[0])])
def test_the_environment_may_choose_the_variant(wanted: str, used: str) -> None:
    program = (
        "import ctypes, sys; name = ctypes.CDLL(sys.argv[1]).kvrt_current_variant\n"
        "name.restype = ctypes.c_char_p; print(name().decode())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(kvrt.LIBRARIES / "libkvrt_cpu.so")],
        env={**os.environ, "KVCLI_CPU_VARIANT": wanted},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == used


def small(**fields: Any) -> Store:
    spec = LayerPlan(1, 64, KVFormat(4), KVFormat(4), center=True)
    return pair(CachePlan((spec,), residual_window=4, sink_tokens=2), 1, 128, 2, **fields)[0]


def test_nothing_is_written_where_a_page_is_missing() -> None:
    store = small()
    store.append([tokens(store.layer, 20)])
    kept = [x.clone() for x in (store.pages, store.tail, store.sinks)]
    store.tables[0, 0, 2] = -1
    with pytest.raises(kvrt.NativeError, match=INVALID):
        store.append([tokens(store.layer, 40)])
    store.tables[0, 0, 2] = 5
    store.struct.rope_positions = 40
    with pytest.raises(kvrt.NativeError, match=INVALID):
        store.append([tokens(store.layer, 40)])
    for x, y in zip((store.pages, store.tail, store.sinks), kept, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize(("field", "value", "message"), [
    ("head_dim", 60, UNSUPPORTED), ("head_dim", 512, UNSUPPORTED), ("num_heads", 65, UNSUPPORTED),
    ("block_size", 24, INVALID), ("num_heads", 0, INVALID), ("exact_dtype", 7, INVALID), ("page_dtype", 0, INVALID),
    ("tail_tokens", 3, INVALID), ("rope", None, INVALID), ("portable", 1, INVALID),
])  # fmt: skip
def test_a_layer_that_cannot_be(field: str, value: Any, message: str) -> None:
    store = small()
    store.append([tokens(store.layer, 40)])
    setattr(store.struct, field, value)
    with pytest.raises(kvrt.NativeError, match=message):
        store.append([tokens(store.layer, 1)])
    with pytest.raises(kvrt.NativeError, match=message):
        store.expand(0, 0, 16)
    assert store.library.workspace_bytes(store.struct, 1, 1) == -1


@pytest.mark.parametrize(("field", "value", "message"), [
    ("bits", 5, INVALID), ("bits", 1, UNSUPPORTED), ("group", 24, INVALID), ("group", 0, INVALID), ("axis", 2, INVALID),
    ("scale_dtype", 2, INVALID),
])  # fmt: skip
def test_a_format_that_cannot_be(field: str, value: Any, message: str) -> None:
    for which in "kv":
        store = small()
        setattr(getattr(store.struct, which), field, value)
        with pytest.raises(kvrt.NativeError, match=message):
            store.append([tokens(store.layer, 1)])


@pytest.mark.parametrize(("field", "value"), [
    ("parts", 0), ("parts", 4), ("splits", 0), ("split_pages", -1), ("workspace", None), ("workspace_bytes", 16),
    ("mass_stride", 5), ("q", None), ("out", None), ("dtype", 9),
])  # fmt: skip
def test_attention_s_arguments_are_checked(field: str, value: Any) -> None:
    store = small()
    store.append([tokens(store.layer, 40)])
    a = store.attend_args(queries(1, 2, 64))
    setattr(a, field, value)
    with pytest.raises(kvrt.NativeError, match=INVALID):
        store.library.call("attend", byref(store.struct), byref(a), None)


def test_attention_needs_the_pages_it_reads() -> None:
    store = small()
    store.append([tokens(store.layer, 41)])
    store.lengths -= 1
    q = queries(1, 2, 64)
    whole = store.attend(q)
    store.tables[0, 0, 1] = -1
    with pytest.raises(kvrt.NativeError, match=INVALID):
        store.attend(q)
    exact = store.attend(q, parts=kvrt.EXACT)
    assert torch.isfinite(exact["lse"]).all()
    assert not torch.equal(exact["out"], whole["out"])
    store.struct.window, store.struct.sink_tokens = 9, 0  # pages behind a window may be gone
    store.tables[0, 0, :2] = -1
    assert torch.isfinite(store.attend(q)["lse"]).all()


def test_expanding_needs_pages_and_sense() -> None:
    store = small()
    store.append([tokens(store.layer, 41)])
    for arguments, options in (((1, 0, 8), {}), ((0, -1, 8), {}), ((0, 0, 8), {"before": True, "with_sinks": True}),
                               ((0, 120, 20), {})):  # fmt: skip
        with pytest.raises(kvrt.NativeError, match=INVALID):
            store.expand(*arguments, **options)
    store.tables[0, 0, 0] = -1
    with pytest.raises(kvrt.NativeError, match=INVALID):
        store.expand(0, 0, 8)


def test_null_pointers_are_refused() -> None:
    store = small()
    for name in ("append", "attend", "expand"):
        with pytest.raises(kvrt.NativeError, match=INVALID):
            store.library.call(name, None, None, None)
        with pytest.raises(kvrt.NativeError, match=INVALID):
            store.library.call(name, byref(store.struct), None, None)
