"""An artifact's plan and ``report.json`` as sections of a page: tables, and the rows their charts are drawn from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from kvcli.artifact.reader import Artifact
from kvcli.artifact.schema import MANIFEST
from kvcli.calibration.solving import percent
from kvcli.errors import InputError

WHICH = ("k", "v")
PEERS = "benchmarks/results/fidelity.json"
CONTEXTS = tuple(2**i for i in range(8, 18))  # tokens at which memory is shown
_Cell = str | int | float | None
_Row = tuple[_Cell, ...]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes
    ----------
    name
        Its anchor, and the key of its chart.
    title, note
        For a person: what it is, and how it is to be read.
    columns
        Titles of the table's columns.
    rows
        Cells; floats are exactly those of ``report.json``. None is a cell without a value.
    """

    name: str
    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[_Row, ...]


def stated(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``report.json`` says of the plan that the artifact holds.

    Returns
    -------
    dict
        ``kl`` (nats a token) and ``ppl_pct`` (by how many per cent perplexity grows), on calibration text, None where
        they are not stated; ``measured``: whether the plan was run, or what it costs is only predicted.

    Raises
    ------
    InputError
        If the report is not as kvcli writes it.
    """
    try:
        if report.get("verified"):
            chosen = report["verified"][report.get("chosen", 0)]
            loss = chosen.get("delta_nll")
            return {"kl": chosen["kl"], "ppl_pct": None if loss is None else percent(loss), "measured": True}
        if solved := report.get("solved"):
            if solved.get("measured_kl") is not None:
                return {"kl": solved["measured_kl"], "ppl_pct": solved["measured_ppl_pct"], "measured": True}
            return {"kl": solved["kl"], "ppl_pct": solved.get("predicted_ppl_pct"), "measured": False}
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError("report.json is not as kvcli writes it: what the plan costs is incomplete.") from error
    return {"kl": None, "ppl_pct": None, "measured": False}


def text_of(evaluation: Mapping[str, Any]) -> str:
    """Return the name of the text that was evaluated on: of a file without its folders."""
    return str(evaluation["data"]).rpartition("/")[2]


def sections(artifact: Artifact, evaluation: Mapping[str, Any] | None = None) -> list[Section]:
    """Return all sections that an artifact has numbers for, in the order of the page.

    Parameters
    ----------
    artifact
        What is reported on.
    evaluation
        What ``kvcli eval --json`` printed of it.

    Raises
    ------
    InputError
        If ``report.json`` or the evaluation is not as kvcli writes it, or the evaluation is of something else.
    """
    if evaluation is not None:
        own = hashlib.sha256((artifact.path / MANIFEST).read_bytes()).hexdigest()
        if evaluation.get("artifact") != own:
            raise InputError(f"the evaluation is not of {artifact.path}, or it is older than the artifact.")
    found = _checked("report.json", _pareto(artifact, evaluation))
    found += _checked("the evaluation", _evaluated(evaluation or {}))
    return found + _checked("report.json", _calibrated(artifact))


def _checked(source: str, parts: Iterator[Section]) -> list[Section]:
    """Return sections with rows; nothing but text and numbers may reach the page."""
    try:
        found = [x for x in parts if x.rows]
        for cell in (cell for section in found for row in section.rows for cell in row):
            if not (cell is None or isinstance(cell, str) or math.isfinite(cell)):
                raise ValueError(cell)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{source} is not as kvcli writes it: {type(error).__name__} {error}.") from error
    return found


def _calibrated(artifact: Artifact) -> Iterator[Section]:
    report, plan = artifact.report, artifact.plan
    mode = report.get("mode")
    predicted = f" Predictors: {mode['adapters']}, {mode['reason']}." if mode else ""
    yield Section(
        "bits", "Bits of keys and values by layer", "Bits of a code, without scales; 16 is exact." + predicted,
        ("layer", "kind", "K bits", "V bits", "K format", "V format"),
        tuple((i, x.kind, x.k.bits, x.v.bits, str(x.k), str(x.v)) for i, x in enumerate(plan.layers)),
    )  # fmt: skip
    if measured := report.get("sensitivity", {}).get("measured"):
        k, v = (measured[which]["kl"] for which in WHICH)
        asked = " and ".join(f"{which.upper()} in {measured[which]['format']['bits']} bits" for which in WHICH)
        yield Section(
            "sensitivity", "Sensitivity by layer",
            f"Mean KL divergence when one layer's keys or values alone are quantised: {asked}.",
            ("layer", "K: mean KL (nats)", "V: mean KL (nats)"),
            tuple((i, a, b) for i, (a, b) in enumerate(zip(k, v, strict=True))),
        )  # fmt: skip
    if front := report.get("front"):
        counted = "nominal" if front["nominal"] else "effective"
        yield Section(
            "front", "Front of KVTuner's search",
            f"{front['evaluations']} plans were run. Bits are {counted} ones at {front['context']} tokens; the loss is "
            "the one that the search minimised.",
            (f"{counted} bits", "loss"), tuple((x["bits"], x["loss"]) for x in front["points"]),
        )  # fmt: skip
    if adapters := report.get("adapters"):
        left, ridge = adapters["left"], adapters["ridge"]
        tensors = sorted((int(layer), which) for layer, _, which in (name.partition(".") for name in left))
        costs = ", ".join(f"{x:.4g} with predictors {mode!r}" for mode, x in adapters["kl"].items())
        yield Section(
            "predictors", "Variance left by the predictors",
            f"Share of a tensor's variance that is left to be quantised, on held-out text. Mean KL: {costs}.",
            ("layer", "tensor", "variance left (share)", "ridge"),
            tuple((i, which.upper(), left[f"{i}.{which}"], ridge[f"{i}.{which}"]) for i, which in tensors),
        )  # fmt: skip
    if transforms := report.get("transforms"):
        before, after = (transforms["qsur"][x] for x in ("before", "after"))
        yield Section(
            "qsur", "QSUR by layer",
            "How much of the space that a quantiser spans is filled, to the power 1/d: higher is better. The chart "
            "shows the mean of a layer's heads, without and with the learned transforms.",
            ("layer", "tensor", "head", "before", "after"),
            tuple(
                (i, which.upper(), head, a, b)
                for i, pair in enumerate(zip(before, after, strict=True))
                for which in WHICH
                for head, (a, b) in enumerate(zip(pair[0][which], pair[1][which], strict=True))
            ),
        )  # fmt: skip
        yield Section(
            "learning", "Learning curve of the transforms",
            "Loss on the windows that were learned from, and on windows that were not.",
            ("text", "step", "loss"),
            (
                *(("training", step, x) for step, x in enumerate(transforms["curve"])),
                *(("held out", x["step"], x["loss"]) for x in transforms["held_out"]),
            ),
        )  # fmt: skip
    exact = plan.as_exact()
    yield Section(
        "memory", "Memory against context", "Bytes of the cache of one sequence, and the bits that they amount to.",
        ("context (tokens)", "packed (bytes)", "16 bits (bytes)", "effective bits"),
        tuple(
            (n, plan.bytes_at(n), exact.bytes_at(n), plan.effective_bits(n))
            for n in sorted({*CONTEXTS, artifact.manifest["context"]})
        ),
    )  # fmt: skip


def _pareto(artifact: Artifact, evaluation: Mapping[str, Any] | None) -> Iterator[Section]:
    report, manifest = artifact.report, artifact.manifest
    rows: list[_Row] = [
        ("predicted", f"{x['bits']:g} bits asked", x["effective_bits"], x["kl"], None) for x in report.get("curve", [])
    ]
    chosen = report.get("chosen", 0)
    for i, x in enumerate(report.get("verified", [])):
        name = f"page {x['block_size']}, {x['sink_tokens']} sinks, {x['residual_window']} recent"
        rows.append(("chosen" if i == chosen else "measured", name, x["effective_bits"], x["kl"], None))
    if not report.get("verified") and (solved := report.get("solved")):
        own = stated(report)
        kind = "chosen" if own["measured"] else "chosen, predicted"
        rows.append((kind, "this artifact", solved["effective_bits"], own["kl"], None))
    note = (
        f"Mean KL divergence from the 16-bit cache on calibration text, at {manifest['context']} tokens. The curve is "
        f"predicted{'; plans around the budget were run' if report.get('verified') else ''}."
    )
    if evaluation and "kl" in evaluation:
        rows.append((
            f"chosen, on {text_of(evaluation)}", f"this artifact, {evaluation['context']} tokens",
            evaluation["effective_bits"], evaluation["kl"]["mean"],
            evaluation["flips"]["rate"] if "flips" in evaluation else None,
        ))  # fmt: skip
    found = json.loads(files("kvcli.report").joinpath("peers.json").read_text("utf-8"))
    if rows and manifest["source"]["model"] == found["model"]:
        data = found["data"]
        rows += [
            (f"{x['family']} on {data}", x["name"], x["effective_bits"], x["kl"]["mean"], x["flips"]["rate"])
            for x in found["results"]
        ]
        note += (
            f" Points on {data} were measured on {found['windows']} windows of {found['window']} tokens of that "
            f"text (source: {PEERS}): compare those with one another."
        )
    yield Section(
        "pareto", "Quality against bits", note,
        ("what", "point", "effective bits", "mean KL (nats)", "top-1 flips (share)"), tuple(rows),
    )  # fmt: skip


def _evaluated(found: Mapping[str, Any]) -> Iterator[Section]:
    if "kl_by_position" in found:
        parts = found["kl_by_position"]
        yield Section(
            "sequence", "KL along the sequence",
            f"Mean over {found['windows']} windows of {found['context']} tokens of {text_of(found)}; second halves are "
            "scored: where in a window the cache costs most.",
            ("first position (token)", "last position (token)", "mean KL (nats)"),
            tuple((x["first"], x["first"] + x["tokens"] - 1, x["mean"]) for x in parts),
        )  # fmt: skip
    if "tasks" in found:
        yield Section(
            "tasks", "Tasks",
            "Score less that of the 16-bit cache, with its 95 % interval by bootstrap. Flips are answers that differ, "
            "for better or worse.",
            (
                "task", "items", "score", "16 bits", "difference", "lower end", "upper end", "flips (share)",
                "p (paired)",
            ),
            tuple(
                (
                    name, x["items"], x["score"], x["reference"], x["difference"], *x["difference_interval"],
                    x["flips"], x["p_value"],
                )
                for name, x in found["tasks"].items()
            ),
        )  # fmt: skip
