"""``kvcli compare``: artifacts, and 16 bits, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcli.cli.console import emit, progress, say, table
from kvcli.cli.options import JsonFlag, NoVerify, SeedOption, ThreadsOption, TrustRemoteCode, option
from kvcli.cli.shared import open_with_progress, size
from kvcli.errors import UsageError

if TYPE_CHECKING:
    from kvcli.artifact.reader import Artifact
    from kvcli.evaluation.tasks import Log
    from kvcli.plan import CachePlan

CONTEXTS = (2048, 8192, 32768, 131072)
STEPS, ROUNDS = 16, 5  # tokens of a turn of decoding, and turns


def compare(
    artifacts: Annotated[list[Path], typer.Argument(help="Folders of artifacts, one or more.")],
    context: Annotated[
        int,
        option(
            "--context", min=0, help="Tokens of one sequence at which bits are counted.", show_default="the first's"
        ),
    ] = 0,
    data: Annotated[
        str,
        option(
            "--data",
            help="Measure on this text, as kvcli eval does.",
            show_default="builtin with --tasks, else nothing",
        ),
    ] = "",
    tasks: Annotated[
        str,
        option(
            "--tasks", help="Measure these tasks of kvcli eval, with commas.", show_default="ppl,kl,flips with --data"
        ),
    ] = "",
    window: Annotated[
        int,
        option("--window", min=0, help="Tokens of a window.", show_default="models', at most 2048"),
    ] = 0,
    limit: Annotated[int, option("--limit", min=1, help="Windows, and items of each task, at the most.")] = 4,
    speed: Annotated[bool, option("--speed", help="Time decoding, all in one race; it takes minutes.")] = False,
    depth: Annotated[int, option("--depth", min=1, help="With --speed: tokens in the cache.")] = 1024,
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
    trust_remote_code: TrustRemoteCode = False,
    no_verify: NoVerify = False,
    json: JsonFlag = False,
) -> None:
    """Show artifacts side by side with the 16-bit cache: bits, bytes, and what each was measured to cost.

    What calibration measured is read from the artifacts; --data and --tasks measure all of them on the same text and
    items, --speed times them.

    Raises
    ------
    UsageError
        For an unknown task, or a window or a depth that does not fit a model.
    InputError
        If an artifact, the text or a task's items cannot be used.
    """
    wanted = tuple(dict.fromkeys(x.strip() for x in tasks.split(","))) if tasks else ("ppl", "kl", "flips")
    if tasks:
        from kvcli.evaluation import fidelity, suites

        known = (*fidelity.TASKS, *suites.TASKS)
        if unknown := [x for x in wanted if x not in known]:
            raise UsageError(f"there is no task {unknown[0]!r}; there are {', '.join(known)}.")
    measure = bool(data or tasks)
    if window and not measure:
        raise UsageError("--window is for --data and --tasks, which are not given.")
    if 0 < window < 4:
        raise UsageError(f"--window {window} is too short: 4 tokens at least.")
    found = [open_with_progress(x, verify=not no_verify) for x in artifacts]
    context = context or found[0].manifest["context"]
    columns = [_stated(x, context) for x in found]
    models = {_model(x): i for i, x in reversed(list(enumerate(found)))}  # the first artifact of every model
    longest = min(_longest(x, trust_remote_code) for x in found) if measure or speed else 0
    if measure:
        # one length for all, or figures would not be comparable
        length = window or min(2048, longest)
        if length > longest:
            raise UsageError(f"--window {window} exceeds a model's context of {longest} tokens.")
        from kvcli.evaluation.tasks import Log

        log = Log(None, {})  # holds what a reference answered, for the next artifact of the same model
        for artifact, column in zip(found, columns, strict=True):
            column |= _measured(artifact, data or "builtin", wanted, length, limit, seed, log, trust_remote_code)
    columns += [_exact(found[i], columns[i], context, several=len(models) > 1) for i in sorted(models.values())]
    if speed:
        if depth + STEPS > longest:
            raise UsageError(f"--depth {depth} and {STEPS} more exceed a model's context of {longest} tokens.")
        plans = [(x, x.plan) for x in found] + [(found[i], found[i].plan.as_exact()) for i in sorted(models.values())]
        for column, row in zip(columns, _speeds(plans, depth, threads, trust_remote_code), strict=True):
            column["speed"] = row
    if json:
        emit({"context": context, "artifacts": columns})
        return
    if any(not x["kl_measured"] for x in columns if x["kl"] is not None):
        say("A KL divergence marked ~ is predicted: kvcli solve does not run the model.")
    table(("", *(str(x["name"]) for x in columns)), _rows(columns))


def _stated(artifact: Artifact, context: int) -> dict[str, Any]:
    from kvcli.report.gathering import stated

    plan, manifest = artifact.plan, artifact.manifest
    own = stated(artifact.report)
    return {
        "name": artifact.path.name, "path": str(artifact.path), "model": manifest["source"]["model"],
        "asked_bits": manifest["budget"]["bits"], "effective_bits": plan.effective_bits(context),
        "nominal_bits": plan.nominal_bits, "block_size": plan.block_size, "sink_tokens": plan.sink_tokens,
        "residual_window": plan.residual_window, "model_bytes": plan.model_bytes(),
        "bytes_at": {str(n): plan.bytes_at(n) for n in sorted({*CONTEXTS, context})},
        "kl": own["kl"], "ppl_pct": own["ppl_pct"], "kl_measured": own["measured"],
    }  # fmt: skip


def _model(artifact: Artifact) -> tuple[object, ...]:
    """Return what artifacts of the same model and 16-bit cache have in common."""
    files = artifact.manifest["files"]
    weights = (files[x]["sha256"] for x in sorted(files) if x.startswith("model") and x.endswith("safetensors"))
    return (*weights, artifact.plan.as_exact().layers, artifact.plan.dtype)


def _exact(artifact: Artifact, own: dict[str, Any], context: int, *, several: bool) -> dict[str, Any]:
    """Return the column of an artifact's model with a 16-bit cache; nothing differs from itself."""
    plan = artifact.plan.as_exact()
    column = {
        "name": f"16 bits, {own['model']}" if several else "16 bits", "path": None, "model": own["model"],
        "asked_bits": None, "effective_bits": plan.effective_bits(context), "nominal_bits": plan.nominal_bits,
        "block_size": plan.block_size, "sink_tokens": 0, "residual_window": 0, "model_bytes": 0,
        "bytes_at": {n: plan.bytes_at(int(n)) for n in own["bytes_at"]},
        "kl": None, "ppl_pct": None, "kl_measured": False,
    }  # fmt: skip
    if "fidelity" in own:
        measured = own["fidelity"]
        value = measured["ppl"]["reference"] if "ppl" in measured else None
        fidelity = {
            **{x: measured[x] for x in ("context", "windows", "scored_tokens", "dtype")},
            "effective_bits": plan.effective_bits(measured["context"]), "measured_bytes": measured["reference_bytes"],
            "ppl": {"value": value, "reference": value, "delta_pct": 0.0, "interval_pct": [0.0, 0.0]},
            "kl": {"mean": 0.0, "p99": 0.0, "p999": 0.0, "interval": [0.0, 0.0]},
            "flips": {"rate": 0.0, "interval": [0.0, 0.0]},
        }  # fmt: skip
        column["fidelity"] = {k: v for k, v in fidelity.items() if k in measured}
    if "tasks" in own:
        column["tasks"] = {
            name: {"items": x["items"], "score": x["reference"], "reference": x["reference"], "flips": 0.0}
            for name, x in own["tasks"].items()
        }
    return column


def _longest(artifact: Artifact, trust_remote_code: bool) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(artifact.path, trust_remote_code=trust_remote_code)
    return int(config.get_text_config().max_position_embeddings)


def _measured(
    artifact: Artifact, data: str, wanted: tuple[str, ...], length: int, limit: int, seed: int, log: Log,
    trust_remote_code: bool,
) -> dict[str, Any]:  # fmt: skip
    """Load a model, measure, and let go of it: artifacts need not fit into memory together."""
    from kvcli.calibration import corpora
    from kvcli.evaluation import fidelity, suites, tasks
    from kvcli.models.loading import load
    from kvcli.runtime.packed_model import PackedModel

    with progress(f"loading {artifact.path.name}"):
        loaded = load(str(artifact.path), dtype=artifact.plan.dtype, trust_remote_code=trust_remote_code)
    subject = PackedModel(loaded, artifact.plan, artifact.tensors())
    reference = PackedModel(loaded, artifact.plan.as_exact(), {})
    found: dict[str, Any] = {}
    if on_text := tuple(x for x in wanted if x in fidelity.TASKS):
        texts = corpora.windows(data, loaded.tokenizer, length, limit=limit)
        with progress(f"evaluating {artifact.path.name}", total=2 * len(texts)) as bar:
            found["fidelity"] = fidelity.evaluate(subject, reference, texts, tasks=on_text, step=bar.advance)
    suite = suites.SUITES["quick"]
    settings = tasks.Settings(limit, suite.lengths_of(loaded.max_context), suite.tokens, seed, data)
    items, _ = suites.gather([x for x in wanted if x in suites.TASKS], subject, settings)
    log.sides = {"reference": repr(_model(artifact)), "subject": str(artifact.path.resolve())}
    for name, asked in items.items():
        with progress(f"{name} of {artifact.path.name}", total=2 * len(asked)) as bar:
            answered = tasks.run(
                suites.TASKS[name], asked, subject, reference, seed=seed, log=log, step=bar.advance
            )  # fmt: skip
        found.setdefault("tasks", {})[name] = answered
    return found


def _speeds(
    plans: list[tuple[Artifact, CachePlan]], depth: int, threads: int, trust_remote_code: bool
) -> list[dict[str, Any]]:
    """Time decoding after random tokens, everybody in the same race; on the reference unless all run natively."""
    from kvcli.cli.bench import choose, known
    from kvcli.evaluation import decode_speed, speed
    from kvcli.models.loading import load

    backend = choose("auto")
    for artifact, _ in plans:
        backend = known(artifact, backend)
    device = "cuda" if backend == "cuda" else "cpu"
    entered = []
    for number, (artifact, plan) in enumerate(plans):
        loaded = load(
            str(artifact.path), dtype=plan.dtype, trust_remote_code=trust_remote_code, device=device
        )  # fmt: skip
        decoder = decode_speed.packed(
            str(number), loaded, plan, artifact.tensors() if plan is artifact.plan else {}, backend=backend,
            depth=depth, capacity=depth + STEPS, threads=threads,
        )  # fmt: skip
        ids = decode_speed.text("builtin", loaded.tokenizer, depth + STEPS)
        entered.append(decode_speed.contestant(decoder, ids, depth, random=True))
    with progress("timing", total=(ROUNDS + 1) * len(entered)) as bar:
        seconds = speed.race(entered, rounds=ROUNDS, timer=speed.timer_for(device), step=bar.advance)
    shown = ("median_s", "tokens_per_s", "quartiles_s", "rounds", "threads")
    rows = speed.rows(entered, seconds, "decode", threads=threads)
    return [{"backend": backend, "depth": depth, **{x: row[x] for x in shown}} for row in rows]


def _rows(columns: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    def row(title: str, *keys: str, show: str = "{}") -> tuple[str, ...]:
        cells = []
        for found in columns:
            x: Any = found
            for key in keys:
                x = x[key]
            cells.append("–" if x is None else show.format(x))
        return (title, *cells)

    rows = [
        row("model", "model"),
        row("bits asked", "asked_bits", show="{:g}"),
        row("effective bits", "effective_bits", show="{:.3f}"),
        row("nominal bits", "nominal_bits", show="{:.3f}"),
        row("page, tokens", "block_size"),
        row("exact first tokens", "sink_tokens"),
        row("exact recent tokens", "residual_window"),
    ]
    for n in columns[0]["bytes_at"]:
        rows.append((f"cache at {n} tokens", *(size(x["bytes_at"][n]) for x in columns)))
    kl = ("–" if x["kl"] is None else f"{'' if x['kl_measured'] else '~'}{x['kl']:.5f}" for x in columns)
    rows.append(("KL on calibration text", *kl))
    measured = columns[0].get("fidelity", {})
    if "ppl" in measured:
        rows.append(row("perplexity", "fidelity", "ppl", "value", show="{:.3f}"))
        rows.append(row("perplexity, %", "fidelity", "ppl", "delta_pct", show="{:+.2f}"))
    if "kl" in measured:
        rows.append(row("KL mean", "fidelity", "kl", "mean", show="{:.5f}"))
        rows.append(row("KL 99th percentile", "fidelity", "kl", "p99", show="{:.4f}"))
        rows.append(row("KL 99.9th percentile", "fidelity", "kl", "p999", show="{:.4f}"))
    if "flips" in measured:
        rows.append(row("top-1 flips", "fidelity", "flips", "rate", show="{:.2%}"))
    if measured:
        rows.append(row("tokens scored", "fidelity", "scored_tokens"))
    for name in columns[0].get("tasks", {}):
        rows.append(row(f"{name}, score", "tasks", name, "score", show="{:.3f}"))
        rows.append(row(f"{name}, flips", "tasks", name, "flips", show="{:.1%}"))
    if "speed" in columns[0]:
        rows.append(row("decoding, tokens/s", "speed", "tokens_per_s", show="{:.1f}"))
    return rows
