"""The engine in its thread: streams, refusals, leaving early, draining, and what happens when it breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kvcli.engine import AsyncEngine, EngineConfig, EngineStopped, Output, QueueFull, Request, SamplingParams
from kvcli.errors import UsageError
from kvcli.models.loading import load
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime import kvrt
from kvcli.runtime.packed_model import PackedModel

try:
    kvrt.library("cpu")
except kvrt.NativeError as error:
    pytest.skip(f"needs the native kernels: {error}", allow_module_level=True)

LONG = SamplingParams(max_tokens=None, ignore_eos=True)
Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(scope="module")
def model(tinystories: Path) -> PackedModel:
    loaded = load(str(tinystories), dtype="float32")
    fmt = KVFormat(4, group=16)
    layers = tuple(LayerPlan(x.num_kv_heads, x.head_dim, fmt, fmt) for x in loaded.geometry)
    return PackedModel(loaded, CachePlan(layers, residual_window=16, sink_tokens=4), {})


@asynccontextmanager
async def running(model: PackedModel, **fields: Any) -> AsyncIterator[AsyncEngine]:
    settings = {"memory": 4 << 20, "threads": 1, "max_num_seqs": 4, "prefix_caching": False, **fields}
    engine = AsyncEngine(model, EngineConfig(**settings))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def go(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 120))


async def collect(engine: AsyncEngine, request: Request) -> list[Output]:
    return [x async for x in await engine.submit(request)]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_answers_come_as_streams_and_repeat(model: PackedModel) -> None:
    async def test() -> None:
        async with running(model, deterministic=True) as engine:
            requests = [Request([1, 20 + i], SamplingParams(max_tokens=12, n=1 + i % 2)) for i in range(6)]
            together = await asyncio.gather(*(collect(engine, x) for x in requests))
            for request, events in zip(requests, together, strict=True):
                alone = await collect(engine, Request(request.prompt, request.params))
                for index in range(request.params.n):
                    mine, other = ([x for x in many if x.index == index] for many in (events, alone))
                    assert [x.token_id for x in mine] == [x.token_id for x in other]
                    assert "".join(x.text for x in mine) == "".join(x.text for x in other)
                    assert [bool(x.finish_reason) for x in mine] == [False] * (len(mine) - 1) + [True]
            await until(lambda: engine.stats().running == 0)
            assert engine.stats().pages_used == engine.stats().queued == 0

    go(test())


def test_a_full_queue_says_when_to_come_again_and_bad_requests_are_refused(model: PackedModel) -> None:
    async def test() -> None:
        async with running(model, max_num_seqs=1, max_queue=2) as engine:
            answers = [await engine.submit(Request([1], LONG, id=f"{i}")) for i in range(3)]
            with pytest.raises(QueueFull) as refused:
                await engine.submit(Request([1], LONG))
            assert 1 <= refused.value.retry_after <= 60
            with pytest.raises(UsageError, match="4 choices"):
                await engine.submit(Request([1], SamplingParams(n=4)))
            with pytest.raises(UsageError, match="empty"):
                await engine.submit(Request([]))
            with pytest.raises(UsageError, match="'2'"):
                await engine.submit(Request([1], id="2"))
            await anext(answers[0])
            assert engine.stats().queued == 2
            for answer in answers:
                await answer.aclose()
            await until(lambda: engine.stats().queued + engine.stats().running == 0)
            assert len(await collect(engine, Request([1], SamplingParams(max_tokens=3)))) == 3

    go(test())


def test_whoever_leaves_frees_his_pages(model: PackedModel) -> None:
    async def test() -> None:
        async with running(model) as engine:

            async def listen(answer: AsyncIterator[Output]) -> None:
                async for _ in answer:
                    pass

            cancelled = asyncio.create_task(listen(await engine.submit(Request([1] * 100, LONG))))
            forgotten = await engine.submit(Request([1] * 100, LONG))
            closed = await engine.submit(Request([1] * 100, LONG))
            aborted = await engine.submit(Request([1] * 100, LONG, id="a"))
            await until(lambda: engine.stats().running == 4)
            await asyncio.sleep(0)
            cancelled.cancel()
            del forgotten
            await closed.aclose()
            assert [x async for x in closed] == []
            engine.abort("a")
            engine.abort("nobody")
            assert [x.finish_reason async for x in aborted][-1] == "abort"
            await until(lambda: engine.stats().running == 0)
            assert engine.stats().pages_used == 0
            assert engine.stats().requests_aborted == 4

    go(test())


@pytest.mark.parametrize("patience", [60.0, 0.0])
def test_draining_finishes_what_runs_or_cuts_it_off(patience: float, model: PackedModel) -> None:
    async def test() -> None:
        async with running(model) as engine:
            params = SamplingParams(max_tokens=20, ignore_eos=True) if patience else LONG
            task = asyncio.create_task(collect(engine, Request([1], params)))
            await until(lambda: engine.stats().running == 1)
            assert await engine.drain(patience) == bool(patience)
            with pytest.raises(EngineStopped):
                await engine.submit(Request([1]))
            assert (await task)[-1].finish_reason == ("length" if patience else "abort")
            assert engine.failed is None

    go(test())


def test_a_broken_engine_ends_all_streams_and_says_why(model: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with running(model) as engine:
            answers = [await engine.submit(Request([1], LONG)) for _ in range(2)]
            await anext(answers[0])
            monkeypatch.setattr(engine._engine.runner, "step", lambda *_: 1 / 0)
            for answer in answers:
                with pytest.raises(EngineStopped, match="division by zero"):
                    async for _ in answer:
                        pass
            assert isinstance(engine.failed, ZeroDivisionError)
            with pytest.raises(EngineStopped):
                await engine.submit(Request([1]))
            assert await engine.drain(1)

    go(test())


def test_a_request_that_fails_inside_takes_no_other_down(model: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with running(model) as engine:
            add = engine._engine.add

            def picky(request: Request) -> None:
                if request.id == "bad":
                    raise ValueError("not this one")
                add(request)

            monkeypatch.setattr(engine._engine, "add", picky)
            good = asyncio.create_task(collect(engine, Request([1], SamplingParams(max_tokens=30, ignore_eos=True))))
            with pytest.raises(ValueError, match="not this one"):
                await collect(engine, Request([1], SamplingParams(n=2), id="bad"))
            assert len(await good) == 30
            assert engine.failed is None

    go(test())


def test_stopping_ends_streams(model: PackedModel) -> None:
    async def test() -> None:
        async with running(model) as engine:
            answer = await engine.submit(Request([1], LONG))
            await anext(answer)
            await asyncio.to_thread(engine.stop)
            with pytest.raises(EngineStopped):
                async for _ in answer:
                    pass

    go(test())
