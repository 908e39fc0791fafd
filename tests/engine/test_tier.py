"""The capacity tier on a pool that remembers what lies where: what was idle leaves it, and comes back as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcli.engine.blocks import BlockManager
from kvcli.engine.geometry import Geometry
from kvcli.engine.tables import Table
from kvcli.engine.tier import Place, Tier

Pool = Callable[..., tuple[Any, BlockManager]]
Check = Callable[..., None]

WINDOW = Geometry(4, window=8)
MIXED = Geometry(4, window=7, sinks=3, at_once=True)
PORTABLE = Geometry(4, at_once=True, late=False)
PROMPT = list(range(60))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Blocks:
    """Packs by remembering which blocks it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, list[int]]] = []

    def demote(self, first: int, pages: list[int]) -> list[bytearray]:
        self.calls.append(("demote", first, list(pages)))
        return [Size(10) for _ in pages]

    def promote(self, first: int, packed: list[Any], pages: list[int]) -> None:
        self.calls.append(("promote", first, list(pages)))


class Size:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def places(*blocks: int, prefix: str = "") -> list[Place]:
    return [Place(f"{prefix}{x}".encode(), x, 100 + x) for x in blocks]


def feed(ledger: Any, blocks: BlockManager, table: Table, tokens: list[int], held: int) -> None:
    while held < len(tokens):
        assert blocks.grow(table, held + 1)
        ledger.feed(table, tokens, held)
        held += 1
        blocks.settle(table, tokens, held)


def finished(ledger: Any, blocks: BlockManager, tokens: list[int]) -> int:
    """Run a sequence to its end; return how many of its tokens were found."""
    opened = blocks.open(tokens, len(tokens) - 1)
    assert opened
    table, held, _ = opened
    ledger.read(table, tokens, held)
    feed(ledger, blocks, table, tokens, held)
    blocks.close(table, tokens, len(tokens))
    return held


def test_pages_are_packed_in_runs_of_blocks_and_the_longest_unused_goes_first() -> None:
    packer = Blocks()
    tier = Tier(packer, idle_seconds=1, max_bytes=50)  # type: ignore[arg-type]
    tier.demote([*places(3, 2), *places(5, 2, prefix="other ")])
    assert packer.calls == [("demote", 2, [102, 103]), ("demote", 2, [102]), ("demote", 5, [105])]
    assert (tier.nbytes, tier.demotions) == (40, 4)
    tier.keep_slot(b"3", Size(10))
    tier.promote(places(2, 3))
    assert packer.calls[-1] == ("promote", 2, [102, 103])
    assert tier.promotions == 2
    tier.demote(places(8, 7, prefix="new "))  # takes the place of what was unused for longest
    assert [x for x in (b"other 5", b"other 2", b"3", b"2", b"new 8", b"new 7") if x in tier] == [
        b"3", b"2", b"new 8", b"new 7",
    ]  # fmt: skip
    assert tier.slot(b"3") is not None
    before = len(packer.calls)
    tier.demote(places(2, 3))  # promoted pages are held still, and lose nothing a second time
    assert len(packer.calls) == before
    tier.keep_slot(b"9", Size(1000))  # more than fits: nothing is left, and nothing breaks
    assert tier.nbytes == 0
    tier.clear()
    assert b"2" not in tier


def test_what_is_held_already_may_have_to_go_for_what_comes() -> None:
    tier = Tier(Blocks(), idle_seconds=1, max_bytes=20)  # type: ignore[arg-type]
    tier.demote(places(1))
    tier.demote([*places(4, 3), *places(1)])
    assert [x for x in (b"1", b"3", b"4") if x in tier] == [b"3", b"4"]
    assert tier.nbytes == 20


def test_idle_pages_and_slots_leave_the_pool_and_come_back(
    pool_geometry: Geometry, pool: Pool, check_pool: Check
) -> None:
    clock = Clock()
    ledger, blocks = pool(pool_geometry, 40, 4, {"idle_seconds": 10, "max_bytes": 10**6, "clock": clock})
    tier = blocks.tier
    assert tier is not None
    assert blocks.due_in() is None
    assert finished(ledger, blocks, PROMPT) == 0
    clock.now = 4.0
    assert blocks.due_in() == 6.0
    blocks.demote(100)
    assert (tier.nbytes, blocks.cached > 0) == (0, True)
    clock.now = 10.0
    assert blocks.due_in() == 0.0
    blocks.demote(100)
    assert blocks.cached == 0
    assert len(blocks._free_pages) == 40
    assert tier.demotions == pool_geometry.complete(60)
    assert tier.nbytes > 0
    assert blocks.due_in() is None
    for page in ledger.pages:
        page.clear()  # others were there meanwhile
    found = finished(ledger, blocks, [*PROMPT, *range(100, 120)])
    assert found == 60
    assert tier.promotions == pool_geometry.complete(60)
    check_pool(blocks, [])
    assert finished(ledger, blocks, [*PROMPT, *range(100, 130)]) == 80  # of the pool, and not promoted again
    assert tier.promotions == pool_geometry.complete(60)
    blocks.forget()
    assert tier.nbytes == 0


def test_a_step_packs_so_many_pages_and_the_ends_of_prefixes_first(pool: Pool, check_pool: Check) -> None:
    clock = Clock()
    ledger, blocks = pool(WINDOW, 40, 4, {"idle_seconds": 0, "max_bytes": 10**6, "clock": clock})
    finished(ledger, blocks, PROMPT)
    blocks.demote(5)
    assert blocks.tier is not None
    assert blocks.tier.demotions == 5
    assert sorted(blocks._blocks.values()) == list(range(8))
    check_pool(blocks, [])
    assert finished(ledger, blocks, [*PROMPT, 1, 2]) == 60  # half of it from the pool, half from the tier
    assert blocks.tier.promotions == 5
    check_pool(blocks, [])


def test_pages_of_the_middle_come_back_to_their_places(pool: Pool, check_pool: Check) -> None:
    ledger, blocks = pool(PORTABLE, 40, 4, {"idle_seconds": 0, "max_bytes": 10**6, "clock": Clock()})
    finished(ledger, blocks, PROMPT)
    for block in (1, 2, 6):
        page = next(x for x, b in blocks._blocks.items() if b == block)
        blocks._idle.move_to_end(page, last=False)
    blocks.demote(3)
    assert sorted(set(range(15)) - set(blocks._blocks.values())) == [1, 2, 6]
    assert finished(ledger, blocks, [*PROMPT, 1, 2]) == 60
    check_pool(blocks, [])


def test_without_room_to_expand_nothing_is_lost(pool: Pool, check_pool: Check) -> None:
    ledger, blocks = pool(MIXED, 16, 3, {"idle_seconds": 0, "max_bytes": 10**6, "clock": Clock()})
    finished(ledger, blocks, PROMPT)
    blocks.demote(100)
    other = blocks.open([7] * 20, 19)
    assert other
    feed(ledger, blocks, other[0], [7] * 20, 0)
    assert blocks.open([*PROMPT, 1], 60) is None  # 15 pages, and 11 are free
    check_pool(blocks, [other[0]])
    blocks.close(other[0], [7] * 20, 20)
    assert finished(ledger, blocks, [*PROMPT, 1]) == 60


def test_who_was_put_aside_gets_its_own_pages_back_and_not_what_was_expanded(pool: Pool, check_pool: Check) -> None:
    ledger, blocks = pool(WINDOW, 60, 6, {"idle_seconds": 0, "max_bytes": 10**6, "clock": Clock()})
    opened = blocks.open(PROMPT, 59)
    assert opened
    feed(ledger, blocks, opened[0], PROMPT, 0)
    saved = ledger.save(opened[0].slot, opened[0].pages)
    blocks.close(opened[0], PROMPT, 60)
    blocks.demote(100)
    other = blocks.open([*PROMPT, 1], 60)
    assert other
    assert other[1] == 60
    for page in other[0].pages:
        ledger.pages[page].clear()  # as a lossy page is not what it was
    table = blocks.reopen(PROMPT, 60, saved)
    assert table
    ledger.read(table, PROMPT, 60)
    tokens = [*PROMPT, *range(200, 230)]
    feed(ledger, blocks, table, tokens, 60)
    assert not set(table.pages) & set(other[0].pages)
    check_pool(blocks, [table, other[0]])
    blocks.close(table, tokens, 90)
    blocks.close(other[0], PROMPT, 60)
    check_pool(blocks, [])
    assert blocks.used == 0


def test_without_a_tier_nothing_is_due(pool: Pool) -> None:
    ledger, blocks = pool(WINDOW, 40, 4)
    finished(ledger, blocks, PROMPT)
    blocks.demote(100)
    assert blocks.due_in() is None
    assert blocks.cached > 0


OPERATIONS = st.lists(st.tuples(st.sampled_from("ooofffffkcdtt"), st.integers(0, 9), st.integers(1, 12)), max_size=60)


@pytest.mark.parametrize("most", [10**6, 60])
@settings(max_examples=60)
@given(
    geometry=st.sampled_from([WINDOW, MIXED, PORTABLE]), pages=st.integers(6, 24), slots=st.integers(1, 5),
    operations=OPERATIONS,
)  # fmt: skip
def test_no_order_of_events_leaks_a_page_or_shows_a_wrong_one(
    geometry: Geometry, pages: int, slots: int, operations: list[tuple[str, int, int]], pool: Pool, check_pool: Check,
    most: int,
) -> None:  # fmt: skip
    clock = Clock()
    ledger, blocks = pool(geometry, pages, slots, {"idle_seconds": 3, "max_bytes": most, "clock": clock})
    running: list[tuple[Table, list[int], int]] = []
    for kind, which, count in operations:
        if kind == "t":
            clock.now += which
        elif kind == "d":
            blocks.demote(count)
        elif kind == "o":  # a few texts that share beginnings of several lengths
            tokens = [*([1] * (3 * (which % 4))), *([which] * count), 2]
            if opened := blocks.open(tokens, len(tokens) - 1):
                running.append((opened[0], tokens, opened[1]))
        elif running:
            at = which % len(running)
            table, tokens, held = running[at]
            if kind == "k":
                blocks.keep(table, tokens, held)
            elif kind == "c":
                blocks.close(table, tokens, held)
                del running[at]
            else:
                for _ in range(count):
                    if not blocks.grow(table, held + 1):
                        break
                    if held == len(tokens):
                        tokens.append(which)
                    ledger.feed(table, tokens, held)
                    held += 1
                    blocks.settle(table, tokens, held)
                running[at] = table, tokens, held
        check_pool(blocks, [x[0] for x in running])
        for other in running:
            ledger.read(*other)
    for table, tokens, held in running:
        blocks.close(table, tokens, held)
    assert blocks.used == 0
    blocks.forget()
    assert sorted(blocks._free_pages) == list(range(pages))
