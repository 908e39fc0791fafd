"""A server's life as a process: the port, the signals, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import math
import signal
import socket
from collections.abc import Generator
from typing import TYPE_CHECKING

import uvicorn

from kvcli.errors import KvcliError, UsageError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from kvcli.server.served import ServingEngine

POLL_SECONDS = 0.1
LINGER_SECONDS = 1.0  # for /ready to be seen red after a failure, and for streams to get their last event
_UNWINDING = 5  # seconds beyond the draining, for the last bytes of aborted answers

log = logging.getLogger("kvcli.server")


class _Server(uvicorn.Server):
    """Uvicorn without its own signal handlers, which end in the death that the signal means."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """Take a port before anything slow happens; nobody can connect until the server listens.

    Raises
    ------
    UsageError
        If the host has no address.
    KvcliError
        If the port is taken, or not ours to take.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host} is no address of this machine: {error}.") from None
    taken = socket.socket(family, kind, protocol)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        # two sockets may be bound to one port as long as neither listens
        probe = taken.getsockname()
    except OSError as error:
        taken.close()
        raise KvcliError(f"cannot listen on {url(host, port)}: {error.strerror}.") from None
    taken.set_inheritable(False)
    log.debug("bound to %s", probe)
    return taken


def is_loopback(taken: socket.socket) -> bool:
    """Whether only this machine can reach a bound socket."""
    return ipaddress.ip_address(taken.getsockname()[0].partition("%")[0]).is_loopback


def url(host: str, port: int) -> str:
    """Return where to reach a host and port; the addresses that mean all are reached through this machine."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def run(app: FastAPI, engine: ServingEngine, taken: socket.socket, *, drain_seconds: float) -> signal.Signals:
    """Serve until a signal says stop, then finish what runs; return the signal.

    A second signal does not wait.

    Raises
    ------
    KvcliError
        If the engine failed, or the port was taken meanwhile.
    """
    return asyncio.run(_run(app, engine, taken, drain_seconds))


async def _run(app: FastAPI, engine: ServingEngine, taken: socket.socket, drain_seconds: float) -> signal.Signals:
    server = _Server(
        uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, ws="none", lifespan="off",
            timeout_graceful_shutdown=math.ceil(drain_seconds) + _UNWINDING,
        )
    )  # fmt: skip
    loop, asked = asyncio.get_running_loop(), asyncio.Queue[signal.Signals]()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.put_nowait, number)
    engine.start()
    serving = asyncio.create_task(server.serve(sockets=[taken]))
    try:
        ended = await _until_asked(server, engine, serving, asked)
        app.state.draining = True
        server.should_exit = True
        if ended is not None:
            log.info("draining", extra={"facts": {"signal": ended.name, "seconds": drain_seconds}})
            draining = asyncio.create_task(_drain(engine, drain_seconds))
            again = asyncio.create_task(asked.get())
            await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
            if not draining.done():
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(engine.drain(0), LINGER_SECONDS)
                loop.call_later(LINGER_SECONDS, setattr, server, "force_exit", True)
            for x in (draining, again):
                x.cancel()
        await serving
    except OSError as error:
        raise KvcliError(f"cannot listen: {error.strerror}.") from None
    finally:
        engine.stop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
    if engine.failed is not None or ended is None:
        raise KvcliError(f"the engine failed: {_sentence(engine.failed)}.")
    return ended


async def _until_asked(
    server: _Server, engine: ServingEngine, serving: asyncio.Task[None], asked: asyncio.Queue[signal.Signals]
) -> signal.Signals | None:
    """Wait for a signal and return it, or None once the engine has failed; raise what ends the server itself."""
    while True:
        with contextlib.suppress(asyncio.TimeoutError):
            return await asyncio.wait_for(asked.get(), POLL_SECONDS)
        if engine.failed is not None:
            log.error("the engine failed", exc_info=engine.failed)
            await asyncio.sleep(LINGER_SECONDS)
            return None
        if serving.done():
            await serving
            raise KvcliError("the server stopped by itself.")


async def _drain(engine: ServingEngine, seconds: float) -> None:
    if not await engine.drain(seconds):
        log.warning("answers were cut off", extra={"facts": {"after_seconds": seconds}})


def _sentence(error: BaseException | None) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": .")
