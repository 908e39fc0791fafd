"""What the commands say and where: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console


class _Console(Console):
    """A console that leaves a closed pipe to :mod:`kvcli.cli.main`; rich itself would exit with 1."""

    def on_broken_pipe(self) -> None:
        raise  # rich calls this while it handles the BrokenPipeError


err = _Console(stderr=True)


class Progress(Protocol):
    """How far a piece of long work has come."""

    def advance(self, steps: float = 1) -> None:
        """Count ``steps`` more as done."""
        ...

    def describe(self, text: str) -> None:
        """Change the description."""
        ...


class _Silent:
    def advance(self, steps: float = 1) -> None:
        pass

    def describe(self, text: str) -> None:
        pass


@contextmanager
def progress(description: str, total: float | None = None) -> Iterator[Progress]:
    """Show a bar with the time left while the block runs, and nothing at all where stderr is not a terminal.

    Parameters
    ----------
    description
        What is being done.
    total
        Steps in all; None if unknown.
    """
    if not _is_terminal(sys.stderr):
        yield _Silent()
        return
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(elapsed_when_finished=True),
    )
    with bars.Progress(*columns, console=err, transient=True) as shown:
        task = shown.add_task(description, total=total)

        class _Shown:
            def advance(self, steps: float = 1) -> None:
                shown.advance(task, steps)

            def describe(self, text: str) -> None:
                shown.update(task, description=text)

        yield _Shown()


def say(message: str, *, style: str | None = None) -> None:
    """Write one message for a person to stderr, as it is: no markup, and no line breaks where a log is written."""
    err.print(message, style=style, markup=False, highlight=False, soft_wrap=True)


def emit(obj: Any) -> None:
    """Print one JSON value on one line of stdout.

    Numbers that JSON does not know (nan, infinities) become null, paths strings, and numpy's and torch's scalars and
    arrays plain numbers and lists.
    """
    print(json.dumps(_jsonable(obj), ensure_ascii=False, allow_nan=False), flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> None:
    """Print a table for a person on stdout, never cut off or wrapped where stdout is not a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    terminal = _is_terminal(sys.stdout)
    out = _Console(file=sys.stdout, width=None if terminal else 10_000)
    shown = Table(
        *columns, title=title, title_justify="left", box=box.SIMPLE_HEAD if terminal else None, pad_edge=False
    )
    for row in rows:
        shown.add_row(*(Text(str(x)) for x in row))
    out.print(shown, highlight=False)


def _is_terminal(stream: Any) -> bool:
    # asked of the stream, not of rich: FORCE_COLOR makes rich take a log file for a terminal
    return bool(stream is not None and stream.isatty())


def _jsonable(obj: Any) -> Any:
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, dict):
        return {str(k): _jsonable(v) for k, v in obj.items()}
    if isinstance(obj, (list, tuple, set, frozenset)):
        return [_jsonable(x) for x in obj]
    if isinstance(obj, Path):
        return str(obj)
    return _jsonable(obj.tolist()) if hasattr(obj, "tolist") else obj
