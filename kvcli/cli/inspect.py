"""``kvcli inspect``: an artifact's plan, bits, bytes and provenance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcli.cli.console import emit, table
from kvcli.cli.options import JsonFlag, NoVerify, option
from kvcli.cli.shared import open_with_progress, plan_summary, show_plan, size


def inspect(
    artifact: Annotated[Path, typer.Argument(help="Folder of the artifact.")],
    context: Annotated[
        int,
        option("--context", min=0, help="Tokens of one sequence at which bits are counted.", show_default="artifact's"),
    ] = 0,
    no_verify: NoVerify = False,
    json: JsonFlag = False,
) -> None:
    """Show an artifact's plan, its bits and bytes at several contexts, and where it came from."""
    found = open_with_progress(artifact, verify=not no_verify)
    plan, manifest = found.plan, found.manifest
    context = context or manifest["context"]
    summary = plan_summary(plan, context, found.capacity)
    provenance = {x: manifest[x] for x in ("budget", "source", "calibration", "stages", "tools", "kvcli_version")}
    if json:
        emit({**summary, **provenance})
        return
    show_plan(plan, context, found.capacity)
    source, data = manifest["source"], manifest["calibration"]
    print(f"model {source['model']} ({source['dtype']}, sha256 {source['sha256'][:12]}…)")
    seed, version = data["seed"], manifest["kvcli_version"]
    print(f"calibrated on {data['tokens']} tokens of {data['data']}, seed {seed}, kvcli {version}")
    print()
    bytes_at, exact = summary["bytes_at"], summary["bytes_at_16_bits"]
    table(
        ("context", "packed", "16 bits", "effective bits"),
        [(n, size(b), size(exact[n]), f"{plan.effective_bits(int(n)):.3f}") for n, b in bytes_at.items()],
    )
    table(
        ("layer", "kind", "K", "V"),
        [(i, x.kind if x.window is None else f"{x.kind} {x.window}", x.k, x.v) for i, x in enumerate(plan.layers)],
    )
