"""The capacity tier: what nobody has used for long, packed again in fewer bits outside the pool.

Pages are held by their names in the prefix cache, and slots, which are exact and stay so, beside them. What was
promoted stays here too, until the memory is wanted: a page that becomes idle again is not packed, and does not lose,
a second time. Nothing here touches memory: what must be packed is asked of :class:`Packer`.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol


class Packer(Protocol):
    """What packs pages; :class:`kvcli.engine.capacity.Repacker` in earnest."""

    def demote(self, first: int, pages: Sequence[int]) -> Sequence[Any]:
        """Pack pages of consecutive blocks; what is returned for each has ``nbytes``."""

    def promote(self, first: int, packed: Sequence[Any], pages: Sequence[int]) -> None:
        """Write packed blocks into pages."""


class Place(NamedTuple):
    """A page, its name in the prefix cache, and which block of its sequence it holds."""

    name: bytes
    block: int
    page: int


class Tier:
    """Packed pages and saved slots within so many bytes.

    Parameters
    ----------
    packer
        What packs them.
    idle_seconds
        How long nobody must have used a page before it is packed.
    max_bytes
        The most that is held; what was unused for longest goes first.
    clock
        Seconds.

    Attributes
    ----------
    nbytes
        Bytes held.
    demotions, promotions
        Pages moved here and back so far.
    """

    def __init__(
        self, packer: Packer, *, idle_seconds: float, max_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._packer, self.idle_seconds, self._max_bytes, self.clock = packer, idle_seconds, max_bytes, clock
        self._held: OrderedDict[tuple[str, bytes], Any] = OrderedDict()  # the longest unused first
        self.nbytes = self.demotions = self.promotions = 0

    def __contains__(self, name: bytes) -> bool:
        """Whether there is a page of that name."""
        return ("page", name) in self._held

    def slot(self, name: bytes) -> Any:
        """Return the slot saved at the end of a block, or None."""
        return self._held.get(("slot", name))

    def demote(self, places: Sequence[Place]) -> None:
        """Pack pages; those that others depend on come last. The pages themselves are free then."""
        packed: dict[bytes, Any] = {}
        for run in _runs([x for x in places if x.name not in self]):
            found = self._packer.demote(run[0].block, [x.page for x in run])
            packed |= {x.name: y for x, y in zip(run, found, strict=True)}
        for x in places:
            self._put("page", x.name, packed.get(x.name))
        self.demotions += len(places)

    def promote(self, places: Sequence[Place]) -> None:
        """Write packed pages, in order of their blocks, into pages of the pool."""
        for run in _runs(places):
            self._packer.promote(run[0].block, [self._held["page", x.name] for x in run], [x.page for x in run])
        for x in reversed(places):
            self._put("page", x.name)
        self.promotions += len(places)

    def keep_slot(self, name: bytes, saved: Any = None) -> None:
        """Hold a slot, or count one that is held as used."""
        self._put("slot", name, saved)

    def clear(self) -> None:
        """Hold nothing."""
        self._held.clear()
        self.nbytes = 0

    def _put(self, kind: str, name: bytes, what: Any = None) -> None:
        if what is not None:
            if (old := self._held.get((kind, name))) is not None:
                self.nbytes -= old.nbytes
            self._held[kind, name] = what
            self.nbytes += what.nbytes
        if (kind, name) in self._held:  # else what came before it took its place
            self._held.move_to_end((kind, name))
        while self.nbytes > self._max_bytes:
            self.nbytes -= self._held.popitem(last=False)[1].nbytes


def _runs(places: Sequence[Place]) -> Iterator[list[Place]]:
    """Cut pages into runs of consecutive blocks: of whichever sequences, for no page depends on another."""
    left = sorted(places, key=lambda x: x.block)
    while left:
        run = left[:1]
        rest: list[Place] = []
        for x in left[1:]:
            (run if x.block == run[-1].block + 1 else rest).append(x)
        yield run
        left = rest
