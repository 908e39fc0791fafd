"""Server-sent events, and noticing at once that a client has left."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from kvcli.server.answers import Answers
from kvcli.server.errors import as_api_error

T = TypeVar("T")

DONE = "data: [DONE]\n\n"

log = logging.getLogger("kvcli.server")


class ClientLeftError(Exception):
    """Nobody waits for the answer any more."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what ``work`` returns, and cancel it as soon as the client closes the connection.

    Call it when the body has been read: then the only message left to receive is the client's going.

    Raises
    ------
    ClientLeftError
        If it left.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeftError
        return task.result()
    finally:
        for x in (task, gone):
            x.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: dict[str, Any]) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


class EventStream(StreamingResponse):
    """A stream of events that ends the engine's work when the client leaves, however little it has read.

    Parameters
    ----------
    events
        What to send. An error after the first byte cannot change the status any more: it becomes the last event.
    answers
        What is closed when the stream ends.
    """

    def __init__(self, events: AsyncIterator[str], answers: Answers) -> None:
        # a proxy that collects the answer before it passes it on takes the streaming away
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_with_errors(events), media_type="text/event-stream", headers=headers)
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        async with self._answers:
            await unless_gone(receive, self.stream_response(send))


async def _with_errors(events: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        async for x in events:
            yield x
    except Exception as error:
        answer = as_api_error(error)
        if answer.status == 500:
            log.exception("a stream failed")
        yield event(answer.body())
    yield DONE
