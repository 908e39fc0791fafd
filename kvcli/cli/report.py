"""``kvcli report``: what calibration measured and chose, as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvcli.cli.console import emit, progress
from kvcli.cli.options import JsonFlag, NoVerify, option
from kvcli.cli.shared import open_with_progress, size
from kvcli.errors import InputError, UsageError


def report(
    artifact: Annotated[Path, typer.Argument(help="Folder of the artifact.")],
    out: Annotated[Path, option("--out", "-o", help="HTML file to write.")],
    evaluation: Annotated[
        Path | None,
        option("--eval", help="What kvcli eval --json printed of the artifact, to show it as well."),
    ] = None,
    force: Annotated[bool, option("--force", help="Replace a file that is already there.")] = False,
    no_verify: NoVerify = False,
    json: JsonFlag = False,
) -> None:
    """Write one HTML page with the charts and tables of an artifact's calibration; it loads nothing when opened.

    Raises
    ------
    UsageError
        If the file is there already, its folder is not, or the charting library is not installed.
    InputError
        If the artifact or the evaluation cannot be used.
    """
    if not out.absolute().parent.is_dir() or (out.exists() and not out.is_file()):
        raise UsageError(f"{out} is not a file in a folder that exists.")
    if out.exists() and not force:
        raise UsageError(f"{out} is already there: replace it with --force.")
    from kvcli.report.page import render

    evaluated = None if evaluation is None else _evaluation(evaluation)
    found = open_with_progress(artifact, verify=not no_verify)
    with progress("drawing charts"):
        page = render(found, evaluated).encode()
    part = out.with_name(f".{out.name}.part")
    try:
        part.write_bytes(page)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    if json:
        emit({"path": str(out), "bytes": len(page)})
    else:
        print(f"written to {out}, {size(len(page))}")


def _evaluation(path: Path) -> dict[str, Any]:
    import json

    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--eval {path} cannot be read: {error}.") from None
    if not isinstance(found, dict):
        raise InputError(f"--eval {path} is not an evaluation as kvcli eval --json prints it.")
    return found
