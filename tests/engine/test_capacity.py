"""Pages packed again and expanded: what the plain reference makes of them, and the same each time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcli.engine.capacity import Repacker
from kvcli.engine.pool import PoolCache, PoolSize
from kvcli.errors import InputError
from kvcli.models.architectures import LayerGeometry, Rope
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.quant.prediction import Linear, Predictor, Source
from kvcli.runtime import kvrt
from kvcli.runtime.packed_layer import PackedLayer

try:
    kvrt.library("cpu")
except kvrt.NativeError as error:
    pytest.skip(f"needs the native kernels: {error}", allow_module_level=True)

HEADS, DIM, LAYERS, BLOCKS, SIZE = 2, 16, 3, 6, 16
PAGES = [7, 3, 9, 0, 4, 1]  # of the pool, in order of blocks
ROPE = Rope(10000.0 ** -(torch.arange(0, DIM, 2) / DIM))
TOKEN, CHANNEL = KVFormat(3, group=8), KVFormat(4, axis="channel", group=16, symmetric=False)
RUNNING: dict[str, dict[str, Any]] = {
    "windowed": {"k": CHANNEL, "v": TOKEN},
    "rotated": {"k": KVFormat(8, group=16), "v": TOKEN, "transform": "hadamard", "center": True},
    "before": {"k": TOKEN, "v": KVFormat(16), "rope": "before"},
}
SHARED: dict[str, dict[str, Any]] = {
    "windowed": {"sink_tokens": 3, "residual_window": 5}, "rotated": {}, "before": {"residual_window": 16},
}  # fmt: skip
SEEN = (Source(0, "k"), Source(0, "v"))
PREDICTORS = (
    Predictor(v=Linear((Source(0, "k"),))),
    Predictor(Linear((SEEN[1],), bits=8, rank=5), Linear((Source(1, "k"), *SEEN), bits=4)),
    Predictor(Linear((Source(1, "v"), *SEEN)), Linear((SEEN[0], Source(1, "k")))),
)


def plans(name: str, window: int | None = None, *, absorbed: bool = False) -> tuple[CachePlan, CachePlan]:
    """What sequences run on, and what they are packed by; the second mixes axes where the first has a window."""
    kind: Any = "sliding" if window else "full"
    own = [Predictor(v=Linear((Source(i, "k"),))) if absorbed else None for i in range(LAYERS)]
    running = [LayerPlan(HEADS, DIM, kind=kind, window=window, predictor=x, **RUNNING[name]) for x in own]
    axes = [CHANNEL, TOKEN, TOKEN] if SHARED[name] else [TOKEN] * 3
    dense = [
        LayerPlan(HEADS, DIM, k, TOKEN, kind=kind, window=window, rope="before", center=i != 1, predictor=x)
        for i, (k, x) in enumerate(zip(axes, PREDICTORS, strict=True))
    ]
    return CachePlan(tuple(running), **SHARED[name]), CachePlan(tuple(dense), **SHARED[name])


def tensors_of(plan: CachePlan, seed: int) -> dict[str, Tensor]:
    """Predictors and means so large that leaving one out would show, also in codes."""
    g, out = torch.Generator().manual_seed(seed), {}
    for name, (dtype, shape) in plan.model_tensors().items():
        if dtype == "U8":
            out[name] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)
        else:
            scale = 0.02 if name.endswith("scales") else 0.2
            out[name] = scale * torch.rand(shape, generator=g).add(-0.4).to(torch.float16 if dtype == "F16" else None)
    return out


def pool_of(plan: CachePlan, tensors: dict[str, Tensor], *, filled: bool = True) -> PoolCache:
    """A pool whose slot 1 holds a sequence long enough for all blocks to be packed."""
    tokens = BLOCKS * SIZE + plan.residual_window
    size = PoolSize(num_pages=10, num_slots=2, num_seqs=2, max_context=8 * SIZE)
    shape = LayerGeometry(HEADS, 2 * HEADS, DIM, plan.layers[0].kind, plan.layers[0].window)
    pool = PoolCache(plan, (shape,) * LAYERS, size=size, rope=ROPE, tensors=tensors, threads=1)
    pool.place(1, [*PAGES, 5, 8], 0)
    if filled:
        g = torch.Generator().manual_seed(0)
        for index in range(LAYERS):
            pool.append_chunk(index, 1, *torch.randn(2, tokens, HEADS, DIM, generator=g))
        pool.advance(tokens, 1)
    return pool


def read(pool: PoolCache) -> list[tuple[Tensor, Tensor]]:
    """Every layer's pages, decoded: keys after RoPE and values, [heads, tokens, d]."""
    return [pool.expand(i, 1, 0, BLOCKS * SIZE, torch.float32, with_sinks=False) for i in range(LAYERS)]


def packed_again(
    plan: CachePlan, tensors: dict[str, Tensor], given: list[tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """What the reference's pages make of keys and values."""
    bare = replace(plan, sink_tokens=1, residual_window=0)
    layers = [PackedLayer(bare, i, rope=ROPE, tensors=tensors) for i in range(LAYERS)]
    for x in layers:
        x.connect(layers)
    out = []
    for x, (k, v) in zip(layers, given, strict=True):
        x.append(0, x.exact(0, k, v))
        k, v, _ = x.read(0)
        out.append((k.float(), v.float()))
    return out


def assert_close(found: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]) -> None:
    """Sums of another order move a code now and then; a wrong term moves everything."""
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            assert float((x - y).norm() / y.norm()) < 0.03
            assert float((x - y).abs().median()) < 1e-5


@pytest.mark.parametrize(("name", "absorbed"), [*((x, False) for x in RUNNING), ("windowed", True), ("rotated", True)])
@pytest.mark.parametrize("window", [None, 24])
def test_a_round_trip_is_the_reference_s(name: str, window: int | None, absorbed: bool) -> None:
    plan, dense = plans(name, window, absorbed=absorbed)
    tensors, more = tensors_of(plan, 1), tensors_of(dense, 2)
    pool = pool_of(plan, tensors)
    before = read(pool)
    repacker = Repacker(pool, dense, more, rope=ROPE)
    packed = repacker.demote(0, PAGES)
    assert [x.nbytes for x in packed] == [repacker.page_bytes] * BLOCKS
    assert repacker.page_bytes == sum(x.page_bytes(SIZE) for x in dense.layers)
    assert all(torch.equal(a, b) for x, y in zip(read(pool), before, strict=True) for a, b in zip(x, y, strict=True))
    for store in pool.layers:
        store.pages.fill_(255)
    repacker.promote(0, packed, PAGES)
    once = packed_again(dense, more, before)
    assert_close(read(pool), packed_again(plan, tensors, once))
    for a, b in zip(once, before, strict=True):  # few bits show, and predictors of noise do not help
        assert all(0.02 < float((x - y).norm() / y.norm()) < 0.6 for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", RUNNING)
def test_a_page_stands_for_itself_and_comes_out_the_same(name: str) -> None:
    plan, dense = plans(name)
    tensors, more = tensors_of(plan, 1), tensors_of(dense, 2)
    pool = pool_of(plan, tensors)
    repacker = Repacker(pool, dense, more, rope=ROPE)
    packed = repacker.demote(0, PAGES)
    assert all(torch.equal(a, b) for a, b in zip(packed, repacker.demote(0, PAGES), strict=True))
    small = Repacker(pool, dense, more, rope=ROPE, room=2 * SIZE)
    for other in (repacker.demote(2, PAGES[2:]), small.demote(0, PAGES)[2:]):
        differ = torch.stack(packed[2:]) != torch.stack(other)
        assert float(differ.float().mean()) < 0.01  # sums of another shape
    repacker.promote(0, packed, PAGES)
    found = [x.pages.clone() for x in pool.layers]
    repacker.promote(0, packed, PAGES)
    assert all(torch.equal(a, x.pages) for a, x in zip(found, pool.layers, strict=True))
    others = pool_of(plan, tensors, filled=False)  # at other places of another pool, piece by piece
    piecewise = Repacker(others, dense, more, rope=ROPE, room=2 * SIZE)
    places = [2, 8, 5, 6, 0, 3]
    piecewise.promote(3, packed[3:], places[3:])
    piecewise.promote(0, packed[:3], places[:3])
    for a, b in zip(found, others.layers, strict=True):
        differ = a[PAGES] != b.pages[places]
        assert float(differ.float().mean()) < 0.01


def test_plans_that_cut_sequences_at_other_places_are_refused() -> None:
    plan, dense = plans("windowed")
    pool = pool_of(plan, tensors_of(plan, 1), filled=False)
    for other in (replace(dense, residual_window=6), replace(dense, layers=dense.layers[:2])):
        with pytest.raises(InputError, match="is not for the plan's layers, pages, sinks and window"):
            Repacker(pool, other, tensors_of(other, 2), rope=ROPE)
    missing = {name: x for name, x in tensors_of(dense, 2).items() if name != "layer.1.k.predictor.bias"}
    with pytest.raises(InputError, match=r"layer\.1\.k\.predictor\.bias is missing"):
        Repacker(pool, dense, missing, rope=ROPE)
