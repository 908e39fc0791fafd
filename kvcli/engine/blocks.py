"""The pool's bookkeeping: which page and which slot belongs to whom, and what the prefix cache keeps.

A page is one block of tokens in every layer. Beside its pages a sequence has a slot: its sinks and its newest tokens,
exact. A page is complete, and never written again, once its tokens have left the residual window in every layer; then
it gets a name, the hash of all tokens up to its end, under which other sequences find and share it.

Pages alone do not let a sequence start in the middle: the exact tokens before that place were computed from exact
tokens before them, and so on to the beginning. So the cache also keeps slots, as they were at the end of a block, under
the block's name: where a prompt ended, where a sequence ended, and where a prompt turned out to part from an earlier
one. A hit is a kept slot whose complete pages are all there. (Caches of recurrent states have the same problem: Pan et
al., "Marconi: Prefix Caching for the Era of Hybrid LLMs", 2024, keep states at the same places.)

With a :class:`~kvcli.engine.tier.Tier`, pages and slots that nobody has used for long leave the pool for it, and come
back under their names when a sequence begins with them.

Nothing here touches memory: what must be copied is asked of :class:`~kvcli.engine.tables.Storage`.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from itertools import islice, takewhile
from typing import Any

from kvcli.engine.geometry import Geometry
from kvcli.engine.tables import Kept, Storage, Table
from kvcli.engine.tier import Place, Tier


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
    tier
        Where what is unused for long goes, if anywhere.
    """

    def __init__(
        self, geometry: Geometry, *, num_pages: int, num_slots: int, storage: Storage, prefix_caching: bool = True,
        tier: Tier | None = None,
    ) -> None:  # fmt: skip
        self.geometry, self.num_pages, self.num_slots, self.storage = geometry, num_pages, num_slots, storage
        self.prefix_caching, self.tier = prefix_caching, tier
        self._free_pages = list(reversed(range(num_pages)))
        self._free_slots = list(reversed(range(num_slots)))
        self._references = [0] * num_pages
        self._names: dict[int, bytes] = {}
        self._pages: dict[bytes, int] = {}
        self._blocks: dict[int, int] = {}  # of named pages
        self._idle: OrderedDict[int, float] = OrderedDict()  # named, unused since; the longest unused first
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
        while known < blocks and self._knows(table.names[known]):
            known += 1
        found, kept, aside = 0, None, None
        for block in range(blocks, 0, -1):
            if geometry.complete(block * size) > known:
                continue
            kept = self._kept.get(table.names[block - 1])
            aside = self.tier.slot(table.names[block - 1]) if self.tier and not kept else None
            if kept or aside or geometry.resumes_from_pages:
                found = block
                break
        complete = geometry.complete(found * size)
        here = [self._pages.get(name) for name in table.names[:complete]]
        table.pages = [page for page in here if page is not None]
        for page in table.pages:
            self._refer(page)
        if kept:
            self._use(table.names[found - 1])
        own = geometry.needed(found * size) - complete if kept or aside else 0
        slot = self._take_slot(sparing=kept)
        if slot is None or not self._take_pages(table, complete - len(table.pages) + own, sparing=kept):
            if slot is not None:
                self._free_slots.append(slot)
            self._release(table)
            return self.open(tokens, 0) if kept else None  # what was spared may be all there is
        table.slot, table.settled = slot, complete
        self._promote(table, here)
        rest = table.pages[complete:]
        if kept:
            self.storage.copy_slot(kept.slot, slot)
            if rest:
                self.storage.copy_pages(kept.pages, rest)
        elif aside:
            self.storage.load(aside, slot, list(enumerate(rest)))
            self.tier.keep_slot(table.names[found - 1])  # type: ignore[union-attr]
        return table, found * size, known * size

    def reopen(self, tokens: Sequence[int], held: int, saved: Any) -> Table | None:
        """Bring back a sequence of which ``held`` tokens were saved, or return None if there is no room."""
        table = Table(-1, apart=self.tier is not None)
        complete = self.geometry.complete(held)
        if self.prefix_caching and not table.apart:
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
        if table.apart or not self.prefix_caching:
            table.settled = complete
            return changed
        self._extend_names(table, tokens, complete)
        for block in range(table.settled, complete):
            name, page = table.names[block], table.pages[block]
            other = self._pages.get(name, page)
            if other == page:
                self._name(page, name, block)
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
            self._use(name)
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
        if self.tier:
            self.tier.clear()

    # --- the tier -----------------------------------------------------------------------------------------------

    def demote(self, most: int) -> None:
        """Move what nobody has used for long to the tier, if there is one: at most so many pages."""
        if self.tier is None:
            return
        since = self.tier.clock() - self.tier.idle_seconds
        pages = list(takewhile(lambda page: self._idle[page] <= since, islice(self._idle, most)))
        self.tier.demote([Place(self._names[page], self._blocks[page], page) for page in pages])
        for page in pages:
            del self._idle[page]
            self._unname(page)
            self._free_pages.append(page)
        for name, kept in list(self._kept.items()):
            if kept.used > since:
                break
            self.tier.keep_slot(name, self.storage.save(kept.slot, kept.pages))
            self._give_up(name)

    def due_in(self) -> float | None:
        """Seconds until something is due for the tier; None if nothing will be as things are."""
        oldest = [*islice(self._idle.values(), 1), *(x.used for x in islice(self._kept.values(), 1))]
        if self.tier is None or not oldest:
            return None
        return max(0.0, min(oldest) + self.tier.idle_seconds - self.tier.clock())

    def _promote(self, table: Table, here: list[int | None]) -> None:
        """Bring back blocks that are not ``here``, into the pages that were taken for them, and order all pages."""
        if self.tier is None or None not in here:
            return
        shared = len(here) - here.count(None)
        taken = iter(table.pages[shared : len(here)])
        pages = [next(taken) if page is None else page for page in here]
        places = [Place(table.names[i], i, pages[i]) for i, page in enumerate(here) if page is None]
        self.tier.promote(places)
        for x in places:
            self._name(x.page, x.name, x.block)
        table.pages[: len(here)] = pages

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
        self._kept[name] = Kept(slot, pages, self._now())

    def _extend_names(self, table: Table, tokens: Sequence[int], blocks: int) -> None:
        size, names = self.geometry.block_size, table.names
        for block in range(len(names), blocks):
            parent = names[-1] if names else b""
            content = array("q", tokens[block * size : (block + 1) * size]).tobytes()
            names.append(blake2b(parent + content, digest_size=16).digest())

    def _now(self) -> float:
        return self.tier.clock() if self.tier else 0.0

    def _knows(self, name: bytes) -> bool:
        return name in self._pages or (self.tier is not None and name in self.tier)

    def _name(self, page: int, name: bytes, block: int) -> None:
        self._pages[name], self._names[page], self._blocks[page] = page, name, block

    def _unname(self, page: int) -> None:
        del self._pages[self._names.pop(page)], self._blocks[page]

    def _use(self, name: bytes) -> None:
        """Count a kept slot as used just now."""
        self._kept.move_to_end(name)
        self._kept[name].used = self._now()

    def _refer(self, page: int) -> None:
        self._idle.pop(page, None)
        self._references[page] += 1

    def _drop(self, page: int) -> None:
        self._references[page] -= 1
        if not self._references[page]:
            if page in self._names:
                self._idle[page] = self._now()
            else:
                self._free_pages.append(page)

    def _release(self, table: Table) -> None:
        for page in reversed(table.pages):  # so that ends of prefixes are evicted before their beginnings
            self._drop(page)
        table.pages = []

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        self._unname(page)
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
                self._give_up(name)
                return True
        return False

    def _give_up(self, name: bytes) -> None:
        kept = self._kept.pop(name)
        self._free_slots.append(kept.slot)
        for page in kept.pages:
            self._drop(page)
