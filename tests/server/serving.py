"""What tests of the server share: a scripted engine, a tokenizer of bytes, and a server in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvcli.engine.config import EngineStats
from kvcli.engine.request import EngineStopped, Output, QueueFull, Request, TokenLogprob, Usage
from kvcli.server.app import create_app
from kvcli.server.served import ServedModel, Settings

CONTEXT = 256
VOCABULARY = 257
END = 256
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ANSWER = "Grüße, a long answer that nobody has to wait for."


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A token is a byte, and one more is the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    made.chat_template = template
    return made


@dataclass
class ScriptedEngine:
    """Answers every prompt with ``answer``, a character a step, cut at ``max_tokens`` and at stop strings."""

    answer: str = ANSWER
    step_seconds: float = 0.0
    max_context: int = CONTEXT
    full: bool = False
    failed: BaseException | None = None
    requests: list[Request] = field(default_factory=list)
    running: dict[str, float] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    tokens_out: int = 0
    drained: float | None = None
    stopped: bool = False

    def start(self) -> None:
        self.stopped = False

    async def submit(self, request: Request) -> AsyncIterator[Output]:
        if self.full:
            raise QueueFull(6.2)
        if self.failed or self.drained is not None:
            raise EngineStopped("the engine takes no more requests.")
        request.params.check(VOCABULARY)
        self.requests.append(request)
        self.running[request.id] = time.monotonic()
        return self._answer(request)

    def text(self, request: Request) -> tuple[str, str]:
        text, reason = self.answer, "stop"
        for stop in request.params.stop:
            text = text.split(stop)[0]
        if request.params.max_tokens is not None and len(text) > request.params.max_tokens:
            text, reason = text[: request.params.max_tokens], "length"
        return text, reason

    async def _answer(self, request: Request) -> AsyncIterator[Output]:
        params, (text, reason) = request.params, self.text(request)
        top = tuple(_logprob(ord("a") + i, -1.0 - i) for i in range(params.logprobs or 0))
        for i, character in enumerate(text):
            await self._step(request.id)
            if self.failed or request.id in self.aborted:
                break
            for index in range(params.n):
                prompt: tuple[tuple[TokenLogprob, tuple[TokenLogprob, ...]], ...] = ()
                if params.prompt_logprobs is not None and i == 0:
                    prompt = tuple((_logprob(x, -2.0 if at else None), ()) for at, x in enumerate(request.prompt))
                logprob = None if params.logprobs is None else TokenLogprob(i, -0.5, character, character.encode())
                self.tokens_out += 1
                yield Output(request.id, index, i, character, logprob, top, prompt_logprobs=prompt)
        if self.failed:
            raise EngineStopped("the engine has failed.")
        if request.id in self.aborted:
            reason = "abort"
        self.running.pop(request.id, None)
        for index in range(params.n):
            usage = Usage(len(request.prompt), len(text), 3)
            yield Output(request.id, index, finish_reason=reason, usage=usage)

    async def _step(self, request_id: str) -> None:
        end = time.monotonic() + self.step_seconds
        while not (self.failed or request_id in self.aborted):
            await asyncio.sleep(min(0.01, self.step_seconds))
            if time.monotonic() >= end:
                return

    def abort(self, request_id: str) -> None:
        if self.running.pop(request_id, None) is not None:
            self.aborted.append(request_id)

    def stats(self) -> EngineStats:
        return EngineStats(
            queued=2, running=len(self.running), pages_total=100, pages_used=10 * len(self.running), pages_cached=5,
            page_tokens=16, prefix_query_tokens=40, prefix_hit_tokens=30, preemptions=1, swapped_bytes=0, tokens_in=7,
            tokens_out=self.tokens_out, requests_finished=0, requests_aborted=len(self.aborted),
            max_context=self.max_context, pool_tokens=1600, full_sequences=6, cache_bytes=1 << 20, effective_bits=3.21,
            capacity_bytes=4096, demotions=3, promotions=2,
        )  # fmt: skip

    async def drain(self, seconds: float) -> bool:
        self.drained = seconds
        end = time.monotonic() + seconds
        while self.running and time.monotonic() < end:
            await asyncio.sleep(0.01)
        clean = not self.running
        for x in list(self.running):
            self.abort(x)
        return clean

    def stop(self) -> None:
        self.stopped = True


def _logprob(token: int, value: float | None) -> TokenLogprob:
    return TokenLogprob(token, value, chr(token), bytes([token]))


def app_of(
    engine: ScriptedEngine, settings: Settings | None = None, template: str | None = TEMPLATE, **sampling: float
):
    model = ServedModel("scripted", byte_tokenizer(template), VOCABULARY, sampling)
    return create_app(engine, model, settings or Settings())


@contextlib.contextmanager
def listening(app) -> Iterator[str]:
    """Serve an application on a free port in a thread; yields the URL."""
    taken = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none"))
    thread = threading.Thread(target=asyncio.run, args=(server.serve(sockets=[taken]),), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


def eventually(check, seconds: float = 10) -> None:
    """Wait until something holds; time enough for a machine that is busy with something else."""
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.01)
