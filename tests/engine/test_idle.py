"""Idle prefixes of a real model: packed again, expanded for whoever begins so, and refused where they cannot be."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcli.calibration import aqua_kv
from kvcli.engine import AsyncEngine, EngineConfig, Output, Request, SamplingParams
from kvcli.engine.engine import DEMOTED, Engine, Failure
from kvcli.errors import InputError, UsageError
from kvcli.models.loading import LoadedModel, load
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime import kvrt
from kvcli.runtime.packed_model import PackedModel

try:
    kvrt.library("cpu")
except kvrt.NativeError as error:
    pytest.skip(f"needs the native kernels: {error}", allow_module_level=True)

PROMPT = [1 + i * 7 % 300 for i in range(150)]
CONFIG = EngineConfig(memory=8 << 20, max_num_seqs=4, max_context=512, threads=1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded(tinystories: Path) -> LoadedModel:
    return load(str(tinystories), dtype="float32")


def plan_of(loaded: LoadedModel, bits: int) -> CachePlan:
    fmt = KVFormat(bits, group=16)
    layers = tuple(LayerPlan(x.num_kv_heads, x.head_dim, fmt, fmt, transform="hadamard") for x in loaded.geometry)
    return CachePlan(layers, sink_tokens=4, residual_window=24)


@pytest.fixture(scope="module")
def model(loaded: LoadedModel) -> PackedModel:
    return PackedModel(loaded, plan_of(loaded, 8), {})


@pytest.fixture(scope="module")
def capacity(loaded: LoadedModel) -> PackedModel:
    """Predictors that tell something: a part of the keys and values of the layer before."""
    plan = plan_of(loaded, 4)
    plan = replace(plan, layers=tuple(aqua_kv.design(plan.layers, "always")))
    tensors: dict[str, Tensor] = {}
    for name, (dtype, shape) in plan.model_tensors().items():
        tensors[name] = torch.zeros(shape) if dtype == "F32" else 0.3 * torch.eye(*shape, dtype=torch.float16)
    return PackedModel(loaded, plan, tensors)


def ask(engine: Engine, prompt: list[int], name: str, tokens: int = 8) -> tuple[list[int], int]:
    """Return the greedy answer, and how many tokens of the prompt were found."""
    engine.add(
        Request(prompt=prompt, params=SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True), id=name)
    )
    out, cached = [], -1
    while not engine.is_idle:
        for event in engine.step():
            assert isinstance(event, Output), event
            assert not isinstance(event, Failure)
            if event.token_id is not None:
                out.append(event.token_id)
            if event.usage is not None:
                cached = event.usage.cached_tokens
    return out, cached


def rest(engine: Engine) -> None:
    while engine.blocks.due_in() is not None:
        engine.demote()


def test_an_idle_prefix_leaves_the_pool_and_serves_again(model: PackedModel, capacity: PackedModel) -> None:
    engine = Engine(model, replace(CONFIG, idle_seconds=0.0), capacity)
    first, cached = ask(engine, PROMPT, "a")
    assert cached == 0
    rest(engine)
    stats = engine.stats()
    pages = engine.blocks.geometry.complete(len(PROMPT) + 7)
    assert (stats.pages_used, stats.pages_cached, stats.demotions, stats.promotions) == (0, 0, pages, 0)
    packed = pages * sum(x.page_bytes(16) for x in capacity.plan.layers)
    assert stats.capacity_bytes > packed
    for store in engine.runner.cache.layers:
        store.pages.fill_(255)  # whoever had the pages meanwhile
    again, cached = ask(engine, PROMPT, "b")
    assert cached == len(PROMPT) // 16 * 16
    assert again[:4] == first[:4]  # a little is lost, and not everything
    stats = engine.stats()
    assert 0 < stats.promotions <= pages
    assert stats.prefix_hit_tokens == cached
    rest(engine)
    assert engine.stats().pages_cached == 0
    other, cached = ask(engine, [*PROMPT[:100], 5, 6, 7], "c")
    assert cached in (0, 96)  # pages alone do not let it start there
    assert len(other) == 8
    assert engine.stats().pages_used == 0


def test_what_comes_back_is_close_to_what_went(model: PackedModel, capacity: PackedModel) -> None:
    """A wrong page would put the answer's scores anywhere; few bits move them a little."""

    def scores(engine: Engine) -> Tensor:
        cache, blocks = engine.runner.cache, engine.blocks
        opened = blocks.open([*PROMPT, 3], len(PROMPT))
        assert opened
        table, held, _ = opened
        assert blocks.grow(table, len(PROMPT) + 1)
        cache.place(table.slot, table.pages, held)
        found = engine.runner.extend(table.slot, [*PROMPT, 3][held:], logits=4)
        blocks.close(table, PROMPT, held)
        assert found is not None
        assert held >= 144
        return found.log_softmax(-1)

    engine = Engine(model, replace(CONFIG, idle_seconds=0.0), capacity)
    ask(engine, PROMPT, "a", tokens=1)
    exact = scores(engine)
    rest(engine)
    for store in engine.runner.cache.layers:
        store.pages.fill_(255)
    found = scores(engine)
    kl = (exact.exp() * (exact - found)).sum(-1)
    assert 1e-7 < float(kl.mean()) < 0.05


def test_no_more_is_packed_beside_a_step_than_a_part_of_it(model: PackedModel, capacity: PackedModel) -> None:
    engine = Engine(model, replace(CONFIG, idle_seconds=0.0), capacity)
    ask(engine, [1 + i % 200 for i in range(450)], "a", tokens=2)
    before = engine.stats().demotions
    engine.demote()
    assert engine.stats().demotions - before <= DEMOTED // 16
    assert engine.stats().demotions > 0


def test_the_thread_packs_while_nobody_asks(model: PackedModel, capacity: PackedModel) -> None:
    engine = AsyncEngine(model, replace(CONFIG, idle_seconds=0.05), capacity)

    async def ask(name: str) -> int:
        params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
        cached = 0
        async for event in await engine.submit(Request(prompt=PROMPT, params=params, id=name)):
            cached = event.usage.cached_tokens if event.usage else cached
        return cached

    engine.start()
    try:
        asyncio.run(ask("a"))
        end = time.monotonic() + 30
        while engine.stats().pages_cached or not engine.stats().demotions:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert asyncio.run(ask("b")) == 144
        assert engine.stats().promotions > 0
    finally:
        engine.stop()
    assert engine.failed is None


def test_what_cannot_be_is_refused(model: PackedModel) -> None:
    with pytest.raises(InputError, match="calibrate with --adapters capacity"):
        Engine(model, replace(CONFIG, idle_seconds=1.0))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"deterministic": True}, "cannot be deterministic"),
        ({"prefix_caching": False}, "needs prefix caching"),
        ({"idle_seconds": -1.0}, "at least 0"),
        ({"idle_seconds": float("inf")}, "at least 0"),
    ]
    for change, said in wrong:
        with pytest.raises(UsageError, match=said):
            replace(CONFIG, **{"idle_seconds": 1.0, **change})
