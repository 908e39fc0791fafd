"""Packed storage that sequences share: one pool of pages, and a pool of slots for what lies beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcli.engine.config import EngineConfig
from kvcli.engine.geometry import Geometry
from kvcli.errors import BudgetError
from kvcli.plan import CachePlan
from kvcli.runtime.native_cache import NativeCache

SHORT = 256  # tokens: memory that does not hold one sequence as short as this is an error
KEPT_SHARE = 32  # the prefix cache keeps slots in this part of the memory, beside those of sequences


@dataclass(frozen=True)
class PoolSize:
    """What fits a number of bytes.

    Attributes
    ----------
    num_pages
        Pages of all layers.
    num_slots
        Sinks and tails, of sequences and of the prefix cache.
    num_seqs
        Sequences that can run at once.
    max_context
        Tokens of the longest one.
    """

    num_pages: int
    num_slots: int
    num_seqs: int
    max_context: int

    @classmethod
    def of(cls, plan: CachePlan, config: EngineConfig, max_context: int) -> PoolSize:
        """Divide ``config.memory`` for a model of ``max_context`` tokens.

        Raises
        ------
        BudgetError
            If it does not hold one short sequence; the message names the least.
        """
        geometry, memory = Geometry.of(plan), config.memory
        context = min(max_context, config.max_context or max_context)
        page, slot = page_bytes(plan), slot_bytes(plan)
        least = slot + page * max(1, geometry.needed(min(SHORT, context)))
        if memory < least:
            raise BudgetError(f"{memory} bytes do not hold one sequence of the cache; it takes at least {least}.")
        seqs = min(config.max_num_seqs, memory // least)
        slots = seqs
        if config.prefix_caching and not geometry.resumes_from_pages:
            slots += min(max(1, memory // KEPT_SHARE // slot), config.max_num_seqs, (memory - seqs * least) // slot)
        useful = config.max_num_seqs * geometry.needed(context) * (2 if config.prefix_caching else 1)
        pages = min((memory - slots * slot) // page, useful)
        return cls(pages, slots, seqs, min(context, geometry.longest(pages)))


def page_bytes(plan: CachePlan) -> int:
    """Bytes of one page in all layers; sliding layers keep all their pages here."""
    return sum(x.page_bytes(plan.block_size) for x in plan.layers)


def slot_bytes(plan: CachePlan) -> int:
    """Bytes of the sinks and tails of one sequence."""
    width = 4 if plan.exact_dtype == "float32" else 2
    return sum((plan.sinks(i) + plan.tail(i)) * x.scalars_per_token * width for i, x in enumerate(plan.layers))


@dataclass(frozen=True)
class Saved:
    """A sequence's bytes outside the pool: pages, tail and sinks of each layer."""

    layers: list[tuple[Tensor, Tensor, Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(x.nbytes for layer in self.layers for x in layer)


class PoolCache(NativeCache):
    """A :class:`NativeCache` whose rows are slots, and whose sequences take pages from one pool.

    A page's number is the same in every layer, so all layers read one set of block tables.

    Parameters
    ----------
    plan, geometry
        As there.
    size
        Pages and slots.
    settings
        What else a :class:`NativeCache` takes.
    """

    def __init__(self, plan: CachePlan, geometry: Any, *, size: PoolSize, **settings: Any) -> None:
        self._num_pages = size.num_pages
        self.tables = torch.full((size.num_slots, -(-size.max_context // plan.block_size)), -1, dtype=torch.int32)
        self._listed: list[list[int]] = [[] for _ in range(size.num_slots)]
        super().__init__(plan, geometry, capacity=size.max_context, batch_size=size.num_slots, **settings)

    def _pool(self, index: int) -> int:
        return self._num_pages

    def _tables(self, index: int) -> Tensor:
        return self.tables

    def place(self, slot: int, pages: Sequence[int], length: int) -> None:
        """Say which pages the sequence in a slot has, and how many tokens it holds."""
        if self._listed[slot] != pages:
            self.tables[slot].fill_(-1)
            self.tables[slot, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
            self._listed[slot] = list(pages)
        if self.host_lengths[slot] != length:
            self.advance_to(length, slot)

    def copy_slot(self, source: int, target: int) -> None:
        """Copy a slot's sinks and tail."""
        for store in self.layers:
            store.tail[target] = store.tail[source]
            store.sinks[target] = store.sinks[source]

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy pages in every layer."""
        for store in self.layers:
            store.pages[list(targets)] = store.pages[list(sources)]

    def save(self, slot: int, pages: Sequence[int]) -> Saved:
        """Copy a slot and pages out of the pool."""
        return Saved([(x.pages[list(pages)], x.tail[slot].clone(), x.sinks[slot].clone()) for x in self.layers])

    def load(self, saved: Saved, slot: int, places: Sequence[tuple[int, int]]) -> None:
        """Copy a slot back, and of the saved pages those at the given places to the given pages."""
        sources, targets = [x for x, _ in places], [x for _, x in places]
        for store, (pages, tail, sinks) in zip(self.layers, saved.layers, strict=True):
            store.tail[slot], store.sinks[slot] = tail, sinks
            store.pages[targets] = pages[sources]
