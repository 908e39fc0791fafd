"""The console script: runs a command, and turns whatever happens into one sentence and an exit code."""

from __future__ import annotations

import errno
import os
import re
import select
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

INTERRUPTED = 130
_TRUE = {"1", "t", "true", "y", "yes", "on"}
_FULL = {errno.ENOSPC, errno.EDQUOT}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``kvcli`` with the given arguments (by default the process's) and leave with its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = words[: words.index("--")] if "--" in words else words
    debug, as_json = _wanted("debug", options), _wanted("json", options)
    if "--debug" in options:
        words.remove("--debug")
    _prepare(debug)
    try:
        code = _run(words)
    except BaseException as error:
        code = _report(error, debug=debug, as_json=as_json)
    sys.exit(_finish(code))


def _wanted(flag: str, words: Sequence[str]) -> bool:
    return f"--{flag}" in words or os.environ.get(f"KVCLI_{flag.upper()}", "").strip().lower() in _TRUE


def _prepare(debug: bool) -> None:
    """Make stdout UTF-8 in every locale and keep libraries from talking; their progress bars are for terminals.

    torch reads ``THP_MEM_ALLOC_ENABLE`` at its first allocation. With huge pages the logits of a window, which come and
    go hundreds of times in a calibration, take hundreds of page faults each rather than tens of thousands.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    if not (sys.stderr and sys.stderr.isatty()):
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        if not sys.warnoptions:
            warnings.simplefilter("ignore")


def _run(words: list[str]) -> int:
    from typer.main import get_command

    from kvcli.cli.app import build

    code = get_command(build())(words, prog_name="kvcli", standalone_mode=False)
    if code == INTERRUPTED:  # Typer's answer to Ctrl-C
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _report(error: BaseException, *, debug: bool, as_json: bool) -> int:
    """Say what went wrong, on stderr and, if asked, as JSON on stdout; return the exit code."""
    error = _undress(error)
    if _is_closed_pipe(error):
        return 0
    if isinstance(error, SystemExit):  # completion scripts leave this way
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    code, message = _explain(error)
    message = re.sub(r"\s*\n\s*", " ", message.strip())
    with suppress(OSError):  # if nobody listens, the exit code still tells
        if debug:
            traceback.print_exception(error)
        print(f"kvcli: {message}", file=sys.stderr, flush=True)
    if as_json:
        from kvcli.cli.console import emit

        with suppress(OSError):
            emit({"error": {"code": code, "message": message}})
    return code


def _explain(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the sentence for an error."""
    import typer

    from kvcli.errors import KvcliError

    # Typer brings its own copy of click in some versions and imports click in others: ask for what both name alike
    usage_error = next(x for x in typer.BadParameter.__mro__ if x.__name__ == "UsageError")
    if isinstance(error, KvcliError):
        return error.exit_code, str(error)
    if isinstance(error, usage_error):
        usage: Any = error
        path = usage.ctx.command_path if usage.ctx else "kvcli"
        return 2, f"{usage.format_message().rstrip('.')} (see '{path} --help')."
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return INTERRUPTED, "Interrupted; finished stages are kept."
    if _is_full_disk(error):
        return 1, f"no space left on the disk{_where(error)}."
    if isinstance(error, OSError) and error.strerror:
        return 1, f"{error.strerror}{_where(error)}."
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error):
        return 4, "not enough memory."
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    return 1, f"internal error: {what}; rerun with --debug for the traceback"


def _undress(error: BaseException) -> BaseException:
    """Return what Typer answers with an exception of its own: it leaves on a broken pipe and aborts at a file's end."""
    import typer

    hidden = error.__context__
    dressed = isinstance(error, (SystemExit, typer.Abort)) and isinstance(hidden, (BrokenPipeError, EOFError))
    return hidden if dressed and hidden is not None else error


def _where(error: BaseException) -> str:
    name = getattr(error, "filename", None)
    return f": {name}" if name else ""


def _is_full_disk(error: BaseException) -> bool:
    # libraries written in Rust or C++ report a full disk as an error of their own
    return getattr(error, "errno", None) in _FULL or "No space left on device" in str(error)


def _is_closed_pipe(error: BaseException) -> bool:
    """Whether the reader of stdout or stderr has gone, which is its right; other pipes may not break quietly."""
    if not isinstance(error, BrokenPipeError):
        return False
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _finish(code: int) -> int:
    """Flush stdout now, where a failure can still be reported, instead of while the interpreter shuts down."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        code = code or _report(error, debug=False, as_json=False)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code
