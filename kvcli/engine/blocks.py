"""The pool's bookkeeping: which page and which slot belongs to whom, and what the prefix cache keeps.

A page is one block of tokens in every layer. Beside its pages a sequence has a slot: its sinks and its newest tokens,
exact. A page is complete, and never written again, once its tokens have left the residual window in every layer; then
it gets a name, the hash of all tokens up to its end, under which other sequences find and share it.

Pages alone do not let a sequence start in the middle: the exact tokens before that place were computed from exact
tokens before them, and so on to the beginning. So the cache also keeps slots, as they were at the end of a block, under
the block's name: where a prompt ended, where a sequence ended, and where a prompt turned out to part from an earlier
one. A hit is a kept slot whose complete pages are all there. (Caches of recurrent states have the same problem: Pan et
al., "Marconi: Prefix Caching for the Era of Hybrid LLMs", 2024, keep states at the same places.)

Nothing here touches memory: what must be copied is asked of :class:`Storage`.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Protocol

from kvcli.engine.geometry import Geometry


class Storage(Protocol):
    """What moves bytes; :class:`kvcli.engine.pool.PoolCache` in earnest."""

    def copy_slot(self, source: int, target: int) -> None:
        """Copy a slot's sinks and tail."""

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy pages in every layer."""

    def save(self, slot: int, pages: Sequence[int]) -> Any:
        """Copy a slot and pages out of the pool; what is returned has ``nbytes``."""

    def load(self, saved: Any, slot: int, places: Sequence[tuple[int, int]]) -> None:
        """Copy a slot back, and of the saved pages those at the given places to the given pages."""


@dataclass
class Table:
    """What one sequence holds.

    Attributes
    ----------
    slot
        Its row of sinks and tails.
    pages
        The pages of its blocks, in order.
    names
        Hashes of its full blocks, each with all before it.
    settled
        Blocks that were complete when last looked at: shared, or entered into the cache.
    """

    slot: int
    pages: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    settled: int = 0


@dataclass
class Kept:
    """A slot of the prefix cache, and pages that no name leads to yet because some layer would still write to them."""

    slot: int
    pages: list[int]


class BlockManager:
    """Pages and slots of one pool.

    Parameters
    ----------
    geometry
        How sequences lie.
    num_pages, num_slots
        How many there are.
    storage
        What copies them.
    prefix_caching
        Whether anything outlives its sequence.
    """

    def __init__(
        self, geometry: Geometry, *, num_pages: int, num_slots: int, storage: Storage, prefix_caching: bool = True
    ) -> None:
        self.geometry, self.num_pages, self.num_slots, self.storage = geometry, num_pages, num_slots, storage
        self.prefix_caching = prefix_caching
        self._free_pages = list(reversed(range(num_pages)))
        self._free_slots = list(reversed(range(num_slots)))
        self._references = [0] * num_pages
        self._names: dict[int, bytes] = {}
        self._pages: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # named, unused; the longest unused first
        self._kept: OrderedDict[bytes, Kept] = OrderedDict()  # the longest unused first

    # --- counting -----------------------------------------------------------------------------------------------

    @property
    def available(self) -> int:
        """Pages that are free or can be freed at once."""
        return len(self._free_pages) + len(self._idle) + self._only_kept

    @property
    def used(self) -> int:
        """Pages that sequences hold."""
        return self.num_pages - self.available

    @property
    def cached(self) -> int:
        """Pages that only the prefix cache holds."""
        return len(self._idle) + self._only_kept

    @property
    def _only_kept(self) -> int:
        """Unnamed or named pages that only kept slots refer to."""
        counts: dict[int, int] = {}
        for kept in self._kept.values():
            for page in kept.pages:
                counts[page] = counts.get(page, 0) + 1
        return sum(self._references[page] == count for page, count in counts.items())

    # --- beginning and ending -----------------------------------------------------------------------------------

    def open(self, tokens: Sequence[int], limit: int) -> tuple[Table, int, int] | None:
        """Give a sequence a slot, and whatever the cache has of its beginning.

        Parameters
        ----------
        tokens
            The sequence's.
        limit
            Tokens that may be found at the most: at least one must be computed.

        Returns
        -------
        tuple
            The table; the tokens it holds; and how many tokens, in whole blocks, are known to be shared with an earlier
            sequence although no slot was kept there. None if there is no slot, or no page to copy to.
        """
        table = Table(-1)
        size, geometry = self.geometry.block_size, self.geometry
        blocks = limit // size if self.prefix_caching else 0
        self._extend_names(table, tokens, blocks)
        known = 0
        while known < blocks and table.names[known] in self._pages:
            known += 1
        found, kept = 0, None
        for block in range(blocks, 0, -1):
            if geometry.complete(block * size) > known:
                continue
            kept = self._kept.get(table.names[block - 1])
            if kept or geometry.resumes_from_pages:
                found = block
                break
        table.pages = [self._pages[name] for name in table.names[: geometry.complete(found * size)]]
        table.settled = len(table.pages)
        for page in table.pages:
            self._refer(page)
        if kept:
            self._kept.move_to_end(table.names[found - 1])
        own = kept.pages if kept else []
        slot = self._take_slot(sparing=kept)
        if slot is None or not self._take_pages(table, len(own), sparing=kept):
            if slot is not None:
                self._free_slots.append(slot)
            self._release(table)
            return self.open(tokens, 0) if kept else None  # what was spared may be all there is
        table.slot = slot
        if kept:
            self.storage.copy_slot(kept.slot, slot)
            if own:
                self.storage.copy_pages(own, table.pages[table.settled :])
        return table, found * size, known * size

    def reopen(self, tokens: Sequence[int], held: int, saved: Any) -> Table | None:
        """Bring back a sequence of which ``held`` tokens were saved, or return None if there is no room."""
        table = Table(-1)
        complete = self.geometry.complete(held)
        if self.prefix_caching:
            self._extend_names(table, tokens, complete)
            for name in table.names:  # only up to the first that is gone: pages are taken in order
                if name not in self._pages:
                    break
                table.pages.append(self._pages[name])
        for page in table.pages:
            self._refer(page)
        table.settled = shared = len(table.pages)
        if not self._take_pages(table, self.geometry.needed(held) - shared):
            self._release(table)
            return None
        slot = self._take_slot()
        if slot is None:
            self._release(table)
            return None
        table.slot = slot
        self.storage.load(saved, slot, list(enumerate(table.pages))[shared:])
        self.settle(table, tokens, held)
        return table

    def cost(self, tokens: Sequence[int]) -> int:
        """Return how many of the available pages a new sequence would take, at most."""
        table, shared = Table(-1), 0
        if self.prefix_caching:
            self._extend_names(table, tokens, self.geometry.complete(len(tokens)))
            for name in table.names:
                page = self._pages.get(name)
                if page is None:
                    break
                shared += page not in self._idle  # what others use is not available anyway
        return self.geometry.needed(len(tokens)) - shared

    def grow(self, table: Table, tokens: int) -> bool:
        """Make room for so many tokens, or change nothing and return False."""
        return self._take_pages(table, self.geometry.needed(tokens) - len(table.pages))

    def settle(self, table: Table, tokens: Sequence[int], held: int) -> list[int]:
        """Name the pages that are complete now that a sequence holds ``held`` tokens.

        A page whose content another page has already is given back, and the other one shared.

        Returns
        -------
        list
            The blocks whose page became another one.
        """
        changed: list[int] = []
        complete = self.geometry.complete(held)
        if not self.prefix_caching:
            table.settled = complete
            return changed
        self._extend_names(table, tokens, complete)
        for block in range(table.settled, complete):
            name, page = table.names[block], table.pages[block]
            other = self._pages.setdefault(name, page)
            if other == page:
                self._names[page] = name
            else:
                self._refer(other)
                self._drop(page)
                table.pages[block] = other
                changed.append(block)
        table.settled = complete
        return changed

    def keep(self, table: Table, tokens: Sequence[int], held: int) -> bool:
        """Keep a copy of a sequence's slot for others that begin alike; whether there is one now."""
        block = self._keepable(table, tokens, held)
        if not block:
            return False
        name = table.names[block - 1]
        if name in self._kept:
            self._kept.move_to_end(name)
            return True
        slot = self._take_slot()
        if slot is None:
            return False
        self.storage.copy_slot(table.slot, slot)
        self._keep(name, slot, table, block)
        return True

    def close(self, table: Table, tokens: Sequence[int], held: int) -> None:
        """Take back what a sequence of ``held`` tokens has; its slot is kept if others could begin from it."""
        block = self._keepable(table, tokens, held)
        if block and table.names[block - 1] not in self._kept:
            self._keep(table.names[block - 1], table.slot, table, block)
        else:
            self._free_slots.append(table.slot)
        self._release(table)
        table.slot = -1

    def forget(self) -> None:
        """Empty the prefix cache."""
        while self._kept:
            self._drop_kept()
        while self._idle:
            self._free_pages.append(self._evict())

    # --- inside -------------------------------------------------------------------------------------------------

    def _keepable(self, table: Table, tokens: Sequence[int], held: int) -> int:
        """Return the block at whose end a slot could be kept, or 0."""
        block, rest = divmod(held, self.geometry.block_size)
        if not self.prefix_caching or self.geometry.resumes_from_pages or rest > self.geometry.slack:
            return 0
        self._extend_names(table, tokens, block)
        return block

    def _keep(self, name: bytes, slot: int, table: Table, block: int) -> None:
        end = block * self.geometry.block_size
        pages = table.pages[self.geometry.complete(end) : self.geometry.needed(end)]
        for page in pages:
            self._refer(page)
        self._kept[name] = Kept(slot, pages)

    def _extend_names(self, table: Table, tokens: Sequence[int], blocks: int) -> None:
        size, names = self.geometry.block_size, table.names
        for block in range(len(names), blocks):
            parent = names[-1] if names else b""
            content = array("q", tokens[block * size : (block + 1) * size]).tobytes()
            names.append(blake2b(parent + content, digest_size=16).digest())

    def _refer(self, page: int) -> None:
        self._idle.pop(page, None)
        self._references[page] += 1

    def _drop(self, page: int) -> None:
        self._references[page] -= 1
        if not self._references[page]:
            if page in self._names:
                self._idle[page] = None
            else:
                self._free_pages.append(page)

    def _release(self, table: Table) -> None:
        for page in reversed(table.pages):  # so that ends of prefixes are evicted before their beginnings
            self._drop(page)
        table.pages = []

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._pages[self._names.pop(page)]
        return page

    def _take_pages(self, table: Table, count: int, sparing: Kept | None = None) -> bool:
        """Add so many pages to a table, or none."""
        if count <= 0:
            return True
        while len(self._free_pages) + len(self._idle) < count:
            if not self._drop_kept(sparing, with_pages=True):
                return False
        for _ in range(count):
            page = self._free_pages.pop() if self._free_pages else self._evict()
            self._references[page] = 1
            table.pages.append(page)
        return True

    def _take_slot(self, sparing: Kept | None = None) -> int | None:
        if not self._free_slots and not self._drop_kept(sparing):
            return None
        return self._free_slots.pop()

    def _drop_kept(self, sparing: Kept | None = None, *, with_pages: bool = False) -> bool:
        """Give up the kept slot that was unused for longest."""
        for name, kept in self._kept.items():
            if kept is not sparing and (kept.pages or not with_pages):
                del self._kept[name]
                self._free_slots.append(kept.slot)
                for page in kept.pages:
                    self._drop(page)
                return True
        return False
