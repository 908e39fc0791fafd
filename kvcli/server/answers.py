"""The way to the engine and back: all prompts of one HTTP request, their choices merged as they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from typing_extensions import Self

from kvcli.engine.request import EngineStopped, Output, Request, SamplingParams, TokenLogprob, Usage
from kvcli.server.errors import ApiError
from kvcli.server.metrics import Metrics
from kvcli.server.served import ServingEngine


class Answers:
    """The choices of one HTTP request, while the block runs; leaving it ends whatever still computes.

    Parameters
    ----------
    engine
        Computes.
    prompts
        Tokens of each.
    params
        The same for all, the seed too: a prompt gets the answers that it would get alone.
    metrics
        Where times are counted.

    Attributes
    ----------
    usage
        Tokens of all choices that have ended, each prompt once.
    """

    def __init__(
        self, engine: ServingEngine, prompts: Sequence[list[int]], params: SamplingParams, metrics: Metrics
    ) -> None:
        self._engine, self._metrics, self._n = engine, metrics, params.n
        arrival = time.monotonic()
        self._requests = [Request(x, params, arrival=arrival) for x in prompts]
        self._queue: asyncio.Queue[tuple[int, Output] | Exception | None] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self.usage = Usage(sum(map(len, prompts)), 0)

    async def start(self) -> Self:
        """Queue all prompts, or none.

        Raises
        ------
        ApiError
            If a prompt leaves no room for an answer.
        QueueFull, UsageError, EngineStopped
            As the engine says.
        """
        longest = self._engine.max_context
        for request in self._requests:
            if len(request.prompt) >= longest:
                raise ApiError(
                    400,
                    f"The prompt has {len(request.prompt)} tokens, and the context of {longest} tokens holds prompt and"
                    f" answer: at most {longest - 1} fit.",
                    code="context_length_exceeded",
                    param="prompt",
                )
        try:
            for number, request in enumerate(self._requests):
                stream = await self._engine.submit(request)
                self._tasks.append(asyncio.create_task(self._pump(number * self._n, stream)))
        except BaseException:
            await self.close()
            raise
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End what still computes; nothing happens for what is done."""
        for task in self._tasks:
            task.cancel()
        for request in self._requests:  # an iterator that was never entered knows nothing of a cancelled task
            self._engine.abort(request.id)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """Yield the number of the choice and what it has to say, until the last choice has ended.

        Raises
        ------
        EngineStopped
            If the engine ended a choice that nobody asked it to end.
        """
        left, last = len(self._tasks), dict[int, float]()
        while left:
            item = await self._queue.get()
            if item is None:
                left -= 1
                continue
            if isinstance(item, Exception):
                raise item
            index, output = item
            if output.finish_reason == "abort":
                raise EngineStopped("the server is shutting down and could not finish this answer.")
            now = time.monotonic()
            if output.token_id is not None:
                self._metrics.token(now, last.get(index), self._requests[0].arrival)
                last[index] = now
            if output.usage is not None:
                self._count(index, output.usage)
            yield index, output
        self._metrics.finished(time.monotonic() - self._requests[0].arrival)

    def _count(self, index: int, usage: Usage) -> None:
        cached = usage.cached_tokens if index % self._n == 0 else 0
        self.usage = replace(
            self.usage,
            completion_tokens=self.usage.completion_tokens + usage.completion_tokens,
            cached_tokens=self.usage.cached_tokens + cached,
        )

    async def _pump(self, first: int, stream: AsyncIterator[Output]) -> None:
        try:
            async for output in stream:
                self._queue.put_nowait((first + output.index, output))
            self._queue.put_nowait(None)
        except Exception as error:
            self._queue.put_nowait(error)


@dataclass
class Choice:
    """One choice, put together from its outputs."""

    text: str = ""
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.logprobs: list[tuple[TokenLogprob, tuple[TokenLogprob, ...]]] = []
        self.prompt_logprobs: tuple[tuple[TokenLogprob, tuple[TokenLogprob, ...]], ...] = ()

    def add(self, output: Output) -> None:
        """Take one output in."""
        self.text += output.text
        self.finish_reason = output.finish_reason or self.finish_reason
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
        if output.logprob is not None:
            self.logprobs.append((output.logprob, output.top_logprobs))


async def gather(answers: Answers, count: int) -> list[Choice]:
    """Wait for all choices."""
    choices = [Choice() for _ in range(count)]
    async for index, output in answers.outputs():
        choices[index].add(output)
    return choices
