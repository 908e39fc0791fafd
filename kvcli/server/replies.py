"""An answer in the shape of its endpoint: whole, or event by event."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol, cast

from kvcli.engine.request import Output, TokenLogprob, Usage
from kvcli.server import schemas
from kvcli.server.answers import Answers, Choice
from kvcli.server.schemas import ChatRequest, CompletionRequest
from kvcli.server.streaming import event

Logprob = tuple[TokenLogprob, Sequence[TokenLogprob]]
NEAR = 4  # characters of a text that no token may stand for, before the next one that does


class Reply(Protocol):
    """How an endpoint shapes its answer."""

    @property
    def stream(self) -> bool:
        """Whether it goes out in events."""
        ...

    @property
    def include_usage(self) -> bool:
        """Whether the last event says how many tokens there were."""
        ...

    def whole(self, choices: list[Choice], usage: Usage) -> schemas.Completion | schemas.ChatCompletion:
        """Return the whole answer."""
        ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return what a choice's events begin with, if anything."""
        ...

    def part(self, index: int, output: Output) -> dict[str, Any]:
        """Return a choice as one event has it."""
        ...

    def envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return an event."""
        ...


async def events(reply: Reply, answers: Answers, count: int) -> AsyncIterator[str]:
    """Yield an answer's server-sent events, but for the one that says it is done."""
    silent = {"usage": None} if reply.include_usage else {}
    for index in range(count):
        if (opening := reply.opening(index)) is not None:
            yield event({**reply.envelope([opening]), **silent})
    async for index, output in answers.outputs():
        if output.text or output.logprob is not None or output.finish_reason is not None:
            yield event({**reply.envelope([reply.part(index, output)]), **silent})
    if reply.include_usage:
        yield event({**reply.envelope([]), "usage": usage_body(answers.usage).model_dump()})


def usage_body(usage: Usage) -> schemas.UsageBody:
    """Return how many tokens a request had, as OpenAI counts them."""
    return schemas.UsageBody(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=schemas.CachedTokens(cached_tokens=usage.cached_tokens),
    )


class _Reply:
    def __init__(self, model: str, request: CompletionRequest | ChatRequest, prefix: str, kind: str) -> None:
        self._facts = {
            "id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model
        }  # fmt: skip
        self.stream, self.include_usage = bool(request.stream), request.include_usage

    def envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._facts, "choices": choices}


class CompletionReply(_Reply):
    """Of ``/v1/completions``.

    Parameters
    ----------
    model
        Name.
    request
        What was asked.
    echoed
        The prompts' texts if they are to be repeated, else nothing.
    """

    def __init__(self, model: str, request: CompletionRequest, echoed: list[str]) -> None:
        super().__init__(model, request, "cmpl", "text_completion")
        self._n, self._echoed = request.n or 1, echoed
        self._wants_logprobs = request.logprobs is not None
        self._offsets: dict[int, int] = {}

    def whole(self, choices: list[Choice], usage: Usage) -> schemas.Completion:
        """Return the whole answer."""
        shaped = [
            schemas.CompletionChoice(
                index=i,
                text=self._echo(i) + x.text,
                logprobs=self._all_logprobs(i, x.prompt_logprobs, x.logprobs) if self._wants_logprobs else None,
                finish_reason=cast(Any, x.finish_reason),
            )
            for i, x in enumerate(choices)
        ]
        return schemas.Completion(**self._facts, choices=shaped, usage=usage_body(usage))  # type: ignore[arg-type]

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the prompt, if it is to be repeated; with log-probabilities it comes with the first token."""
        if not self._echoed or self._wants_logprobs:
            return None
        return self._shape(index, self._echo(index), None, None)

    def part(self, index: int, output: Output) -> dict[str, Any]:
        """Return a choice as one event has it."""
        found = None
        if output.logprob is not None:
            new = [(output.logprob, output.top_logprobs)]
            found = self._all_logprobs(index, output.prompt_logprobs, new).model_dump()
        text = self._echo(index) + output.text if output.prompt_logprobs else output.text
        return self._shape(index, text, found, output.finish_reason)

    def _echo(self, index: int) -> str:
        return self._echoed[index // self._n] if self._echoed else ""

    def _shape(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _all_logprobs(
        self, index: int, prompt: Sequence[Logprob], found: Sequence[Logprob]
    ) -> schemas.CompletionLogprobs:
        offsets = _offsets([token.text for token, _ in prompt], self._echo(index))
        at = self._offsets.get(index, len(self._echo(index)))
        for token, _ in found:
            offsets.append(at)
            at += len(token.text)
        self._offsets[index] = at
        every = [*prompt, *found]
        return schemas.CompletionLogprobs(
            tokens=[token.text for token, _ in every],
            token_logprobs=[None if token.logprob is None else _finite(token.logprob) for token, _ in every],
            top_logprobs=[None if token.logprob is None else _by_text(token, top) for token, top in every],
            text_offset=offsets,
        )


def _offsets(tokens: Sequence[str], text: str) -> list[int]:
    """Return where tokens begin in a text that lacks some: special ones, parts of characters, a first space."""
    out, at = [], 0
    for token in tokens:
        found = text.find(token, at, at + len(token) + NEAR)
        if found < 0 and text.startswith(token.lstrip(" "), at):
            found, token = at, token.lstrip(" ")
        out.append(max(found, at))
        at = found + len(token) if found >= 0 else at
    return out


def _by_text(token: TokenLogprob, top: Sequence[TokenLogprob]) -> dict[str, float]:
    """Return the likeliest tokens and the chosen one by their text; of two with one text the likelier."""
    known = [(_finite(x.logprob), x.text) for x in (token, *top) if x.logprob is not None]
    return {text: logprob for logprob, text in sorted(known)}


class ChatReply(_Reply):
    """Of ``/v1/chat/completions``.

    Parameters
    ----------
    model
        Name.
    request
        What was asked.
    """

    def __init__(self, model: str, request: ChatRequest) -> None:
        super().__init__(model, request, "chatcmpl", "chat.completion.chunk" if request.stream else "chat.completion")
        self._wants_logprobs = bool(request.logprobs)

    def whole(self, choices: list[Choice], usage: Usage) -> schemas.ChatCompletion:
        """Return the whole answer."""
        shaped = [
            schemas.ChatChoice(
                index=i,
                message=schemas.AssistantMessage(content=x.text),
                logprobs=_chat_logprobs(x.logprobs) if self._wants_logprobs else None,
                finish_reason=cast(Any, x.finish_reason),
            )
            for i, x in enumerate(choices)
        ]
        return schemas.ChatCompletion(**self._facts, choices=shaped, usage=usage_body(usage))  # type: ignore[arg-type]

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return whose answer it is."""
        return self._shape(index, {"role": "assistant", "content": ""}, None, None)

    def part(self, index: int, output: Output) -> dict[str, Any]:
        """Return a choice as one event has it."""
        found = None
        if output.logprob is not None:
            found = _chat_logprobs([(output.logprob, output.top_logprobs)]).model_dump()
        return self._shape(index, {"content": output.text} if output.text else {}, found, output.finish_reason)

    def _shape(self, index: int, delta: dict[str, str], logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _chat_logprobs(found: Sequence[Logprob]) -> schemas.ChatLogprobs:
    content = [
        schemas.ChatTokenLogprob(**_fields(token), top_logprobs=[schemas.TopLogprob(**_fields(x)) for x in top])
        for token, top in found
    ]
    return schemas.ChatLogprobs(content=content)


def _fields(x: TokenLogprob) -> dict[str, Any]:
    return {"token": x.text, "logprob": None if x.logprob is None else _finite(x.logprob), "bytes": list(x.bytes)}


def _finite(logprob: float) -> float:
    """Return a log-probability that JSON can hold; OpenAI writes -9999 for what cannot be."""
    return max(logprob, -9999.0)
