"""What a caller asks of the engine, and what comes back."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kvcli.errors import KvcliError, UsageError

FinishReason = Literal["stop", "length", "abort"]
MAX_LOGPROBS = 20  # likeliest tokens that can be reported, as OpenAI's
MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_LENGTH = 256  # characters of one stop string: so much text is held back at the most
MAX_BIASES = 1024
MAX_SEED = 2**63


class QueueFull(KvcliError):
    """The queue holds as many requests as it may.

    Attributes
    ----------
    retry_after
        Seconds after which to try again: a guess from how fast requests have finished lately.
    """

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after:.0f} s.")
        self.retry_after = retry_after


class EngineStopped(KvcliError):
    """The engine takes no more requests: it is draining, was stopped, or has failed."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to end.

    Attributes
    ----------
    max_tokens
        Tokens to generate at the most; None for as many as fit the context.
    temperature
        0 takes the likeliest token.
    top_p, top_k, min_p
        Sample only from the likeliest tokens of this mass, from so many, or from those at least ``min_p`` times as
        likely as the likeliest; 1, 0 and 0 leave all.
    repetition_penalty
        Scores of tokens that were there before, in the prompt too, are divided by it where positive and multiplied
        where negative; 1 for nothing.
    presence_penalty, frequency_penalty
        Taken off the scores of tokens generated before: once, and once for each time.
    seed
        Of the sampling; None for another one each time. Choice i of ``n`` takes ``seed + i``.
    stop
        Strings that end an answer; they are not part of it.
    stop_token_ids
        Tokens that end an answer beside the model's own, and are not part of its text.
    logprobs
        Report the log-probability of each token, and those of so many of the likeliest; None for none. They are the
        model's own, before temperature and penalties.
    prompt_logprobs
        The same for the tokens of the prompt. Such a prompt is computed whole, whatever the prefix cache has of it.
    n
        Answers to one prompt.
    logit_bias
        Added to the scores of tokens.
    ignore_eos
        Go on after the model's own end.
    """

    max_tokens: int | None = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    ignore_eos: bool = False

    def check(self, vocabulary: int) -> None:
        """Raise :class:`UsageError` for what lies outside its range, given the vocabulary's size."""
        if self.max_tokens is not None:
            _within("max_tokens", self.max_tokens, 1, math.inf)
        _within("temperature", self.temperature, 0, 100)
        _within("top_p", self.top_p, 0, 1, open_below=True)
        _within("top_k", self.top_k, 0, math.inf)
        _within("min_p", self.min_p, 0, 1)
        _within("repetition_penalty", self.repetition_penalty, 0, 100, open_below=True)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        _within("n", self.n, 1, MAX_CHOICES)
        if self.seed is not None:
            _within("seed", self.seed, -MAX_SEED, MAX_SEED - 1)
        for name, asked in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if asked is not None:
                _within(name, asked, 0, MAX_LOGPROBS)
        if len(self.stop) > MAX_STOPS:
            raise UsageError(f"{len(self.stop)} stop strings are more than {MAX_STOPS}.")
        if not all(0 < len(x) <= MAX_STOP_LENGTH for x in self.stop):
            raise UsageError(f"a stop string has 1 to {MAX_STOP_LENGTH} characters.")
        if len(self.logit_bias) > MAX_BIASES:
            raise UsageError(f"logit_bias names {len(self.logit_bias)} tokens, more than {MAX_BIASES}.")
        for name, tokens in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token in tokens:
                if not 0 <= token < vocabulary:
                    raise UsageError(f"{name} names token {token}, and the vocabulary ends at {vocabulary - 1}.")
        for bias in self.logit_bias.values():
            _within("logit_bias", bias, -100, 100)


def _within(name: str, value: float, low: float, high: float, *, open_below: bool = False) -> None:
    """Raise unless a number is finite and within its bounds."""
    if not (math.isfinite(value) and low <= value <= high) or (open_below and value == low):
        end = "" if high == math.inf else f" and at most {high:g}"
        raise UsageError(f"{name} is {value}; it must be {'above' if open_below else 'at least'} {low:g}{end}.")


@dataclass(frozen=True)
class Request:
    """One prompt to complete.

    Attributes
    ----------
    prompt
        Token ids.
    params
        How.
    id
        Of the caller's choosing, or a new one; no two running requests share one.
    arrival
        Seconds of :func:`time.monotonic`; earlier requests go first.
    """

    prompt: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    arrival: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Usage:
    """Tokens of one choice.

    Attributes
    ----------
    prompt_tokens, completion_tokens
        How long both are.
    cached_tokens
        Tokens of the prompt that the prefix cache spared.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural-log probability, its text as far as it is valid UTF-8, and its bytes.

    The first token of a prompt has no probability, for nothing comes before it.
    """

    token_id: int
    logprob: float | None
    text: str
    bytes: bytes


@dataclass(frozen=True)
class Output:
    """One step of one choice.

    Attributes
    ----------
    request_id, index
        Which request, and which of its ``n`` choices.
    token_id
        The token, None in an event that only ends a choice.
    text
        What can be shown now: nothing while a character or a stop string may be incomplete.
    logprob, top_logprobs
        Of the token and of the likeliest ones, best first, if asked for.
    finish_reason
        Set in the last event of the choice: ``stop`` if the model or a stop string ended it, ``length`` if it was cut,
        ``abort``.
    usage
        With ``finish_reason``.
    prompt_logprobs
        In the first event, if asked for: of each token of the prompt, with the likeliest in its place.
    """

    request_id: str
    index: int
    token_id: int | None = None
    text: str = ""
    logprob: TokenLogprob | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    prompt_logprobs: tuple[tuple[TokenLogprob, tuple[TokenLogprob, ...]], ...] = ()
