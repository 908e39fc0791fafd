"""What sequences and the prefix cache hold, and what is asked of the pool that they hold it in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


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
    apart
        Whether its pages are neither shared nor entered, because those of the same names may have come from the tier.
    """

    slot: int
    pages: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    settled: int = 0
    apart: bool = False


@dataclass
class Kept:
    """A slot of the prefix cache.

    Attributes
    ----------
    slot
        Its row of sinks and tails.
    pages
        Pages that no name leads to yet because some layer would still write to them.
    used
        When a sequence last began with it, or left it, in seconds.
    """

    slot: int
    pages: list[int]
    used: float
