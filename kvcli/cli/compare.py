"""``kvcli compare``: artifacts, and 16 bits, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcli.cli.console import emit, progress, say, table
from kvcli.cli.options import JsonFlag, NoVerify, ThreadsOption, TrustRemoteCode, option
from kvcli.cli.shared import open_with_progress, size
from kvcli.errors import UsageError

if TYPE_CHECKING:
    from kvcli.artifact.reader import Artifact

CONTEXTS = (2048, 8192, 32768, 131072)


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
        option("--data", help="Measure fidelity on this text, as kvcli eval does.", show_default="nothing is measured"),
    ] = "",
    window: Annotated[
        int,
        option("--window", min=0, help="With --data: tokens of a window.", show_default="models', at most 2048"),
    ] = 0,
    limit: Annotated[int, option("--limit", min=0, help="With --data: windows at the most; 0 for all.")] = 4,
    threads: ThreadsOption = 0,
    trust_remote_code: TrustRemoteCode = False,
    no_verify: NoVerify = False,
    json: JsonFlag = False,
) -> None:
    """Show artifacts side by side with the 16-bit cache: bits, bytes, and what each was measured to cost.

    What calibration measured is read from the artifacts; --data measures all of them on the same text.

    Raises
    ------
    UsageError
        For a window that does not fit a model, or without --data.
    InputError
        If an artifact or the text cannot be used.
    """
    if window and not data:
        raise UsageError("--window is for --data, which is not given.")
    if data and 0 < window < 4:
        raise UsageError(f"--window {window} is too short: 4 tokens at least.")
    found = [open_with_progress(x, verify=not no_verify) for x in artifacts]
    context = context or found[0].manifest["context"]
    columns = [_stated(x, context) for x in found]
    if data:
        # one length for all, or figures would not be comparable
        length = window or min(2048, *(_longest(x, trust_remote_code) for x in found))
        for artifact, column in zip(found, columns, strict=True):
            column["fidelity"] = _measured(artifact, data, length, limit, trust_remote_code)
    columns += _exact(found, columns, context)
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
        "kl": own["kl"], "delta_nll": own["delta_nll"], "kl_measured": own["measured"],
    }  # fmt: skip


def _exact(found: list[Artifact], columns: list[dict[str, Any]], context: int) -> list[dict[str, Any]]:
    """Return one column of the 16-bit cache for every different model."""
    exact: dict[tuple[object, ...], dict[str, Any]] = {}
    for artifact, own in zip(found, columns, strict=True):
        files, plan = artifact.manifest["files"], artifact.plan.as_exact()
        weights = tuple(
            files[x]["sha256"] for x in sorted(files) if x.startswith("model") and x.endswith("safetensors")
        )
        if (weights, plan.layers) in exact:
            continue
        column = {
            "name": "16 bits", "path": None, "model": own["model"], "asked_bits": None,
            "effective_bits": plan.effective_bits(context), "nominal_bits": plan.nominal_bits,
            "block_size": plan.block_size, "sink_tokens": 0, "residual_window": 0, "model_bytes": 0,
            "bytes_at": {n: plan.bytes_at(int(n)) for n in own["bytes_at"]},
            "kl": None, "delta_nll": None, "kl_measured": False,
        }  # fmt: skip
        if "fidelity" in own:
            measured = own["fidelity"]
            value = measured["ppl"]["reference"]
            column["fidelity"] = {
                **{x: measured[x] for x in ("context", "windows", "scored_tokens", "dtype")},
                "effective_bits": plan.effective_bits(measured["context"]),
                "measured_bytes": measured["reference_bytes"],
                "ppl": {"value": value, "reference": value, "delta_pct": 0.0},
                "kl": {"mean": 0.0, "p99": 0.0, "p999": 0.0}, "flips": {"rate": 0.0},
            }  # fmt: skip
        exact[weights, plan.layers] = column
    several = len({x["model"] for x in exact.values()}) > 1
    return [{**x, "name": f"16 bits, {x['model']}" if several else x["name"]} for x in exact.values()]


def _longest(artifact: Artifact, trust_remote_code: bool) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(artifact.path, trust_remote_code=trust_remote_code)
    return int(config.get_text_config().max_position_embeddings)


def _measured(artifact: Artifact, data: str, length: int, limit: int, trust_remote_code: bool) -> dict[str, Any]:
    """Load a model, measure, and let go of it: artifacts need not fit into memory together."""
    from kvcli.calibration import corpora
    from kvcli.evaluation import fidelity
    from kvcli.models.loading import load
    from kvcli.runtime.packed_model import PackedModel

    with progress(f"loading {artifact.path.name}"):
        loaded = load(str(artifact.path), dtype=artifact.plan.dtype, trust_remote_code=trust_remote_code)
    if length > loaded.max_context:
        raise UsageError(f"--window {length} exceeds {artifact.path.name}'s context of {loaded.max_context} tokens.")
    subject = PackedModel(loaded, artifact.plan, artifact.tensors())
    reference = PackedModel(loaded, artifact.plan.as_exact(), {})
    texts = corpora.windows(data, loaded.tokenizer, length, limit=limit or None)
    with progress(f"evaluating {artifact.path.name}", total=2 * len(texts)) as bar:
        return fidelity.evaluate(subject, reference, texts, step=bar.advance)


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
    if "fidelity" in columns[0]:
        rows += [
            row("perplexity", "fidelity", "ppl", "value", show="{:.3f}"),
            row("perplexity, %", "fidelity", "ppl", "delta_pct", show="{:+.2f}"),
            row("KL mean", "fidelity", "kl", "mean", show="{:.5f}"),
            row("KL 99th percentile", "fidelity", "kl", "p99", show="{:.4f}"),
            row("KL 99.9th percentile", "fidelity", "kl", "p999", show="{:.4f}"),
            row("top-1 flips", "fidelity", "flips", "rate", show="{:.2%}"),
            row("tokens scored", "fidelity", "scored_tokens"),
        ]
    return rows
