"""``kvcli solve``: another budget, or the fewest bits within a loss, from what is already measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcli.cli.console import emit, progress
from kvcli.cli.options import JsonFlag, NoVerify, TaskData, TaskItems, ThreadsOption, option
from kvcli.cli.shared import open_with_progress, plan_summary, show_plan
from kvcli.errors import UsageError

if TYPE_CHECKING:
    from kvcli.artifact.reader import Artifact
    from kvcli.calibration.sensitivity import Probe
    from kvcli.models.loading import LoadedModel


def solve(
    artifact: Annotated[Path, typer.Argument(help="Folder of a calibrated artifact.")],
    out: Annotated[Path, option("--out", "-o", help="Folder of the new artifact.")],
    bits: Annotated[
        float | None, option("--bits", help="Ceiling on effective bits per cached value at --context.")
    ] = None,
    max_kl: Annotated[
        float | None,
        option("--max-kl", help="Instead of --bits: the fewest bits that lose at most this, mean KL in nats a token."),
    ] = None,
    objective: Annotated[
        str,
        option(
            "--objective",
            metavar="kl|ppl|task:NAME",
            help="What --verify chooses by: KL, the loss on the text, or the score on a task of kvcli eval.",
        ),
    ] = "kl",
    task_items: TaskItems = 24,
    task_data: TaskData = None,
    verify: Annotated[
        bool, option("--verify", help="Load the model, measure the best plans, and go by what was measured.")
    ] = False,
    data: Annotated[
        str | None,
        option("--data", help="Text that --verify measures on, as in calibrate.", show_default="calibration text"),
    ] = None,
    context: Annotated[
        int,
        option("--context", min=0, help="Tokens of one sequence at which bits are counted.", show_default="artifact's"),
    ] = 0,
    nominal: Annotated[
        bool, option("--nominal", help="Make --bits a ceiling on nominal bits, as papers count.")
    ] = False,
    force: Annotated[bool, option("--force", help="Replace an artifact that is already there.")] = False,
    no_verify: NoVerify = False,
    threads: ThreadsOption = 0,
    json: JsonFlag = False,
) -> None:
    """Write another artifact for another bit budget, in seconds and without running the model.

    With --verify the model is run on calibration text: a few plans are measured, and the measured loss decides.

    Raises
    ------
    BudgetError
        If the budget, or the loss, cannot be met.
    """
    from kvcli.artifact.reader import open_artifact
    from kvcli.artifact.writer import check_target
    from kvcli.calibration import objectives, pipeline, solving

    if (bits is None) == (max_kl is None):
        raise UsageError("give either --bits or --max-kl.")
    if max_kl is not None and not 0 < max_kl < float("inf"):
        raise UsageError(f"--max-kl {max_kl:g} is not above 0.")
    if data is not None and not verify:
        raise UsageError("--data is what --verify measures on: give --verify too.")
    task = objectives.task_name(objective, others=solving.OBJECTIVES)
    if task and not verify:
        raise UsageError(f"--objective {objective} needs the model's answers: give --verify too.")
    if task and max_kl is not None:
        raise UsageError(f"--max-kl bounds KL: --objective {objective} goes with --bits.")
    source = open_with_progress(artifact, verify=not no_verify)
    context = context or source.manifest["context"]
    budget = None if bits is None else pipeline.Budget(bits, context, nominal)
    check_target(out, overwrite=force)
    solver = solving.Solver(source)
    if budget is not None:
        solver.check(budget)
    probe: Any = None
    judge: Any = objective
    if verify:
        loaded, probe = _probe(source, data)
        if task:
            wanted = objectives.TaskObjective(task, task_items, folder=task_data)
            judge = objectives.TaskScorer(wanted, loaded, source.plan.as_exact())
    with progress("measuring the best plans" if verify else "solving") as bar:
        found = solving.find(solver, budget, max_kl, context, probe, nominal=nominal, objective=judge, step=bar.advance)
    spent = found.plan.nominal_bits if nominal else found.plan.effective_bits(context)
    path = solver.write(found, budget or pipeline.Budget(spent, context, nominal), out, overwrite=force)
    second = open_artifact(path, verify=False).capacity
    if json:
        emit({"path": str(path), **plan_summary(found.plan, context, second), **found.to_json()})
        return
    show_plan(found.plan, context, second)
    print(f"predicted mean KL {found.predicted_kl:.4f}, perplexity {found.predicted_ppl_pct:+.2f} %")
    if found.measured is None:
        print(f"measure it: kvcli eval {out} --data FILE")
    else:
        on, ppl = data or "calibration text", solving.percent(found.measured.delta_nll)
        print(f"measured mean KL {found.measured.kl:.4f}, perplexity {ppl:+.2f} %, on {on}")
    if found.task is not None:
        x = found.task
        print(f"{x['name']} {x['score']:.3f} against {x['reference']:.3f}, {x['items']} items")
    print(f"written to {out}")


def _probe(artifact: Artifact, data: str | None) -> tuple[LoadedModel, Probe]:
    """Load the artifact's model and the text to measure on."""
    from kvcli.calibration import corpora, solving
    from kvcli.cli.calibrate import WINDOW
    from kvcli.models.loading import load

    with progress("loading the model"):
        loaded = load(str(artifact.path), dtype=artifact.plan.dtype)
    length = min(WINDOW, loaded.max_context)
    with progress("reading text"):
        if data is None:
            corpus = solving.calibration_text(artifact, loaded, length)
        else:
            stated = artifact.manifest["calibration"]
            corpus = corpora.tokens(
                data, loaded, num_tokens=stated["tokens"], seed=stated["seed"], length=length
            )  # fmt: skip
    return loaded, solving.probe_of(artifact, loaded, corpus)
