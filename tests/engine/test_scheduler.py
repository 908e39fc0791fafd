"""The scheduler on a pool without a model: everybody gets his turn, and no token is lost or fed twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcli.engine.blocks import BlockManager
from kvcli.engine.geometry import Geometry
from kvcli.engine.scheduler import Scheduler, Sequence, Step

Pool = Callable[..., tuple[Any, BlockManager]]
Check = Callable[..., None]


class World:
    """A scheduler, its pool, and a model whose next token is a function of all before."""

    def __init__(
        self, pool: Pool, geometry: Geometry, pages: int, slots: int, *, seqs: int = 4, chunk: int = 8, **settings: Any
    ) -> None:
        self.ledger, self.blocks = pool(geometry, pages, slots, prefix_caching=settings.pop("caching", True))
        self.scheduler = Scheduler(self.blocks, max_num_seqs=seqs, chunk=chunk, **settings)
        self.count = 0
        self.limits: dict[Sequence, int] = {}

    def add(self, prompt: list[int], new: int) -> Sequence:
        self.count += 1
        sequence = Sequence((float(self.count), self.count, 0), list(prompt), len(prompt))
        self.limits[sequence] = len(prompt) + new
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> Step:
        step = self.scheduler.schedule()
        assert sum(count for _, count in step.prefill) <= self.scheduler.chunk
        work = [*((x, 1) for x in step.decode), *step.prefill]
        assert len({id(x) for x, _ in work}) == len(work)
        for sequence, count in work:
            assert 0 < count <= sequence.pending
            for at in range(sequence.held, sequence.held + count):
                self.ledger.feed(sequence.table, sequence.tokens, at)
            self.scheduler.advance(sequence, count)
        for sequence, _ in work:
            if not sequence.pending:
                sequence.tokens.append(following(sequence.tokens))
                if len(sequence.tokens) >= self.limits[sequence]:
                    self.scheduler.remove(sequence)
        return step

    def run(self) -> None:
        for _ in range(5000):
            if not self.scheduler.running and not self.scheduler.waiting:
                return
            self.step()
        pytest.fail("not everybody came to an end")


def following(tokens: list[int]) -> int:
    return hash(tuple(tokens)) % 3


def answer(prompt: list[int], new: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(following(tokens))
    return tokens


def test_decoding_goes_on_beside_a_long_prompt(pool: Pool) -> None:
    world = World(pool, Geometry(4, window=8), 100, 6)
    short, long = world.add([1, 2, 3], 20), world.add(list(range(64)), 2)
    world.step()
    while long.held < 64:
        step = world.step()
        assert short in step.decode
        assert step.prefill[0][0] is long
    world.run()
    assert short.tokens == answer([1, 2, 3], 20)


def test_the_oldest_prompt_goes_first_and_the_rest_of_the_step_to_the_next(pool: Pool) -> None:
    world = World(pool, Geometry(4, window=8), 100, 6, chunk=10)
    a, b, c = (world.add([x] * n, 5) for x, n in ((1, 6), (2, 9), (3, 4)))
    assert world.step().prefill == [(a, 6), (b, 4)]
    assert world.step().prefill == [(b, 5), (c, 4)]


@pytest.mark.parametrize(("preemption", "swap_bytes"), [("swap", 1000), ("recompute", 0), ("swap", 0)])
def test_the_youngest_makes_room_and_loses_nothing(
    preemption: str, swap_bytes: int, pool: Pool, check_pool: Check
) -> None:
    world = World(
        pool, Geometry(4, window=4), 9, 4, seqs=3, preemption=preemption, swap_bytes=swap_bytes, caching=False
    )
    work = [world.add([x] * 10, 20) for x in range(3)]
    order = []
    while world.scheduler.running or world.scheduler.waiting:
        for sequence in world.scheduler.waiting:
            assert all(x.order < sequence.order for x in world.scheduler.running)
        world.step()
        check_pool(world.blocks, [x.table for x in world.scheduler.running])
        order += [x for x in work if len(x.tokens) == 30 and x not in order]
    assert order == work
    assert [x.tokens for x in work] == [answer([x] * 10, 20) for x in range(3)]
    assert world.scheduler.preemptions > 0
    assert world.scheduler.swapped_bytes == 0
    assert world.blocks.used == 0


def test_a_second_alike_prompt_is_not_computed_again(pool: Pool) -> None:
    world = World(pool, Geometry(4, window=8, sinks=2), 60, 8, chunk=64)
    world.add(list(range(33)), 3)
    world.run()
    second = world.add([*range(33), 50, 51], 3)
    assert world.step().prefill == [(second, 3)]
    assert second.cached_tokens == world.scheduler.prefix_hit_tokens == 32
    world.run()
    assert second.tokens == answer([*range(33), 50, 51], 3)


def test_removing_gives_everything_back_at_once(pool: Pool, check_pool: Check) -> None:
    world = World(pool, Geometry(4, window=4), 9, 4, seqs=3, caching=False)
    work = [world.add([x] * 10, 20) for x in range(4)]
    while not world.scheduler.preemptions:
        world.step()
    for sequence in work:
        world.scheduler.remove(sequence)
        world.scheduler.remove(sequence)  # who is gone is gone
        check_pool(world.blocks, [x.table for x in world.scheduler.running])
    assert not world.scheduler.waiting
    assert not world.scheduler.running
    assert world.blocks.used == world.scheduler.swapped_bytes == 0


REQUESTS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(1, 12), st.integers(0, 6)), max_size=8)


@settings(max_examples=80)
@given(
    requests=REQUESTS, window=st.integers(0, 9), sinks=st.integers(0, 3), at_once=st.booleans(),
    pages=st.integers(9, 20), seqs=st.integers(1, 4), spare=st.integers(0, 3), chunk=st.integers(1, 12),
    caching=st.booleans(),
    preemption=st.sampled_from(["swap", "recompute"]), swap_bytes=st.sampled_from([0, 30, 10**6]),
    leaves=st.sets(st.integers(0, 7)),
)  # fmt: skip
def test_any_load_ends_with_the_answers_that_each_would_get_alone(
    requests: list[tuple[int, int, int, int]], window: int, sinks: int, at_once: bool, pages: int, seqs: int,
    spare: int, chunk: int, caching: bool, preemption: str, swap_bytes: int, leaves: set[int], pool: Pool,
    check_pool: Check,
) -> None:  # fmt: skip
    geometry = Geometry(4, window=window, sinks=sinks, at_once=at_once)
    world = World(
        pool, geometry, pages, seqs + spare, seqs=seqs, chunk=chunk, caching=caching, preemption=preemption,
        swap_bytes=swap_bytes,
    )  # fmt: skip
    expected = []
    for number, (shared, own, new, steps) in enumerate(requests):
        prompt = [*([1] * 4 * shared), *([number] * own), 9]
        assert len(prompt) + new <= geometry.longest(9) + 1
        sequence = world.add(prompt, new)
        for _ in range(steps):
            world.step()
        if number in leaves:
            world.scheduler.remove(sequence)
        else:
            expected.append((sequence, answer(prompt, new)))
        check_pool(world.blocks, [x.table for x in world.scheduler.running])
    world.run()
    for sequence, tokens in expected:
        assert sequence.tokens == tokens
    assert world.blocks.used == world.scheduler.swapped_bytes == 0
    world.blocks.forget()
    check_pool(world.blocks, [])
    assert world.blocks.available == len(world.blocks._free_pages)
