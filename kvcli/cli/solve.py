"""``kvcli solve``: another budget from what is already measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcli.cli.console import emit
from kvcli.cli.options import JsonFlag, NoVerify, option
from kvcli.cli.shared import open_with_progress, plan_summary, show_plan


def solve(
    artifact: Annotated[Path, typer.Argument(help="Folder of a calibrated artifact.")],
    bits: Annotated[float, option("--bits", help="Ceiling on effective bits per cached value at --context.")],
    out: Annotated[Path, option("--out", "-o", help="Folder of the new artifact.")],
    context: Annotated[
        int,
        option("--context", min=0, help="Tokens of one sequence at which bits are counted.", show_default="artifact's"),
    ] = 0,
    nominal: Annotated[
        bool, option("--nominal", help="Make --bits a ceiling on nominal bits, as papers count.")
    ] = False,
    force: Annotated[bool, option("--force", help="Replace an artifact that is already there.")] = False,
    no_verify: NoVerify = False,
    json: JsonFlag = False,
) -> None:
    """Write another artifact for another bit budget, in seconds and without running the model.

    Raises
    ------
    BudgetError
        If the budget cannot be met.
    """
    from kvcli.calibration import pipeline

    source = open_with_progress(artifact, verify=not no_verify)
    budget = pipeline.Budget(bits, context or source.manifest["context"], nominal)
    path, plan, predicted = pipeline.solve(source, budget, out, overwrite=force)
    if json:
        emit({"path": str(path), **plan_summary(plan, budget.context), "predicted_kl": predicted})
        return
    show_plan(plan, budget.context)
    print(f"predicted mean KL {predicted:.4f}; measure it: kvcli eval {out}")
    print(f"written to {out}")
