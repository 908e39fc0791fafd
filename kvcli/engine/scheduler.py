"""Who runs in the next step.

Every step decodes one token of each sequence that has its prompt behind it, and beside that prefills so many prompt
tokens, oldest request first. When pages run out the youngest sequence is put aside, and comes back before any younger
one begins.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from typing import Any

from kvcli.engine.blocks import BlockManager
from kvcli.engine.config import Preemption
from kvcli.engine.tables import Table


@dataclass(eq=False)
class Sequence:
    """One choice of one request.

    Attributes
    ----------
    order
        Where it stands: arrival, a running number, the choice.
    tokens
        Prompt, and what was generated.
    prompt_tokens
        Of them.
    held
        Tokens in the cache.
    table
        Its pages and slot while it runs.
    saved
        Its cache while it is swapped out.
    cuts
        Lengths at which its slot is kept for others.
    scored
        The place of the first prompt token whose scores are still wanted, so that everything from there on must be
        computed and not only found; None if none is wanted.
    cached_tokens
        Prompt tokens found in the prefix cache, None before it was looked up.
    """

    order: tuple[float, int, int]
    tokens: list[int]
    prompt_tokens: int
    held: int = 0
    table: Table | None = None
    saved: Any = None
    cuts: set[int] = field(default_factory=set)
    scored: int | None = None
    cached_tokens: int | None = None

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.tokens) - self.held


@dataclass
class Step:
    """What one step computes: a token each of some sequences, and chunks of others with their lengths."""

    decode: list[Sequence] = field(default_factory=list)
    prefill: list[tuple[Sequence, int]] = field(default_factory=list)


class Scheduler:
    """Fills steps.

    Parameters
    ----------
    blocks
        The pool.
    max_num_seqs
        Sequences that run at once.
    chunk
        Prompt tokens of a step.
    preemption
        How sequences are put aside. Swapping is the default: packed bytes are so few that copying them costs less than
        computing even a small part of them again, and it changes no bit of the answer.
    swap_bytes
        The most that is kept of sequences put aside; what does not fit is computed again.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        chunk: int,
        preemption: Preemption = "swap",
        swap_bytes: int = 4 << 30,
    ) -> None:
        self.blocks, self.max_num_seqs, self.chunk = blocks, max_num_seqs, chunk
        self.preemption, self.swap_bytes = preemption, swap_bytes
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []  # both oldest first
        self.preemptions = self.swapped_bytes = self.prefix_query_tokens = self.prefix_hit_tokens = 0

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        insort(self.waiting, sequence, key=lambda x: x.order)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that has ended, or must, and give its pages back."""
        if sequence.table is not None:
            self.running.remove(sequence)
            self.blocks.close(sequence.table, sequence.tokens, sequence.held)
            sequence.table = None
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._forget_saved(sequence)

    def schedule(self) -> Step:
        """Choose what the next step computes, and make room for it."""
        step, before = Step(), self.preemptions
        for sequence in list(self.running):
            if sequence.pending == 1 and self._make_room(sequence):
                step.decode.append(sequence)
        budget = self.chunk
        for sequence in self.running:
            if sequence.pending > 1:
                budget -= self._add_chunk(step, sequence, budget)
        while self.waiting and budget and len(self.running) < self.max_num_seqs and self.preemptions == before:
            if not self._admit(self.waiting[0]):
                break
            sequence = self.waiting.pop(0)
            insort(self.running, sequence, key=lambda x: x.order)
            if sequence.pending > 1:
                budget -= self._add_chunk(step, sequence, budget)
            elif self.blocks.grow(sequence.table, len(sequence.tokens)):  # type: ignore[arg-type]
                step.decode.append(sequence)
        return step

    def advance(self, sequence: Sequence, count: int) -> list[int]:
        """Note that so many tokens more are in the cache; return the blocks whose page became another one."""
        assert sequence.table is not None
        sequence.held += count
        changed = self.blocks.settle(sequence.table, sequence.tokens, sequence.held)
        if sequence.held in sequence.cuts:
            self.blocks.keep(sequence.table, sequence.tokens, sequence.held)
        return changed

    # --- inside -------------------------------------------------------------------------------------------------

    def _add_chunk(self, step: Step, sequence: Sequence, budget: int) -> int:
        cuts = [x - sequence.held for x in sequence.cuts if x > sequence.held]
        count = min([budget, sequence.pending, *cuts])
        if count:
            step.prefill.append((sequence, count))
        return count

    def _make_room(self, sequence: Sequence) -> bool:
        """Let a sequence grow by a token, at the cost of the youngest; False if that is the sequence itself."""
        while sequence.table is not None:
            if self.blocks.grow(sequence.table, sequence.held + 1):
                return True
            self._preempt(self.running[-1])
        return False

    def _preempt(self, sequence: Sequence) -> None:
        table = sequence.table
        assert table is not None
        self.running.remove(sequence)
        self.preemptions += 1
        if self.preemption == "swap":
            pages = table.pages[: self.blocks.geometry.needed(sequence.held)]
            saved = self.blocks.storage.save(table.slot, pages)
            if self.swapped_bytes + saved.nbytes <= self.swap_bytes:
                sequence.saved = saved
                self.swapped_bytes += saved.nbytes
        self.blocks.close(table, sequence.tokens, sequence.held)
        sequence.table = None
        if sequence.saved is None:
            sequence.held = 0
        self.add(sequence)

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence its place, with the pages of all its tokens, if there is one."""
        blocks, tokens = self.blocks, sequence.tokens
        # each running sequence may want a page soon: room for that spares putting the newcomer aside at once
        if self.running and blocks.cost(tokens) + len(self.running) > blocks.available:
            return False
        if sequence.saved is not None:
            table = blocks.reopen(tokens, sequence.held, sequence.saved)
            if table is None:
                return False
        else:
            opened = blocks.open(tokens, len(tokens) - 1 if sequence.scored is None else sequence.scored)
            if opened is None:
                return False
            table, sequence.held, known = opened
            self._choose_cuts(sequence, known)
        if not blocks.grow(table, len(tokens)):
            if sequence.saved is None:
                sequence.held = 0
                blocks.close(table, tokens, 0)
            else:
                blocks.close(table, tokens, sequence.held)
            return False
        self._forget_saved(sequence)
        sequence.table = table
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.held
            self.prefix_query_tokens += sequence.prompt_tokens
            self.prefix_hit_tokens += sequence.held
        return True

    def _choose_cuts(self, sequence: Sequence, known: int) -> None:
        """Keep the slot where the prompt parts from an earlier one, and at the prompt's last whole block."""
        geometry = self.blocks.geometry
        if not self.blocks.prefix_caching or geometry.resumes_from_pages:
            return
        end = sequence.prompt_tokens
        rest = end % geometry.block_size
        sequence.cuts = {known, end if rest <= geometry.slack else end - rest} - {0}

    def _forget_saved(self, sequence: Sequence) -> None:
        if sequence.saved is not None:
            self.swapped_bytes -= sequence.saved.nbytes
            sequence.saved = None
