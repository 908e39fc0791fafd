"""A pool without a model: it remembers which token of which text lies where, and whether each is what it must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvcli.engine.blocks import BlockManager, Table
from kvcli.engine.geometry import Geometry
from kvcli.engine.tier import Tier

GEOMETRIES = {
    "portable": Geometry(4, at_once=True, late=False),
    "window": Geometry(4, window=8),
    "odd window": Geometry(4, window=5, sinks=2),
    "small window": Geometry(4, window=1),
    "no window": Geometry(4),
    "sinks": Geometry(4, sinks=6),
    "mixed": Geometry(4, window=7, sinks=3, at_once=True),
}


def value(tokens: Sequence[int], at: int) -> int:
    """What stands for a token's keys and values: they depend on all tokens before it."""
    return hash(tuple(tokens[: at + 1]))


@dataclass
class Copy:
    """What was saved."""

    slot: Any
    pages: list[Any]
    nbytes: int


@dataclass
class Ledger:
    """A pool's content, written and read as the kernels do.

    A page has two halves: one stands for the layers that write at once, the other for those that write late.
    """

    geometry: Geometry
    num_pages: int
    num_slots: int
    pages: list[dict[tuple[str, int], int]] = field(init=False)
    slots: list[dict[tuple[str, int], int]] = field(init=False)

    def __post_init__(self) -> None:
        self.pages = [{} for _ in range(self.num_pages)]
        self.slots = [{} for _ in range(self.num_slots)]

    def copy_slot(self, source: int, target: int) -> None:
        assert source != target
        self.slots[target] = dict(self.slots[source])

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        assert not set(sources) & set(targets)
        for source, target in zip(sources, targets, strict=True):
            self.pages[target] = dict(self.pages[source])

    def save(self, slot: int, pages: Sequence[int]) -> Copy:
        return Copy(dict(self.slots[slot]), [dict(self.pages[x]) for x in pages], 10 + len(pages))

    def load(self, saved: Copy, slot: int, places: Sequence[tuple[int, int]]) -> None:
        self.slots[slot] = dict(saved.slot)
        for at, page in places:
            self.pages[page] = dict(saved.pages[at])

    def demote(self, first: int, pages: Sequence[int]) -> list[Copy]:
        return [Copy(first + i, [dict(self.pages[x])], 3) for i, x in enumerate(pages)]

    def promote(self, first: int, packed: Sequence[Copy], pages: Sequence[int]) -> None:
        assert [x.slot for x in packed] == list(range(first, first + len(pages)))
        assert len(set(pages)) == len(pages)
        for copy, page in zip(packed, pages, strict=True):
            self.pages[page] = dict(copy.pages[0])

    def feed(self, table: Table, tokens: Sequence[int], held: int) -> None:
        """Append token ``held``, and read all that its query sees."""
        g, slot, n = self.geometry, self.slots[table.slot], held + 1
        size, new = g.block_size, value(tokens, held)
        ring = g.window + size - 1
        if g.at_once:
            self.pages[table.pages[held // size]]["at once", held % size] = new
        if g.late:
            for block in range(g.complete(held) if g.late else 0, max(0, n - g.window) // size):
                for at in range(block * size, (block + 1) * size):
                    exact = new if at == held else slot["tail", at % ring]
                    self.pages[table.pages[block]]["late", at % size] = exact
            if held < g.sinks:
                slot["sinks", held] = new
            if ring:
                slot["tail", held % ring] = new
        self.read(table, tokens, n)

    def read(self, table: Table, tokens: Sequence[int], n: int) -> None:
        """Check every slot that the query at ``n`` - 1 sees."""
        g, slot = self.geometry, self.slots[table.slot]
        size, ring = g.block_size, g.window + g.block_size - 1
        boundary = max(0, n - g.window) // size * size
        for at in range(n):
            expected, page = value(tokens, at), table.pages[at // size] if at // size < len(table.pages) else -1
            if g.at_once:
                assert self.pages[page]["at once", at % size] == expected
            if g.late:
                if at < g.sinks:
                    assert slot["sinks", at] == expected
                if at < boundary:
                    assert self.pages[page]["late", at % size] == expected
                else:
                    assert slot["tail", at % ring] == expected


def check(blocks: BlockManager, tables: Sequence[Table]) -> None:
    """Every page and every slot has exactly the owners that the manager counts, and none is lost."""
    owners = [0] * blocks.num_pages
    for pages in [*(x.pages for x in tables), *(x.pages for x in blocks._kept.values())]:
        assert len(set(pages)) == len(pages)
        for page in pages:
            owners[page] += 1
    assert owners == blocks._references
    free, idle, used = set(blocks._free_pages), set(blocks._idle), {x for x, n in enumerate(owners) if n}
    assert len(free) == len(blocks._free_pages)
    assert free.isdisjoint(idle | used)
    assert idle.isdisjoint(used)
    assert len(free) + len(idle) + len(used) == blocks.num_pages
    assert {v: k for k, v in blocks._names.items()} == blocks._pages
    assert idle <= set(blocks._names)
    assert blocks._names.keys() == blocks._blocks.keys()
    for order in (list(blocks._idle.values()), [x.used for x in blocks._kept.values()]):
        assert order == sorted(order)
    if blocks.tier:
        assert blocks.tier.nbytes == sum(x.nbytes for x in blocks.tier._held.values()) <= blocks.tier._max_bytes
    slots = [*blocks._free_slots, *(x.slot for x in tables), *(x.slot for x in blocks._kept.values())]
    assert sorted(slots) == list(range(blocks.num_slots))
    assert blocks.used + blocks.available == blocks.num_pages
    assert blocks.used == len({x for table in tables for x in table.pages})


@pytest.fixture(scope="session")
def pool() -> Callable[..., tuple[Ledger, BlockManager]]:
    """Make a ledger and its manager by geometry, pages and slots."""

    def make(
        geometry: Geometry, pages: int, slots: int, tier: dict[str, Any] | None = None, **settings: Any
    ) -> tuple[Ledger, BlockManager]:
        ledger = Ledger(geometry, pages, slots)
        held = None if tier is None else Tier(ledger, **tier)
        return ledger, BlockManager(geometry, num_pages=pages, num_slots=slots, storage=ledger, tier=held, **settings)

    return make


@pytest.fixture(scope="session")
def check_pool() -> Callable[[BlockManager, Sequence[Table]], None]:
    return check


@pytest.fixture(params=GEOMETRIES)
def pool_geometry(request: pytest.FixtureRequest) -> Geometry:
    return GEOMETRIES[str(request.param)]
