"""The CUDA kernels as a library for the CPU, and checks of it: pages byte for byte, attention in float64."""

from __future__ import annotations

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

from cpu_store import Store, means_of, predicting, reference, rope_of  # noqa: E402
from cuda_on_cpu.build import KERNELS, CannotBuild, build  # noqa: E402

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
    rope, tensors = options.pop("rope", rope_of(layer.head_dim)), means_of(layer)
    if layer.predictor is not None:
        tensors = predicting(plan)[1]
    store = Store(
        plan,
        rope=rope,
        tensors=tensors,
        batch=batch,
        capacity=capacity,
        num_heads=group * layer.num_kv_heads,
        **options,
    )
    # a pool is not zeroed: what no token was written to may be no number
    store.pages.fill_(255)
    return store, PackedLayer(plan, 0, batch_size=batch, rope=rope, tensors=tensors)


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


def check_predicted(
    plan: CachePlan, steps: tuple[tuple[int, ...], ...], *, group: int, variant: str = SCALAR, splits: int = 2,
    split_pages: int = 0, schedule: int = 0, dtype: torch.dtype = torch.float32,
) -> Store:  # fmt: skip
    """Append to a plan with its values predicted from its keys, step by step and one token more; attend; compare.

    Keys are turned back in another order of roundings than the reference's, so that a code may fall on the other side
    of its border: most values are the reference's, and attention is compared on what the pages really hold.
    """
    plan = predicting(plan)[0]
    spec, batch = plan.layers[0], len(steps[0])
    store, layer = pair(plan, batch, 256, group)
    library: Any = store.library
    library.use(variant)
    library.schedule(schedule)
    ones = (1,) * batch
    for i, counts in enumerate((*steps, ones)):
        new = [tokens(spec, n, 10 * i + r, dtype) for r, n in enumerate(counts)]
        store.append(new, advance=i < len(steps))
        for row, kv in enumerate(new):
            feed(layer, row, kv)
    q = queries(batch, store.num_heads, spec.head_dim).to(dtype)
    found = store.attend(q, splits=splits, split_pages=split_pages)
    a = store.attend_args(q, splits=splits, split_pages=split_pages)
    a.mass = a.key_sum = a.lse = a.packed_mass = None  # what decoding asks for
    library.call("attend", byref(store.struct), byref(a), None)
    assert torch.equal(a.results["out"], found["out"])
    for row in range(batch):
        boundary = plan.boundary(0, layer.lengths[row])
        k, v, first = layer.read(row)
        mine = store.expand(row, first, boundary - first)
        for x, expected in zip(mine, (k, v), strict=True):
            near = (x - expected).abs() <= 1e-4 * (1 + expected.abs())
            assert not near.numel() or near.double().mean() > 0.98
        read = (*mine, first)
        layer.read = lambda row, stop=None, read=read: read  # type: ignore[method-assign]
        expected = reference(layer, row, q[row], rope=store.rope, width=found["mass"].shape[-1])
        del layer.read
        values = torch.cat((mine.flatten(), layer.tail[:, row].nan_to_num().flatten().float()))
        norms = float(q[row].norm(dim=-1).max() * values.abs().max())
        assert_close(found, expected, values, row, TOLERANCE[variant] if dtype == torch.float32 else 8e-3, norms)
    store.lengths += 1
    return store


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
FLOATS = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def check_token_by_token(window: int, schedule: int, library: Emulated) -> None:
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


def check_expanding(fmt: KVFormat, rope: Any) -> None:
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


def check_hadamard(dim: int, library: Emulated) -> None:
    x = queries(1, 21, dim)[0]
    out = torch.empty_like(x)
    library.call("hadamard", out.data_ptr(), x.data_ptr(), 21, dim, None)
    assert torch.equal(out, transforms.hadamard(x))


def check_norms_and_gates(dtype: torch.dtype, library: Emulated) -> None:
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
