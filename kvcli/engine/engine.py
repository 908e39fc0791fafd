"""The engine: takes requests, steps, and says what came of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvcli.engine.blocks import BlockManager
from kvcli.engine.capacity import Repacker
from kvcli.engine.config import EngineConfig, EngineStats
from kvcli.engine.geometry import Geometry
from kvcli.engine.request import FinishReason, Output, Request, TokenLogprob, Usage
from kvcli.engine.runner import EngineRunner
from kvcli.engine.sampler import Sampled, SamplerState, sample, scored
from kvcli.engine.scheduler import Scheduler, Sequence
from kvcli.engine.text import Detokenizer, StopStrings, TokenText
from kvcli.engine.tier import Tier
from kvcli.errors import InputError, KvcliError, UsageError
from kvcli.runtime.packed_model import PackedModel

DEMOTED = 256  # tokens that are packed again beside a step, at most: a fraction of a step's prefill


@dataclass(eq=False, kw_only=True)
class Choice(Sequence):
    """One answer in the making.

    Attributes
    ----------
    request, index
        Which choice of which request.
    limit
        Tokens of prompt and answer at the most.
    sampler, text, stops
        Its own samplers of tokens and text.
    prompt_scores
        Of the prompt's tokens from the second on, as far as they were wanted and are known.
    """

    request: Request
    index: int
    limit: int
    sampler: SamplerState
    text: Detokenizer
    stops: StopStrings = field(init=False)
    prompt_scores: list[Sampled] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stops = StopStrings(self.request.params.stop)
        if self.request.params.prompt_logprobs is not None and self.prompt_tokens > 1:
            self.scored = 0


@dataclass(frozen=True)
class Failure:
    """A choice that ended by an error of its own."""

    request_id: str
    index: int
    error: BaseException


class Engine:
    """Requests in, tokens out, one step at a time; not for several threads.

    Parameters
    ----------
    model
        The model and its plan; with int4 weights it loses its own.
    config
        Settings.
    capacity
        The same model with the plan by which idle sequences are packed again; needed for ``config.idle_seconds``.

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
        if config.idle_seconds is not None and capacity is None:
            raise InputError("there is no plan to pack idle sequences by; calibrate with --adapters capacity.")
        self.runner = EngineRunner(model, config)
        size = self.runner.size
        self.tier: Tier | None = None
        if config.idle_seconds is not None and capacity is not None:
            packer = Repacker(self.runner.cache, capacity.plan, capacity.tensors, rope=model.loaded.rope)
            self.tier = Tier(packer, idle_seconds=config.idle_seconds, max_bytes=config.capacity_bytes)
        self.max_context, self.num_seqs = size.max_context, size.num_seqs
        self.vocabulary = self.runner.weights.head.shape[0]
        self.blocks = BlockManager(
            Geometry.of(model.plan), num_pages=size.num_pages, num_slots=size.num_slots, storage=self.runner.cache,
            prefix_caching=config.prefix_caching, tier=self.tier,
        )  # fmt: skip
        self.scheduler = Scheduler(
            self.blocks, max_num_seqs=size.num_seqs, chunk=self.runner.chunk, preemption=config.preemption,
            swap_bytes=config.swap_bytes,
        )  # fmt: skip
        self._choices: dict[str, list[Choice]] = {}  # of each request, those that have not ended
        self._count = self._tokens_in = self._tokens_out = self._finished = self._aborted = 0
        self._token_text = TokenText(model.loaded.tokenizer)
        ends: Any = model.loaded.model.generation_config.eos_token_id
        self._ends = {x for x in (ends if isinstance(ends, list) else [ends]) if x is not None}
        self._effective_bits = model.plan.effective_bits(self.max_context)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._choices

    def check(self, request: Request) -> None:
        """Raise :class:`UsageError` for a request that cannot be served."""
        request.params.check(self.vocabulary)
        tokens = len(request.prompt)
        if not tokens:
            raise UsageError("the prompt is empty.")
        if tokens >= self.max_context:
            raise UsageError(
                f"a prompt of {tokens} tokens leaves no room for an answer in a context of {self.max_context} tokens."
            )
        if not all(0 <= x < self.vocabulary for x in request.prompt):
            raise UsageError(f"the prompt has tokens outside the vocabulary of {self.vocabulary}.")

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises
        ------
        UsageError
            If it cannot be served, or its id is in use.
        """
        self.check(request)
        if request.id in self._choices:
            raise UsageError(f"request {request.id!r} is running already.")
        params, prompt = request.params, list(request.prompt)
        limit = self.max_context
        if params.max_tokens is not None:
            limit = min(limit, len(prompt) + params.max_tokens)
        self._count += 1
        choices = [
            Choice(
                order=(request.arrival, self._count, index), tokens=list(prompt), prompt_tokens=len(prompt),
                request=request, index=index, limit=limit, sampler=SamplerState(params, prompt, index),
                text=Detokenizer(self.model.loaded.tokenizer, prompt),
            )
            for index in range(params.n)
        ]  # fmt: skip
        self._choices[request.id] = choices
        for choice in choices:
            self.scheduler.add(choice)

    def abort(self, request_id: str) -> list[Output]:
        """End a request, and give its pages back; unknown ids give nothing."""
        out = []
        for choice in list(self._choices.get(request_id, ())):
            self._aborted += 1
            out.append(Output(request_id, choice.index, finish_reason="abort", usage=self._end(choice)))
        return out

    def step(self) -> list[Output | Failure]:
        """Compute one step.

        Raises
        ------
        KvcliError
            If the engine itself is broken; what goes wrong with one choice is a :class:`Failure` of that one.
        """
        self.demote()
        step, cache = self.scheduler.schedule(), self.runner.cache
        if not (step.decode or step.prefill) and self.scheduler.waiting and not self.scheduler.running:
            raise KvcliError("the engine cannot place a sequence that it has accepted.")
        ready: list[Any] = list(step.decode)
        found: list[Tensor] = []
        failed: list[Output | Failure] = []
        for choice in ready:
            cache.place(choice.table.slot, choice.table.pages, choice.held)
        if ready:
            tokens = [choice.tokens[choice.held] for choice in ready]
            found.append(self.runner.step([choice.table.slot for choice in ready], tokens))
            for choice in ready:
                self._advance(choice, 1)
        for choice, count in step.prefill:
            assert choice.table is not None
            cache.place(choice.table.slot, choice.table.pages, choice.held)
            chunk = choice.tokens[choice.held : choice.held + count]
            end, last = choice.held + count, count == choice.pending
            rows = int(last) if choice.scored is None else max(int(last), end - max(choice.held, choice.scored))
            logits = self.runner.extend(choice.table.slot, chunk, logits=rows)
            self._advance(choice, count)
            if logits is not None and choice.scored is not None:
                try:
                    self._score_prompt(choice, logits)  # type: ignore[arg-type]
                except Exception as error:
                    failed.append(self._fail(choice, error))  # type: ignore[arg-type]
                    continue
            if logits is not None and last:
                ready.append(choice)
                found.append(logits[-1:])
        return failed + (self._sample(ready, found[0] if len(found) == 1 else torch.cat(found)) if ready else [])

    def demote(self) -> None:
        """Pack again what has been idle for long, a bounded part of it; every step does so by itself."""
        self.blocks.demote(max(1, DEMOTED // self.model.plan.block_size))

    def stats(self) -> EngineStats:
        """Return what the engine is doing."""
        blocks, scheduler, plan, tier = self.blocks, self.scheduler, self.model.plan, self.tier
        pages = max(1, blocks.geometry.needed(self.max_context))
        full = min(self.num_seqs, blocks.num_pages // pages)
        return EngineStats(
            queued=len(scheduler.waiting), running=len(scheduler.running), pages_total=blocks.num_pages,
            pages_used=blocks.used, pages_cached=blocks.cached, page_tokens=plan.block_size,
            prefix_query_tokens=scheduler.prefix_query_tokens, prefix_hit_tokens=scheduler.prefix_hit_tokens,
            preemptions=scheduler.preemptions, swapped_bytes=scheduler.swapped_bytes, tokens_in=self._tokens_in,
            tokens_out=self._tokens_out, requests_finished=self._finished, requests_aborted=self._aborted,
            max_context=self.max_context, pool_tokens=blocks.num_pages * self.max_context // pages,
            full_sequences=full, cache_bytes=self.runner.cache.nbytes, effective_bits=self._effective_bits,
            **({} if tier is None else {
                "capacity_bytes": tier.nbytes, "demotions": tier.demotions, "promotions": tier.promotions,
            }),
        )  # fmt: skip

    # --- inside -------------------------------------------------------------------------------------------------

    def _advance(self, choice: Sequence, count: int) -> None:
        if choice.held < choice.prompt_tokens:
            self._tokens_in += count
        self.scheduler.advance(choice, count)

    def _score_prompt(self, choice: Choice, logits: Tensor) -> None:
        """Note what the newest tokens in the cache, one a row, say of the prompt's next."""
        assert choice.scored is not None
        first, end = choice.held - len(logits), choice.prompt_tokens - 1
        tokens = choice.tokens[first + 1 : min(choice.held, end) + 1]
        likeliest = choice.request.params.prompt_logprobs or 0
        choice.prompt_scores += scored(logits[: len(tokens)], tokens, [likeliest] * len(tokens))
        choice.scored = choice.held if choice.held < end else None

    def _sample(self, choices: list[Choice], logits: Tensor) -> list[Output | Failure]:
        """Choose a token for each; if that fails for one, only that one ends."""
        try:
            picked: Iterable[Sampled | Exception] = sample(logits, [x.sampler for x in choices])
        except Exception:
            picked = [self._sample_one(x, row) for x, row in zip(choices, logits, strict=True)]
        out: list[Output | Failure] = []
        for choice, found in zip(choices, picked, strict=True):
            try:
                if isinstance(found, Exception):
                    raise found
                out.append(self._take(choice, found))
            except Exception as error:
                out.append(self._fail(choice, error))
        return out

    def _fail(self, choice: Choice, error: Exception) -> Failure:
        self._end(choice)
        self._aborted += 1
        return Failure(choice.request.id, choice.index, error)

    def _sample_one(self, choice: Choice, logits: Tensor) -> Sampled | Exception:
        try:
            return sample(logits[None], [choice.sampler])[0]
        except Exception as error:
            return error

    def _take(self, choice: Choice, sampled: Sampled) -> Output:
        """Add a token to an answer."""
        token, params = sampled.token, choice.request.params
        choice.tokens.append(token)
        choice.sampler.add(token)
        self._tokens_out += 1
        reason: FinishReason | None = None
        text = ""
        if token in params.stop_token_ids or (token in self._ends and not params.ignore_eos):
            reason = "stop"
        else:
            text, stopped = choice.stops.add(choice.text.add(token))
            if stopped:
                return self._output(choice, sampled, text, "stop")
            if len(choice.tokens) >= choice.limit:
                reason = "length"
        if reason:  # what was held back, a stop string at the very end of it not
            rest, stopped = choice.stops.add(choice.text.finish())
            text += rest + choice.stops.finish()
            reason = "stop" if stopped else reason
        return self._output(choice, sampled, text, reason)

    def _output(self, choice: Choice, sampled: Sampled, text: str, reason: FinishReason | None) -> Output:
        usage = None
        if reason:
            self._finished += 1
            usage = self._end(choice)
        logprob = None if sampled.logprob is None else self._logprob(sampled.token, sampled.logprob)
        top = tuple(self._logprob(*x) for x in sampled.top)
        prompt: tuple[tuple[TokenLogprob, tuple[TokenLogprob, ...]], ...] = ()
        if choice.request.params.prompt_logprobs is not None and len(choice.tokens) == choice.prompt_tokens + 1:
            scores = [Sampled(choice.tokens[0]), *choice.prompt_scores]
            prompt = tuple((self._logprob(x.token, x.logprob), tuple(self._logprob(*y) for y in x.top)) for x in scores)
        return Output(choice.request.id, choice.index, sampled.token, text, logprob, top, reason, usage, prompt)

    def _logprob(self, token: int, logprob: float | None) -> TokenLogprob:
        return TokenLogprob(token, logprob, *self._token_text(token))

    def _end(self, choice: Choice) -> Usage:
        """Take a choice out, and count its tokens."""
        self.scheduler.remove(choice)
        left = self._choices[choice.request.id]
        left.remove(choice)
        if not left:
            del self._choices[choice.request.id]
        prompt = choice.prompt_tokens
        return Usage(prompt, len(choice.tokens) - prompt, choice.cached_tokens or 0)
