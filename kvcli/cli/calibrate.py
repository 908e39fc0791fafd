"""``kvcli calibrate``: from a model to an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kvcli.cli.console import emit, progress, say
from kvcli.cli.options import JsonFlag, SeedOption, ThreadsOption, TrustRemoteCode, option
from kvcli.cli.shared import plan_summary, show_plan

WINDOW = 1024  # longest calibration window


def calibrate(
    model: Annotated[str, typer.Argument(help="A local folder, a hub id or a .gguf file.")],
    bits: Annotated[float, option("--bits", help="Ceiling on effective bits per cached value at --context.")],
    out: Annotated[Path, option("--out", "-o", help="Folder of the artifact.")],
    context: Annotated[
        int,
        option(
            "--context",
            min=0,
            help="Tokens of one sequence at which bits are counted.",
            show_default="model's, at most 8192",
        ),
    ] = 0,
    nominal: Annotated[
        bool, option("--nominal", help="Make --bits a ceiling on nominal bits, as papers count.")
    ] = False,
    data: Annotated[
        str,
        option(
            "--data",
            help="Calibration text: builtin[:NAME], a .txt or .jsonl file, - (stdin), self or hub:NAME; commas mix.",
        ),
    ] = "builtin",
    tokens: Annotated[int, option("--tokens", min=2, help="Tokens of calibration text.")] = 6144,
    recipe: Annotated[
        str, option("--recipe", help="A shipped recipe, a YAML file, or a quantizer plug-in.")
    ] = "balanced",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "float64"],
        option("--dtype", help="Dtype the model computes in; auto is the checkpoint's own, and float32 for .gguf."),
    ] = "auto",
    seed: SeedOption = 0,
    resume: Annotated[
        bool, option("--resume/--fresh", help="Take finished stages of an interrupted run, or forget them.")
    ] = True,
    force: Annotated[bool, option("--force", help="Replace an artifact that is already there.")] = False,
    dry_run: Annotated[bool, option("--dry-run", help="Check everything, say what would be done, and stop.")] = False,
    threads: ThreadsOption = 0,
    trust_remote_code: TrustRemoteCode = False,
    json: JsonFlag = False,
) -> None:
    """Find how each layer's keys and values are best stored within a bit budget, and write the artifact.

    Finished stages of an interrupted run are kept beside the output and taken up again. The same seed gives the same
    plan.

    Raises
    ------
    BudgetError
        If the budget cannot be met.
    """
    from kvcli.artifact.writer import check_target
    from kvcli.calibration import corpora, pipeline
    from kvcli.models.loading import load

    check_target(out, overwrite=force)
    with progress("loading the model"):
        loaded = load(model, dtype=dtype, trust_remote_code=trust_remote_code)
    budget = pipeline.Budget(bits, context or min(loaded.max_context, 8192), nominal)
    geometry = pipeline.exact_layers(loaded)
    space = pipeline.search_space(recipe, geometry)
    pipeline.check_budget(space, geometry, budget, loaded.dtype)
    length = min(WINDOW, loaded.max_context)
    if dry_run:
        corpora.sources(data, loaded, num_tokens=tokens, seed=seed, length=length)
        _say_plan(loaded, budget, space, recipe, data, tokens, json)
        return
    with progress("reading calibration text", total=100) as bar:
        last = 0.0

        def report(done: int, total: int) -> None:
            nonlocal last
            bar.advance(100 * done / max(1, total) - last)
            last = 100 * done / max(1, total)

        corpus = corpora.tokens(data, loaded, num_tokens=tokens, seed=seed, length=length, progress=report)
    found = pipeline.calibrate(loaded, corpus, budget, out, recipe=recipe, fresh=not resume, show=progress)
    if found.stages.resumed:
        say(f"Resumed: {', '.join(found.stages.resumed)} taken from an earlier run.")
    with progress("writing the artifact"):
        path = pipeline.write(loaded, corpus, found, out, seed=seed, overwrite=force)
    chosen = min(found.report["verified"], key=lambda x: x["kl"])
    if json:
        emit({"path": str(path), **plan_summary(found.plan, budget.context), "kl": chosen["kl"], "data": corpus.name})
        return
    show_plan(found.plan, budget.context)
    print(f"mean KL {chosen['kl']:.4f} on calibration text; measure on your own: kvcli eval {out} --data FILE")
    print(f"written to {out}")


def _say_plan(loaded: Any, budget: Any, space: Any, recipe: str, data: str, tokens: int, json: bool) -> None:
    facts = {
        "model": loaded.source, "dtype": loaded.dtype, "num_layers": len(loaded.geometry),
        "bits": budget.bits, "nominal": budget.nominal, "context": budget.context,
        "recipe": recipe, "data": data, "tokens": tokens,
        "formats": {"k": [str(f) for f in space.k], "v": [str(f) for f in space.v]},
        "settings": len(list(space.settings())),
    }  # fmt: skip
    if json:
        emit(facts)
        return
    print(f"{facts['model']}: {facts['num_layers']} layers, computing in {facts['dtype']}")
    kind = "nominal" if budget.nominal else "effective"
    print(f"budget {budget.bits:g} {kind} bits at {budget.context} tokens: can be met")
    print(f"recipe {recipe}: {len(space.k)} key and {len(space.v)} value formats under {facts['settings']} settings")
    print(f"calibration text {data}, {tokens} tokens; nothing was written")
