"""What a plan means for the pages of a sequence."""

from __future__ import annotations

from dataclasses import dataclass

from kvcli.plan import CachePlan


@dataclass(frozen=True)
class Geometry:
    """How a sequence's tokens lie.

    Attributes
    ----------
    block_size
        Tokens of a page.
    window
        The residual window of the layers that have one.
    sinks
        Exact first tokens of any layer.
    at_once
        Whether some layer is portable: its tokens go into pages at once.
    late
        Whether some layer is not.
    """

    block_size: int
    window: int = 0
    sinks: int = 0
    at_once: bool = False
    late: bool = True

    @classmethod
    def of(cls, plan: CachePlan) -> Geometry:
        """Return a plan's; sliding layers keep all pages here, as full ones do."""
        layers = range(len(plan.layers))
        portable = [plan.is_portable(i) for i in layers]
        return cls(
            plan.block_size, plan.residual_window, max(plan.sinks(i) for i in layers), any(portable), not all(portable)
        )

    def needed(self, tokens: int) -> int:
        """Pages of a sequence: blocks that any layer has begun to write."""
        return -(-tokens // self.block_size) if self.at_once else self.complete(tokens)

    def complete(self, tokens: int) -> int:
        """Blocks that no layer writes to again."""
        return max(0, tokens - (self.window if self.late else 0)) // self.block_size

    @property
    def resumes_from_pages(self) -> bool:
        """Whether complete pages are all that a sequence needs to go on at the end of a block."""
        return not self.late or not (self.window or self.sinks)

    @property
    def slack(self) -> int:
        """Tokens by which a sequence may have outgrown the end of a block while its slot still serves from there."""
        return self.block_size - 1 - -self.window % self.block_size if self.late else self.block_size - 1

    def longest(self, pages: int) -> int:
        """Tokens of the longest sequence that so many pages hold."""
        if self.at_once:
            return pages * self.block_size
        return (pages + 1) * self.block_size - 1 + self.window
