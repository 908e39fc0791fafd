"""How an engine is set up, and what it says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvcli.errors import UsageError

Preemption = Literal["swap", "recompute"]


@dataclass(frozen=True)
class EngineConfig:
    """The engine's settings.

    Attributes
    ----------
    memory
        Bytes of the cache: pages, tails, sinks and what the prefix cache keeps beside pages.
    max_num_seqs
        Sequences decoded in one step.
    max_queue
        Sequences that may wait; a choice of ``n`` is one.
    chunk
        Prompt tokens of one step, beside the tokens being decoded.
    max_context
        Tokens of the longest sequence, prompt and answer; None for the model's maximum.
    deterministic
        Greedy answers do not depend, to the bit, on what else runs. Costs speed.
    weights
        ``int4`` keeps linear layers in 4 bits.
    activations
        Bits that products of 4-bit layers round activations to: 8 is faster, and costs a little fidelity.
    threads
        Of the kernels; 0 for as many as torch uses.
    prefix_caching
        Keep the pages of finished sequences for prompts that begin alike.
    preemption
        What becomes of a sequence's cache when pages run out: ``swap`` copies its packed bytes to memory outside the
        pool and back, unchanged; ``recompute`` drops them and prefills again.
    swap_bytes
        The most that ``swap`` holds; beyond it sequences are recomputed.
    idle_seconds
        After so long unused, what the prefix cache has is packed again by the capacity plan, outside the pool, and
        expanded when a prompt begins with it: lossy. None for never.
    capacity_bytes
        The most that is held so.
    """

    memory: int
    max_num_seqs: int = 64
    max_queue: int = 256
    chunk: int = 256
    max_context: int | None = None
    deterministic: bool = False
    weights: Literal["none", "int4"] = "none"
    activations: Literal[8, 16] = 8
    threads: int = 0
    prefix_caching: bool = True
    preemption: Preemption = "swap"
    swap_bytes: int = 4 << 30
    idle_seconds: float | None = None
    capacity_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        for name in ("memory", "max_num_seqs", "max_queue", "chunk"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.max_context is not None and self.max_context < 2:
            raise UsageError(f"a context of {self.max_context} tokens has no room for an answer.")
        if self.preemption not in ("swap", "recompute"):
            raise UsageError(f"preemption {self.preemption!r} is neither 'swap' nor 'recompute'.")
        if self.idle_seconds is not None:
            if not 0 <= self.idle_seconds < float("inf"):
                raise UsageError(f"idle_seconds is {self.idle_seconds}; it must be a number of at least 0.")
            if self.deterministic:
                raise UsageError("packing idle sequences again loses a little, so it cannot be deterministic.")
            if not self.prefix_caching:
                raise UsageError("what is idle lies in the prefix cache: packing it again needs prefix caching.")


@dataclass(frozen=True)
class EngineStats:
    """What the engine is doing.

    Attributes
    ----------
    queued, running
        Sequences that wait (preempted ones too), and those with a place in the cache.
    pages_total, pages_used, pages_cached
        Pages of the pool; those that running sequences hold; those that only the prefix cache holds, free to be taken.
    page_tokens
        Tokens of a page.
    prefix_query_tokens, prefix_hit_tokens
        Prompt tokens that were looked up, and those found.
    preemptions
        Sequences put aside so far.
    swapped_bytes
        Held outside the pool for sequences put aside.
    tokens_in, tokens_out
        Prompt tokens computed, again where they had to be, and tokens generated.
    requests_finished, requests_aborted
        Choices that came to their end, and those that were cut off.
    max_context
        Tokens of the longest sequence that is taken.
    pool_tokens
        Tokens that fit the pool, in sequences of ``max_context``.
    full_sequences
        Sequences of ``max_context`` tokens that fit at once.
    cache_bytes
        Allocated for the cache: at most ``memory``.
    effective_bits
        The plan's, at ``max_context``.
    capacity_bytes
        Held outside the pool for what is idle, packed again.
    demotions, promotions
        Pages that were packed again so far, and those that were expanded since.
    """

    queued: int
    running: int
    pages_total: int
    pages_used: int
    pages_cached: int
    page_tokens: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    swapped_bytes: int
    tokens_in: int
    tokens_out: int
    requests_finished: int
    requests_aborted: int
    max_context: int
    pool_tokens: int
    full_sequences: int
    cache_bytes: int
    effective_bits: float
    capacity_bytes: int = 0
    demotions: int = 0
    promotions: int = 0
