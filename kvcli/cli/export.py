"""``kvcli export``: an artifact's plan as other engines state theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kvcli.cli.console import emit, say
from kvcli.cli.options import JsonFlag, NoVerify, option
from kvcli.cli.shared import open_with_progress


def export(
    artifact: Annotated[Path, typer.Argument(help="Folder of the artifact.")],
    format: Annotated[Literal["kvtuner"], option("--format", help="kvtuner: the YAML of KVTuner, bits per layer.")],
    out: Annotated[Path, option("--out", "-o", help="File to write.")],
    force: Annotated[bool, option("--force", help="Replace a file that is already there.")] = False,
    no_verify: NoVerify = False,
    json: JsonFlag = False,
) -> None:
    """Write an artifact's plan in the format of another engine; stderr says what that format cannot hold.

    Raises
    ------
    InputError
        If the format cannot express the plan.
    """
    from kvcli.artifact import exporting

    found = open_with_progress(artifact, verify=not no_verify)
    for sentence in exporting.export(found, format, out, overwrite=force):
        say(sentence)
    if json:
        emit({"path": str(out)})
    else:
        print(f"written to {out}")
