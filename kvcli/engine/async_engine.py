"""The engine in a thread of its own, for asyncio."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

from kvcli.engine.config import EngineConfig, EngineStats
from kvcli.engine.engine import Engine, Failure
from kvcli.engine.request import EngineStopped, Output, QueueFull, Request
from kvcli.errors import UsageError
from kvcli.runtime.packed_model import PackedModel

RETRY_SECONDS = (1.0, 60.0)  # bounds of what a refused caller is told to wait
ABORT_SECONDS = 10.0  # after which draining does not wait for aborted requests any longer


@dataclass
class Stream:
    """Where the events of one request go, and how many of its choices have not ended."""

    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Output | BaseException]
    left: int


class Answer(AsyncIterator[Output]):
    """What comes of one request; ends after the last event of its last choice."""

    def __init__(self, engine: AsyncEngine, request: Request, events: asyncio.Queue[Output | BaseException]) -> None:
        self._engine, self.request_id, self._left, self._events = engine, request.id, request.params.n, events

    async def __anext__(self) -> Output:
        """Wait for the next event."""
        if not self._left:
            raise StopAsyncIteration
        try:
            event = await self._events.get()
        except BaseException:
            self.close()
            raise
        if isinstance(event, BaseException):
            self.close()
            raise event
        if event.finish_reason:
            self._left -= 1
        return event

    def close(self) -> None:
        """End the request if it still runs."""
        if self._left:
            self._left = 0
            self._engine.abort(self.request_id)

    async def aclose(self) -> None:
        """End the request if it still runs."""
        self.close()

    def __del__(self) -> None:
        self.close()


class AsyncEngine:
    """Serves requests from asyncio: the engine steps in a thread, and answers come as asynchronous iterators.

    Parameters
    ----------
    model
        The model and its plan; with int4 weights it loses its own.
    config
        Settings.
    capacity
        The same model with the plan by which idle sequences are packed again; needed for ``config.idle_seconds``.

    Attributes
    ----------
    failed
        What stopped the engine, if something did.

    Raises
    ------
    BudgetError
        If ``config.memory`` does not hold one short sequence; the message names the least.
    InputError
        For a model that the native runtime does not compute, or without a capacity plan that the settings ask for.
    NativeError
        If there are no kernels.
    """

    def __init__(self, model: PackedModel, config: EngineConfig, capacity: PackedModel | None = None) -> None:
        self.model, self.config = model, config
        self._engine = Engine(model, config, capacity)
        self.failed: BaseException | None = None
        self._stats = self._engine.stats()
        self._inbox: SimpleQueue[Request | str | None] = SimpleQueue()  # a request, one to abort, or the end
        self._lock = threading.Lock()
        self._streams: dict[str, Stream] = {}
        self._active = 0  # choices that have not ended
        self._closed = False
        self._last_finish, self._seconds_each = time.monotonic(), 1.0
        self._thread = threading.Thread(target=self._run, name="kvcli-engine", daemon=True)

    @property
    def max_context(self) -> int:
        """Tokens of the longest sequence, prompt and answer together."""
        return self._engine.max_context

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    async def submit(self, request: Request) -> Answer:
        """Queue a request: ``async for output in await engine.submit(request)``.

        The iterator ends after the last event of the last choice. Leaving it early (``aclose``, cancelling the task, or
        letting go of it) aborts the request.

        Raises
        ------
        QueueFull
            If too many wait; it says when to try again.
        UsageError
            For parameters outside their range, an empty prompt, one past the context limit or the pool, or an id that
            is in use.
        EngineStopped
            If the engine drains, was stopped or has failed; the iterator raises it too when that happens later.
        """
        self._engine.check(request)
        n, room = request.params.n, self._engine.num_seqs + self.config.max_queue
        if n > room:
            raise UsageError(f"{n} choices are more than the {room} sequences that may run and wait.")
        stream = Stream(asyncio.get_running_loop(), asyncio.Queue(), n)
        with self._lock:
            if self._closed or self.failed:
                raise EngineStopped("the engine takes no more requests.")
            if request.id in self._streams:
                raise UsageError(f"request {request.id!r} is running already.")
            if self._active + n > room:
                raise QueueFull(self._retry_after(self._active + n - room))
            self._streams[request.id] = stream
            self._active += n
            self._inbox.put(request)
        return Answer(self, request, stream.events)

    def abort(self, request_id: str) -> None:
        """End a request, from any thread; its pages are free before the next step. Unknown ids are ignored."""
        self._inbox.put(request_id)

    def stats(self) -> EngineStats:
        """Return what the engine is doing, from any thread."""
        stats = self._stats  # of the last step; requests that came since are queued
        return replace(stats, queued=max(stats.queued, self._active - stats.running))

    async def drain(self, seconds: float) -> bool:
        """Take no more requests and wait for those there are; abort what is left then. Whether none was."""
        with self._lock:
            self._closed = True
        if await self._wait(seconds):
            return True
        with self._lock:
            left = list(self._streams)
        for request_id in left:
            self.abort(request_id)
        await self._wait(ABORT_SECONDS)
        return False

    def stop(self) -> None:
        """End the thread; requests still running end with :class:`EngineStopped`."""
        with self._lock:
            self._closed = True
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()
        self._fail(EngineStopped("the engine was stopped."))

    # --- inside -------------------------------------------------------------------------------------------------

    async def _wait(self, seconds: float) -> bool:
        """Wait until nothing runs; whether that came in time."""
        end = time.monotonic() + seconds
        while self._streams and not self.failed:
            if time.monotonic() >= end:
                return False
            await asyncio.sleep(0.01)
        return not self._streams

    def _retry_after(self, places: int) -> float:
        """Guess how long it takes until so many choices have ended."""
        low, high = RETRY_SECONDS
        return min(max(places * self._seconds_each, low), high)

    def _run(self) -> None:
        try:
            while self._take_orders():
                events = self._engine.step()
                self._stats = self._engine.stats()
                self._deliver(events)
        except BaseException as error:
            self.failed = error
            stopped = EngineStopped(f"the engine failed: {error}")
            stopped.__cause__ = error
            self._fail(stopped)

    def _take_orders(self) -> bool:
        """Take in what was asked since the last step, or wait for something; whether to go on."""
        while self._engine.is_idle or not self._inbox.empty():
            try:
                order = self._inbox.get(timeout=self._engine.blocks.due_in())
            except Empty:  # nobody wants anything, and something has been idle for long
                self._engine.demote()
                self._stats = self._engine.stats()
                continue
            if order is None:
                return False
            if isinstance(order, Request):
                try:
                    self._engine.add(order)
                except Exception as error:  # checked before; whatever is wrong is wrong with this request alone
                    self._deliver([Failure(order.id, i, error) for i in range(order.params.n)])
            else:
                self._deliver([*self._engine.abort(order)])
                self._stats = self._engine.stats()
        return True

    def _deliver(self, events: list[Output | Failure]) -> None:
        """Hand events to their loops, all of a loop at once."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Output | BaseException]]] = defaultdict(list)
        with self._lock:
            for event in events:
                stream = self._streams.get(event.request_id)
                if stream is None:
                    continue
                if isinstance(event, Failure) or event.finish_reason:
                    self._count_end()
                    stream.left -= 1
                    if not stream.left:
                        del self._streams[event.request_id]
                batches[stream.loop].append((stream, event.error if isinstance(event, Failure) else event))
        for loop, batch in batches.items():
            _post(loop, batch)

    def _count_end(self) -> None:
        self._active -= 1
        now = time.monotonic()
        self._seconds_each += 0.1 * (min(now - self._last_finish, RETRY_SECONDS[1]) - self._seconds_each)
        self._last_finish = now

    def _fail(self, error: BaseException) -> None:
        """End all requests by an error."""
        with self._lock:
            self._closed = True
            streams, self._streams, self._active = self._streams, {}, 0
        for stream in streams.values():
            _post(stream.loop, [(stream, error)])


def _post(loop: asyncio.AbstractEventLoop, batch: list[tuple[Stream, Output | BaseException]]) -> None:
    def put() -> None:
        for stream, event in batch:
            stream.events.put_nowait(event)

    with suppress(RuntimeError):  # a loop that was closed has nobody who listens
        loop.call_soon_threadsafe(put)
