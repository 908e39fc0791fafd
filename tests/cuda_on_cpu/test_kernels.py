"""The CUDA kernels, run on the CPU, against the plain reference: pages byte for byte, attention in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from ctypes import byref
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "runtime" / "native")]  # tests are no package

import cpu_store  # noqa: E402
from cpu_store import Store, reference  # noqa: E402
from cuda_on_cpu.build import KERNELS, CannotBuild, build, sanitizer_environment  # noqa: E402

from kvcli.models.architectures import Rope  # noqa: E402
from kvcli.plan import CachePlan, LayerPlan  # noqa: E402
from kvcli.quant import transforms  # noqa: E402
from kvcli.quant.format import KVFormat  # noqa: E402
from kvcli.runtime import kvrt  # noqa: E402
from kvcli.runtime.packed_layer import PackedLayer  # noqa: E402

SCALAR, TENSOR = "cuda-scalar", "cuda-tensor"
# of the largest value, and of a score: the tensor cores multiply halves
TOLERANCE = {SCALAR: 2e-5, TENSOR: 2e-3}
SCHEDULES = (0, 1, 7)


class Emulated(kvrt.Library):
    """The CUDA library, compiled for the CPU."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.schedule(0)

    def schedule(self, number: int) -> None:
        """Choose in which order threads run."""
        self._c.emulator_set_schedule(number)


@cache
def built(out: Path, sanitize: bool = False) -> Path:
    try:
        return build(sorted(KERNELS.glob("*.cu")), out, sanitize=sanitize)
    except CannotBuild as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    if path := os.environ.get("KVCLI_TEST_KVRT_EMULATED"):  # the sanitized run, and mutants
        return Emulated(Path(path))
    return Emulated(built(tmp_path_factory.mktemp("kernels") / "libkvrt_emulated.so"))


@pytest.fixture(autouse=True)
def _stores_use_it(library: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_store, "cpu_library", lambda: library)
    library.schedule(int(os.environ.get("KVCLI_TEST_SCHEDULE", 0)))
    library.use(None)


def rope_of(dim: int, scaling: float = 1.0) -> Rope:
    return Rope(10000.0 ** -(torch.arange(0, dim, 2) / dim), scaling)


def means_of(layer: LayerPlan) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    return {f"layer.0.{w}.mean": torch.randn(layer.num_kv_heads, layer.head_dim, generator=g) for w in "kv"}


def tokens(layer: LayerPlan, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Keys and values, [2, heads, n, dim]: channels and tokens of different size, and now and then a zero."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, layer.num_kv_heads, n, layer.head_dim, generator=g) * torch.linspace(0.3, 2, layer.head_dim)
    x = x * torch.rand(n, 1, generator=g).mul(3).exp2() / 4
    if n > 3:
        x[:, :, 2] = 0  # an empty group has a scale of zero
        x[:, :, 3] *= 1e-6  # and a tiny one a subnormal scale
    return x.to(dtype)


def queries(batch: int, heads: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, heads, dim, generator=torch.Generator().manual_seed(seed + 100))


def pair(plan: CachePlan, batch: int, capacity: int, group: int = 1, **options: Any) -> tuple[Store, PackedLayer]:
    layer = plan.layers[0]
    rope, means = options.pop("rope", rope_of(layer.head_dim)), means_of(layer)
    store = Store(
        plan, rope=rope, tensors=means, batch=batch, capacity=capacity, num_heads=group * layer.num_kv_heads, **options
    )
    # a pool is not zeroed: what no token was written to may be no number
    store.pages.fill_(255)
    return store, PackedLayer(plan, 0, batch_size=batch, rope=rope, tensors=means)


def feed(layer: PackedLayer, row: int, kv: Tensor) -> None:
    if kv.shape[2]:
        layer.append(row, layer.exact(row, kv[0], kv[1]))


def assert_same_storage(store: Store, layer: PackedLayer) -> None:
    for row, n in enumerate(layer.lengths):
        assert int(store.lengths[row]) == n
        boundary, block = layer.boundary(n), layer.layout.block_size
        for logical, page in enumerate(layer.block_tables[row]):
            written = min(block, boundary - logical * block)  # of a page that tokens enter one by one
            if page < 0:
                continue
            found, expected = store.page(row, logical), layer.pages[page]
            for name, where in layer.layout.sections.items():
                size = (where.stop - where.start) * written // block
                of = slice(where.start, where.start + size)
                assert torch.equal(found[:, of], expected[:, of]), f"{name} of page {logical} of sequence {row}"
        assert torch.equal(store.tail_of(row), layer.tail[:, row, :, : n - boundary])
        sinks = min(n, layer.sinks.shape[3])
        assert torch.equal(store.sinks[int(store.slots[row])][:, :, :sinks], layer.sinks[:, row, :, :sinks])


def assert_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], values: Tensor, row: int, tolerance: float, norms: float
) -> None:
    """norms: largest |q| |k| times the scale, what a score's error is measured by."""
    scale, score = max(1e-3, float(values.abs().max())), max(1.0, norms)
    close = torch.testing.assert_close
    close(found["lse"][row].double(), expected["lse"], rtol=1e-5, atol=tolerance * score)
    close(found["out"][row].double(), expected["out"], rtol=0, atol=2 * tolerance * scale)
    close(found["packed_mass"][row].double(), expected["packed_mass"], rtol=0, atol=tolerance * score)
    close(found["mass"][row].double(), expected["mass"], rtol=0, atol=tolerance * score)
    close(found["key_sum"][row].double(), expected["key_sum"], rtol=0, atol=4 * tolerance * scale)


def check_attention(
    plan: CachePlan, lengths: tuple[int, ...], *, group: int, variant: str, splits: int = 1, split_pages: int = 0,
    parts: int = kvrt.ALL, softcap: float = 0.0, head_tables: bool = False, schedule: int = 0,
    dtype: torch.dtype = torch.float32, rope: Rope | None = None, capacity: int = 256,
) -> None:  # fmt: skip
    """Append lengths tokens at once, then one more; attend from it; compare every output."""
    spec = plan.layers[0]
    options = {"rope": rope} if rope else {}
    batch = len(lengths)
    store, layer = pair(plan, batch, capacity, group, head_tables=head_tables, softcap=softcap, **options)
    library: Any = store.library
    library.use(variant)
    library.schedule(schedule)
    before = [tokens(spec, n, r, dtype) for r, n in enumerate(lengths)]
    new = [tokens(spec, 1, 50 + r, dtype) for r in range(batch)]
    if any(lengths):
        store.append(before)
    store.append(new, advance=False)
    q = queries(batch, store.num_heads, spec.head_dim).to(dtype)
    found = store.attend(q, parts=parts, splits=splits, split_pages=split_pages)
    for row in range(batch):
        feed(layer, row, before[row])
        feed(layer, row, new[row])
        width = found["mass"].shape[-1]
        expected = reference(layer, row, q[row], rope=store.rope, parts=parts, softcap=softcap, width=width)
        kv = torch.cat((before[row], new[row]), 2)
        norms = float(q[row].norm(dim=-1).max() * kv[0].norm(dim=-1).max()) * spec.head_dim**-0.5
        tolerance = TOLERANCE[variant] if dtype == torch.float32 else 8e-3
        assert_close(found, expected, kv, row, tolerance, norms)
    store.lengths += 1
    assert_same_storage(store, layer)


def every_format(dim: int, block: int) -> Iterator[KVFormat]:
    """Bits, axes, groups, grids and scale dtypes, each with each other once or so."""
    axes: tuple[tuple[Literal["token", "channel"], int], ...] = (
        ("token", dim), ("token", 16), ("channel", block), ("channel", 8),
    )  # fmt: skip
    for i, (bits, (axis, group)) in enumerate(product((2, 3, 4, 8), axes)):
        scale: Literal["float16", "e5m3"] = "e5m3" if i % 3 == 0 else "float16"
        yield KVFormat(bits, axis, group, i % 2 == 0, scale_dtype=scale)
        if bits < 8:
            yield KVFormat(bits, axis, group, grid="gaussian", scale_dtype="float16" if i % 3 == 0 else "e5m3")
        else:
            yield KVFormat(bits, axis, group, i % 2 == 1, scale_dtype=scale)
    yield KVFormat(16)


FORMATS = tuple(every_format(64, 16))


# --- append -----------------------------------------------------------------------------------------------------------


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
    # every page border, and a ring that is overwritten while it is read
    library.schedule(schedule)
    layer = LayerPlan(1, 16, KVFormat(3, "token", 16), KVFormat(4, "channel", 16, False), transform="hadamard")
    plan = CachePlan((layer,), sink_tokens=3, residual_window=window)
    store, plain = pair(plan, 2, 96)
    kv = tokens(layer, 60)
    for t in range(60):
        new = kv[:, :, t : t + 1]
        store.append([new, new[:, :, : t % 2]])
        feed(plain, 0, new)
        feed(plain, 1, new[:, :, : t % 2])
    assert_same_storage(store, plain)


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


# --- attend -----------------------------------------------------------------------------------------------------------


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


# --- expand -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS[::2], ids=str)
@pytest.mark.parametrize("rope", ["before", "after"])
def test_expanding_equals_reading(fmt: KVFormat, rope: Any) -> None:
    layer = LayerPlan(2, 64, fmt, fmt, transform="hadamard", center=True, rope=rope)
    plan = CachePlan((layer,), sink_tokens=9)
    store, plain = pair(plan, 2, 128)
    kv = [tokens(layer, n, n) for n in (3, 71)]
    store.append(kv)
    for row in range(2):
        feed(plain, row, kv[row])
    k, v, _ = plain.read(1)
    for first, count in ((0, 64), (5, 30), (16, 3)):
        found = store.expand(1, first, count)
        for x, expected in zip(found, (k, v), strict=True):
            assert torch.equal(x, expected[:, first : first + count].float())
        before = store.expand(1, first, count, before=True)[0]
        expected = store.rope.unrotate(k[:, first : first + count].float(), torch.arange(first, first + count))
        torch.testing.assert_close(before, expected, rtol=1e-5, atol=1e-5)
        whole = store.expand(1, first, count, torch.bfloat16, with_sinks=True)
        sinks = plain.sinks[:, 1, :, first : min(plain.sinks.shape[3], first + count)]
        assert torch.equal(whole[:, :, : sinks.shape[2]], sinks.bfloat16())
        assert torch.equal(whole[:, :, sinks.shape[2] :], found[:, :, sinks.shape[2] :].bfloat16())


# --- the small operations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [8, 64, 80, 256])
def test_hadamard_is_the_reference_s_bit_for_bit(dim: int, library: Emulated) -> None:
    x = queries(1, 21, dim)[0]
    out = torch.empty_like(x)
    library.call("hadamard", out.data_ptr(), x.data_ptr(), 21, dim, None)
    assert torch.equal(out, transforms.hadamard(x))


FLOATS = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("dtype", FLOATS)
def test_norms_and_gates(dtype: torch.dtype, library: Emulated) -> None:
    x, residual = queries(1, 5, 300).to(dtype)[0], queries(1, 5, 300, 1).to(dtype)[0]
    weight = (1 + queries(1, 1, 300, 2)[0, 0] / 4).to(dtype)
    for added in (None, residual):
        total = x if added is None else x + added
        wide = total.float()
        expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight.float()
        y = torch.empty_like(x)
        library.call("rms_norm", y.data_ptr(), x.data_ptr(), kvrt.pointer(added), weight.data_ptr(), 5, 300, 1e-5,
                     kvrt.DTYPES[dtype], None)  # fmt: skip
        torch.testing.assert_close(y, expected.to(dtype), rtol=FLOATS[dtype], atol=FLOATS[dtype])
        assert added is None or torch.equal(added, total)
    y = torch.empty(5, 150, dtype=dtype)
    library.call("silu_mul", y.data_ptr(), x.data_ptr(), 5, 150, kvrt.DTYPES[dtype], None)
    gate, up = x.float().chunk(2, -1)
    torch.testing.assert_close(y, (silu(gate) * up).to(dtype), rtol=FLOATS[dtype], atol=FLOATS[dtype])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("normed", [False, True])
def test_rotary_embedding(dtype: torch.dtype, normed: bool, library: Emulated) -> None:
    rope, heads, kv_heads, dim = rope_of(80), 6, 2, 80
    qkv = queries(7, heads + 2 * kv_heads, dim).to(dtype)
    at = torch.tensor([0, 5, 9, 2, 100, 63, 7], dtype=torch.int32)
    weights = [(1 + queries(1, 1, dim, i)[0, 0] / 4).to(dtype) for i in (2, 3)]
    turned = qkv[:, : heads + kv_heads].float()
    if normed:
        turned = turned * torch.rsqrt(turned.square().mean(-1, keepdim=True) + 1e-5)
        turned[:, :heads] *= weights[0].float()
        turned[:, heads:] *= weights[1].float()
    expected = torch.cat((rope.rotate(turned, at.long()[:, None]), qkv[:, heads + kv_heads :].float()), 1)
    table = rope.table(128).contiguous()
    norms = [w.data_ptr() if normed else None for w in weights]
    library.call("rope", qkv.data_ptr(), at.data_ptr(), table.data_ptr(), table.shape[0], *norms, 1e-5, 7, heads,
                 kv_heads, dim, kvrt.DTYPES[dtype], None)  # fmt: skip
    torch.testing.assert_close(qkv, expected.to(dtype), rtol=FLOATS[dtype], atol=FLOATS[dtype])


# --- the interface ----------------------------------------------------------------------------------------------------


def test_what_the_library_says_of_itself(library: Emulated) -> None:
    assert library.kind == "cuda"
    assert list(library.variants()) == ["cuda", SCALAR, TENSOR]
    library.use(TENSOR)
    assert library.variant == TENSOR
    library.use(None)
    assert library.variant == "cuda"
    with pytest.raises(kvrt.NativeError):
        library.use("neon")


def test_contradictions_are_refused(library: Emulated) -> None:
    store, _ = pair(CachePlan((LayerPlan(1, 64, KVFormat(4), KVFormat(4)),)), 1, 64)
    store.append([tokens(store.layer, 20)])
    q = queries(1, 1, 64)
    for change in ({"splits": 0}, {"workspace_bytes": 8}, {"parts": 0}, {"dtype": 9}, {"q": None}, {"mass": None}):
        a = store.attend_args(q)
        for name, value in change.items():
            setattr(a, name, value)
        with pytest.raises(kvrt.NativeError):
            library.call("attend", byref(store.struct), byref(a), None)
    layer = kvrt.Layer.from_buffer_copy(store.struct)
    layer.head_dim = 60
    with pytest.raises(kvrt.NativeError):
        library.call("attend", byref(layer), byref(store.attend_args(q)), None)


@pytest.mark.slow
def test_under_sanitizers(tmp_path: Path) -> None:
    path = built(tmp_path / "libkvrt_sanitized.so", sanitize=True)
    environment = {**sanitizer_environment(), "KVCLI_TEST_KVRT_EMULATED": str(path), "OMP_NUM_THREADS": "1"}
    chosen = "token_by_token or query_groups or borders or test_every_head_size or norms or rotary or expanding"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    command.append(str(HERE / "test_kernels.py"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
