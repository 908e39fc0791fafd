"""What every request passes before an endpoint sees it: size, host, key; and the one line that is logged of it."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import uuid
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvcli.server.errors import ApiError, as_api_error
from kvcli.server.metrics import Metrics
from kvcli.server.served import Settings
from kvcli.server.streaming import ClientLeftError

OPEN = {"/", "/health", "/ready", "/metrics"}
"""Paths that need no key: they say nothing of what is asked and answered."""

LEFT = 499  # what is logged of a client that did not wait
_DISCARD_SECONDS = 5

log = logging.getLogger("kvcli.server")


class Guard:
    """ASGI middleware.

    Parameters
    ----------
    app
        What it stands before.
    settings, metrics
        The server's.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, name = time.monotonic(), LEFT, f"req-{uuid.uuid4().hex}"

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        scope.setdefault("state", {})["request_id"] = name
        bounded = _bounded(receive, self._settings.max_body_bytes)
        try:
            await self._check(scope, receive)
            await self._app(scope, bounded, observed)
        except ClientLeftError:
            status = LEFT
        except Exception as error:
            answer = as_api_error(error)
            if answer.status == 500:
                log.exception("%s failed", name)
            if status == LEFT:  # nothing was sent yet
                await answer.response()(scope, bounded, observed)
        finally:
            self._note(scope, status, time.monotonic() - began, name)

    async def _check(self, scope: Scope, receive: Receive) -> None:
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._settings.max_body_bytes:
            await _discard(receive)
            raise _too_large(self._settings.max_body_bytes)
        hosts = self._settings.allowed_hosts
        if hosts is not None and _host(headers.get("host", "")) not in hosts:
            said = "This server answers only to its own address; give it an API key, or --insecure."
            raise ApiError(403, said, code="unknown_host")
        # a preflight carries no key; whoever answers those stands before this
        if self._key is None or scope["path"] in OPEN:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self._key):
            said = "Wrong API key." if given else "Missing API key: send Authorization: Bearer KEY."
            raise ApiError(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _note(self, scope: Scope, status: int, seconds: float, name: str) -> None:
        route: Any = scope.get("route")
        endpoint = getattr(route, "path", "other")  # paths that do not exist are as many as anybody cares to ask for
        self._metrics.response(endpoint, status)
        facts = {
            "request": name, "method": scope["method"], "endpoint": endpoint, "status": status,
            "seconds": round(seconds, 4), **scope["state"].get("log", {}),
        }  # fmt: skip
        level = logging.DEBUG if endpoint in OPEN and status == 200 else logging.INFO
        log.log(level, "request", extra={"facts": facts})


def _host(header: str) -> str:
    """Return a Host header's name, without the port."""
    return header.rpartition("]")[0] + "]" if header.startswith("[") else header.partition(":")[0].lower()


def _bounded(receive: Receive, limit: int) -> Receive:
    """Count the bytes of a body, and refuse it once they are too many.

    The rest is read and thrown away for a moment: a client that is still writing would see its connection reset and not
    the answer.
    """
    total = 0

    async def bounded() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > limit:
            if message.get("more_body"):
                await _discard(receive)
            raise _too_large(limit)
        return message

    return bounded


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"The body is larger than {limit} bytes")


async def _discard(receive: Receive) -> None:
    async def rest() -> None:
        while (await receive()).get("more_body"):
            pass

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(rest(), _DISCARD_SECONDS)
