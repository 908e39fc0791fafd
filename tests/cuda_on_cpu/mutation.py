"""Removes barriers, waits and fences from CUDA sources, one at a time, so that tests can demand that each is missed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# A call used as a statement; longer names first. __syncthreads_or and its like give a value and are left alone.
CALLS = re.compile(
    r"(?<![\w.>])"
    r"(?:::)?(?:kvrt::)?(?:ptx::)?"
    r"(?P<name>__syncthreads|__syncwarp|__threadfence(?:_block|_system)?|cp_async_wait_all|cp_async_wait)"
    r"\s*(?:<[^<>;]*>)?\s*\([^()]*(?:\([^()]*\)[^()]*)*\)\s*;"
)
COMMENTS_AND_STRINGS = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)


@dataclass(frozen=True)
class Mutant:
    """A source with one call removed.

    Attributes
    ----------
    name
        Which call: ``__syncthreads``, ``__syncwarp``, ``cp_async_wait``, ``cp_async_wait_all``, ``__threadfence`` …
    line
        The line it was on, from 1; lines keep their numbers.
    removed
        The text that was removed.
    source
        The whole source without it.
    """

    name: str
    line: int
    removed: str
    source: str

    @property
    def fence(self) -> bool:
        """Whether a fence was removed. The emulator cannot show that one is missing: it runs on a CPU's memory."""
        return self.name.startswith("__threadfence")

    def __str__(self) -> str:
        return f"line {self.line} without {self.removed}"


def mutants(source: str) -> Iterator[Mutant]:
    """Yield the mutants of a CUDA source, in the order of its text. Comments and strings are left alone."""
    code = COMMENTS_AND_STRINGS.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), source)
    for match in CALLS.finditer(code):
        begin, end = match.span()
        removed = source[begin:end]
        # a lone ; stays, so that the call may have been the body of an if
        source_without = source[:begin] + "\n" * removed.count("\n") + ";" + source[end:]
        yield Mutant(match["name"], source.count("\n", 0, begin) + 1, " ".join(removed.split()), source_without)
