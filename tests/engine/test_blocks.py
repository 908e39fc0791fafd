"""The block manager on a pool that remembers what lies where: nothing leaks, and whoever shares reads what is his."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcli.engine.blocks import BlockManager, Table
from kvcli.engine.geometry import Geometry
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat

Pool = Callable[..., tuple[Any, BlockManager]]
Check = Callable[..., None]

WINDOW = Geometry(4, window=8)
MIXED = Geometry(4, window=7, sinks=3, at_once=True)
GEOMETRIES = st.builds(
    lambda size, window, sinks, at_once, late: Geometry(
        size, window if late else 0, sinks if late else 0, at_once or not late, late
    ),
    st.sampled_from([2, 4]), st.integers(0, 9), st.integers(0, 5), st.booleans(), st.booleans(),
)  # fmt: skip


class Text:
    """A sequence being fed."""

    def __init__(self, tokens: list[int], table: Table, held: int) -> None:
        self.tokens, self.table, self.held = tokens, table, held


def start(blocks: BlockManager, tokens: list[int]) -> Text:
    opened = blocks.open(tokens, len(tokens) - 1)
    assert opened
    return Text(tokens, opened[0], opened[1])


def feed(ledger: Any, blocks: BlockManager, text: Text, until: int) -> None:
    while text.held < until:
        assert blocks.grow(text.table, text.held + 1)
        ledger.feed(text.table, text.tokens, text.held)
        text.held += 1
        blocks.settle(text.table, text.tokens, text.held)


def test_a_geometry_counts_pages_as_the_plan_does() -> None:
    coded, exact = KVFormat(4, "channel", 16, symmetric=False), KVFormat(16)
    for formats in ([coded], [exact], [coded, exact], [KVFormat(4, group=8)]):
        for window, sinks in ((0, 0), (0, 2), (24, 0), (16, 4)):
            layers = tuple(LayerPlan(2, 8, x, x) for x in formats)
            plan = CachePlan(layers, residual_window=window, sink_tokens=sinks)
            geometry = Geometry.of(plan)
            for n in range(100):
                assert geometry.needed(n) == max(plan.num_pages(i, n) for i in range(len(layers)))
                assert geometry.complete(n) == min(plan.boundary(i, n) // 16 for i in range(len(layers)))
                assert geometry.needed(geometry.longest(n)) == n
                assert geometry.needed(geometry.longest(n) + 1) == n + 1


def test_a_prompt_that_begins_like_a_finished_one_starts_behind_it(
    pool_geometry: Geometry, pool: Pool, check_pool: Check
) -> None:
    ledger, blocks = pool(pool_geometry, 40, 6)
    first = start(blocks, list(range(30)))
    feed(ledger, blocks, first, 28)
    assert blocks.keep(first.table, first.tokens, 28) != pool_geometry.resumes_from_pages
    feed(ledger, blocks, first, 30)
    blocks.close(first.table, first.tokens, 30)
    second = start(blocks, [*range(30), *range(100, 120)])
    assert second.held == 28
    feed(ledger, blocks, second, 50)
    check_pool(blocks, [second.table])
    other = start(blocks, [7, *range(1, 30)])
    assert other.held == 0


@pytest.mark.parametrize("window", range(10))
def test_a_slot_is_kept_only_while_it_has_all_that_is_read_from_there(window: int, pool: Pool) -> None:
    geometry, tokens = Geometry(4, window=window, sinks=1), list(range(40))
    for held in range(12, 30):
        ledger, blocks = pool(geometry, 30, 3)
        first = start(blocks, tokens)
        feed(ledger, blocks, first, held)
        kept = blocks.keep(first.table, tokens, held)
        assert kept or held % 4
        second = start(blocks, tokens)
        assert second.held == (held // 4 * 4 if kept else 0)
        feed(ledger, blocks, second, 40)
        feed(ledger, blocks, first, 40)


def test_where_prompts_part_a_slot_is_worth_keeping(pool: Pool, check_pool: Check) -> None:
    ledger, blocks = pool(WINDOW, 60, 6)
    shared = list(range(40))
    first = start(blocks, [*shared, *range(100, 130)])
    feed(ledger, blocks, first, 70)
    opened = blocks.open([*shared, 7, 8, 9], 42)
    assert opened
    table, found, known = opened
    assert (found, known) == (0, 40)  # the pages are there, but no slot
    second = Text([*shared, 7, 8, 9], table, 0)
    feed(ledger, blocks, second, 40)
    assert blocks.keep(second.table, second.tokens, 40)
    feed(ledger, blocks, second, 43)
    third = start(blocks, [*shared, 1, 2, 3])
    assert third.held == 40
    feed(ledger, blocks, third, 43)
    assert third.table.pages[:8] == first.table.pages[:8] == second.table.pages[:8]  # equal pages became one
    check_pool(blocks, [first.table, second.table, third.table])


def test_pages_are_given_up_in_the_order_they_were_last_used(pool: Pool) -> None:
    ledger, blocks = pool(Geometry(4, at_once=True, late=False), 10, 4)
    texts = [[n * 100 + i for i in range(17)] for n in range(2)]
    for tokens in texts:
        one = start(blocks, tokens)
        feed(ledger, blocks, one, 16)
        blocks.close(one.table, tokens, 16)
    again = start(blocks, texts[0])
    assert again.held == 16
    blocks.close(again.table, again.tokens, 16)
    big = start(blocks, list(range(1000, 1020)))
    feed(ledger, blocks, big, 20)  # takes two free pages and three of the second text, its end first
    assert blocks.open(texts[1], 16)[1] == 4  # type: ignore[index]
    assert blocks.open(texts[0], 16)[1] == 16  # type: ignore[index]


@pytest.mark.parametrize("caching", [True, False])
def test_what_does_not_fit_changes_nothing(caching: bool, pool: Pool, check_pool: Check) -> None:
    ledger, blocks = pool(WINDOW, 3, 1, prefix_caching=caching)
    text = start(blocks, list(range(60)))
    feed(ledger, blocks, text, 23)
    assert not blocks.grow(text.table, 24)
    assert blocks.grow(text.table, 23)
    assert blocks.open([1, 2], 1) is None  # no slot
    check_pool(blocks, [text.table])
    blocks.close(text.table, text.tokens, 23)
    assert blocks.used == 0
    assert start(blocks, [5, 6]).held == 0  # the one slot serves again, though it was kept


def test_without_caching_nothing_stays(pool_geometry: Geometry, pool: Pool) -> None:
    ledger, blocks = pool(pool_geometry, 20, 2, prefix_caching=False)
    for _ in range(3):
        text = start(blocks, list(range(30)))
        assert text.held == 0
        feed(ledger, blocks, text, 30)
        assert not blocks.keep(text.table, text.tokens, 28)
        blocks.close(text.table, text.tokens, 30)
        assert blocks.available == len(blocks._free_pages) == 20


OPERATIONS = st.lists(st.tuples(st.sampled_from("ooofffffksc"), st.integers(0, 9), st.integers(1, 12)), max_size=60)


@settings(max_examples=150)
@given(geometry=GEOMETRIES, pages=st.integers(6, 24), slots=st.integers(1, 5), operations=OPERATIONS)
def test_no_order_of_events_leaks_a_page_or_shows_a_wrong_one(
    geometry: Geometry, pages: int, slots: int, operations: list[tuple[str, int, int]], pool: Pool, check_pool: Check
) -> None:
    ledger, blocks = pool(geometry, pages, slots)
    running: list[Text] = []
    swapped: list[tuple[list[int], int, Any]] = []
    for kind, which, count in operations:
        text = running[which % len(running)] if running else None
        if kind == "o":  # a few texts that share beginnings of several lengths
            if swapped and which % 2:
                tokens, held, saved = swapped[0]
                if table := blocks.reopen(tokens, held, saved):
                    running.append(Text(tokens, table, held))
                    del swapped[0]
            else:
                tokens = [*([1] * (3 * (which % 4))), *([which] * count), 2]
                if opened := blocks.open(tokens, len(tokens) - 1):
                    assert opened[1] < len(tokens)
                    assert opened[1] <= max(opened[2], opened[1])
                    running.append(Text(tokens, opened[0], opened[1]))
        elif text is None:
            continue
        elif kind == "f":
            for _ in range(count):
                if not blocks.grow(text.table, text.held + 1):
                    break
                if text.held == len(text.tokens):
                    text.tokens.append(which)
                ledger.feed(text.table, text.tokens, text.held)
                text.held += 1
                blocks.settle(text.table, text.tokens, text.held)
        elif kind == "k":
            blocks.keep(text.table, text.tokens, text.held)
        else:
            if kind == "s":
                saved = ledger.save(text.table.slot, text.table.pages[: geometry.needed(text.held)])
                swapped.append((text.tokens, text.held, saved))
            blocks.close(text.table, text.tokens, text.held)
            running.remove(text)
        check_pool(blocks, [x.table for x in running])
        for other in running:
            ledger.read(other.table, other.tokens, other.held)
    for text in running:
        blocks.close(text.table, text.tokens, text.held)
    assert blocks.used == 0
    blocks.forget()
    assert sorted(blocks._free_pages) == list(range(pages))
    assert sorted(blocks._free_slots) == list(range(slots))
