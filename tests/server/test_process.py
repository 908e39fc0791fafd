"""A server as a process: the port, signals, failure. The engine is scripted; `test_serve.py` has the real one."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
import time

import httpx
import pytest
from serving import ANSWER, ScriptedEngine, app_of, eventually

from kvcli.errors import KvcliError, UsageError
from kvcli.server import logs, process


class Server:
    """A process of its own, forked from this one, which has everything imported."""

    def __init__(self, step: float = 0.0, drain: float = 30) -> None:
        out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        taken = process.bind("127.0.0.1", 0)
        self.url, self._streams = process.url("127.0.0.1", taken.getsockname()[1]), (out, err)
        self.pid = os.fork()
        if not self.pid:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
            code = 99
            try:
                code = serve(taken, step, drain)
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        taken.close()
        eventually(self._answers, 60)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health").status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, **more: object) -> tuple[threading.Thread, list[httpx.Response | Exception]]:
        """Ask in a thread; a list that will have the answer."""
        found: list[httpx.Response | Exception] = []

        def ask() -> None:
            try:
                found.append(httpx.post(f"{self.url}/v1/completions", json={"prompt": "a", **more}, timeout=60))
            except httpx.HTTPError as error:
                found.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        while "kvcli_running_sequences 1.0" not in httpx.get(f"{self.url}/metrics").text:
            time.sleep(0.02)
        return thread, found

    def end(self, *signals: int) -> tuple[int, str, str]:
        """Send signals, wait, and return the exit code, stdout and stderr."""
        for number in signals:
            os.kill(self.pid, number)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        for stream in self._streams:
            stream.seek(0)
        out, err = (x.read().decode().strip() for x in self._streams)
        return code, out, err


def serve(taken: socket.socket, step: float, drain: float) -> int:
    logs.set_up(as_json=False)
    engine = ScriptedEngine(step_seconds=step)
    signal.signal(signal.SIGUSR1, lambda *_: setattr(engine, "failed", RuntimeError("no kernels")))
    try:
        print(process.run(app_of(engine), engine, taken, drain_seconds=drain).name)
    except KvcliError as error:
        print(error)
        return error.exit_code
    return 0


@pytest.fixture
def started():
    made: list[Server] = []

    def start(**more: object) -> Server:
        made.append(Server(**more))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for server in made:
        if server.pid:
            server.end(signal.SIGKILL)


def test_sigterm_lets_answers_finish(started):
    server = started(step=0.05)
    thread, found = server.ask(max_tokens=40)
    code, out, err = server.end(signal.SIGTERM)
    thread.join()
    assert (code, out) == (0, "SIGTERM")
    assert found[0].json()["choices"][0]["text"] == ANSWER[:40]
    assert "draining" in err
    assert "cut off" not in err
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)


def test_what_does_not_finish_in_time_is_cut_off_and_told(started):
    server = started(step=1, drain=0.3)
    thread, found = server.ask(max_tokens=40, stream=False)
    code, out, err = server.end(signal.SIGTERM)
    thread.join()
    assert (code, out) == (0, "SIGTERM")
    assert found[0].status_code == 503
    assert "shutting down" in found[0].json()["error"]["message"]
    assert "answers were cut off" in err


def test_a_second_signal_does_not_wait(started):
    server = started(step=10)
    thread, found = server.ask()
    os.kill(server.pid, signal.SIGINT)
    time.sleep(0.5)
    began = time.monotonic()
    code, out, _ = server.end(signal.SIGINT)
    thread.join()
    assert (code, out) == (0, "SIGINT")
    assert time.monotonic() - began < 20  # of the 30 that draining may take
    assert isinstance(found[0], httpx.HTTPError) or found[0].status_code == 503


def test_a_failed_engine_ends_streams_and_the_process(started):
    server = started(step=1)
    thread, found = server.ask(max_tokens=48, stream=True)
    os.kill(server.pid, signal.SIGUSR1)
    red = False
    while not red:
        try:
            red = httpx.get(f"{server.url}/ready").status_code == 503
        except httpx.TransportError:
            break
    code, out, _ = server.end()
    thread.join()
    assert red
    assert (code, out) == (1, "the engine failed: RuntimeError: no kernels.")
    assert "the engine has failed" in found[0].text
    assert found[0].text.endswith("data: [DONE]\n\n")
    assert "Traceback" not in out


def test_ports():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(KvcliError, match=f"cannot listen on http://127.0.0.1:{port}: Address already in use."):
            process.bind("127.0.0.1", port)
    with pytest.raises(UsageError, match="no address"):
        process.bind("no such host", 0)
    if os.geteuid():
        with pytest.raises(KvcliError, match="Permission denied"):
            process.bind("127.0.0.1", 1)


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("localhost", True), ("127.8.8.8", True), ("0.0.0.0", False)]
)
def test_who_can_reach_an_address(host, local):
    with process.bind(host, 0) as taken:
        assert process.is_loopback(taken) == local


def test_a_port_that_somebody_listens_on_meanwhile_is_one_sentence():
    with process.bind("127.0.0.1", 0) as mine, process.bind("127.0.0.1", mine.getsockname()[1]) as other:
        other.listen()
        engine = ScriptedEngine()
        with pytest.raises(KvcliError, match="cannot listen: "):
            process.run(app_of(engine), engine, mine, drain_seconds=1)
        assert engine.stopped


@pytest.mark.parametrize(
    ("host", "shown"),
    [("127.0.0.1", "http://127.0.0.1:80"), ("0.0.0.0", "http://127.0.0.1:80"), ("::", "http://[::1]:80"),
     ("::1", "http://[::1]:80"), ("a.example", "http://a.example:80")],
)  # fmt: skip
def test_urls(host, shown):
    assert process.url(host, 80) == shown
