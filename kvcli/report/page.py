"""The page: sections, charts and the charting library in one HTML file that loads nothing."""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Mapping
from functools import cache
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from kvcli.artifact.reader import Artifact
from kvcli.errors import UsageError
from kvcli.report import charts
from kvcli.report.gathering import Section, sections, stated, text_of

EVALUATED = (
    ("kl", "mean", "mean KL (nats)"),
    ("ppl", "delta_pct", "perplexity (% more)"),
    ("flips", "rate", "top-1 flips (share)"),
)


def render(artifact: Artifact, evaluation: Mapping[str, Any] | None = None) -> str:
    """Return the report of an artifact as one HTML page.

    Numbers stand in tables as ``<data value="…">`` with all their digits, and rounded for a person.

    Parameters
    ----------
    artifact
        What is reported on.
    evaluation
        What ``kvcli eval --json`` printed of it.

    Raises
    ------
    UsageError
        If the charting library is not installed.
    InputError
        If ``report.json`` or the evaluation is not as kvcli writes it, or the evaluation is of something else.
    """
    found = sections(artifact, evaluation)
    scripts = {"library": library(), "script": _own("page.js")}
    manifest, data = artifact.manifest, artifact.manifest["calibration"]
    hashes = (b64encode(hashlib.sha256(x.encode()).digest()).decode() for x in scripts.values())
    # within a script element "<" could end it; JSON has another way to write it
    facts = (f"<div><dt>{escape(name)}</dt><dd>{_cell(x)}</dd></div>" for name, x in _facts(artifact, evaluation))
    drawn = json.dumps({x.name: charts.spec(x) for x in found}, allow_nan=False).replace("<", "\\u003c")
    return Template(_own("page.html")).substitute(
        scripts, charts=drawn, hashes=" ".join(f"'sha256-{x}'" for x in hashes),
        title=escape(f"{manifest['source']['model']} at {manifest['budget']['bits']:g} bits"),
        about=escape(
            f"A packed KV cache, calibrated on {data['tokens']} tokens of {data['data']}, seed {data['seed']}, "
            f"by kvcli {manifest['kvcli_version']}."
        ),
        facts="".join(facts),
        sections="\n".join(map(_section, found)),
        footer=escape(
            f"Source model sha256 {manifest['source']['sha256']}. Charts: Vega-Lite, BSD 3-clause, "
            "© University of Washington Interactive Data Lab."
        ),
    )  # fmt: skip


@cache
def library() -> str:
    """Return Vega-Embed with all it needs as one script.

    Raises
    ------
    UsageError
        If it is not installed.
    """
    try:
        import vl_convert
    except ImportError:
        raise UsageError("report needs the package vl-convert-python: pip install 'kvcli[report]'.") from None
    bundle = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub hides the default
    return bundle.replace("</script", "<\\/script")


def _own(name: str) -> str:
    return files("kvcli.report").joinpath(name).read_text("utf-8")


def _facts(artifact: Artifact, evaluation: Mapping[str, Any] | None) -> list[tuple[str, float]]:
    plan, context, own = artifact.plan, artifact.manifest["context"], stated(artifact.report)
    mine, exact = plan.bytes_at(context), plan.as_exact().bytes_at(context)
    how = "measured" if own["measured"] else "predicted"
    facts: list[tuple[str, float | None]] = [
        (f"effective bits at {context:,} tokens", plan.effective_bits(context)),
        ("nominal bits", plan.nominal_bits),
        (f"bytes at {context:,} tokens", mine),
        ("times smaller than 16 bits", exact / mine),
        (f"mean KL (nats), calibration text, {how}", own["kl"]),
        (f"perplexity (% more), calibration text, {how}", own["ppl_pct"]),
        ("tokens of a page", plan.block_size),
        ("exact first tokens", plan.sink_tokens),
        ("exact recent tokens", plan.residual_window),
        ("bytes held once a model", plan.model_bytes()),
    ]
    for task, key, title in EVALUATED:
        if evaluation and task in evaluation:
            facts.append((f"{title}, {text_of(evaluation)}, measured", evaluation[task][key]))
    return [(name, x) for name, x in facts if x is not None]


def _section(section: Section) -> str:
    titles = "".join(f'<th scope="col">{escape(x)}</th>' for x in section.columns)
    rows = "\n".join("<tr>" + "".join(map(_td, row)) + "</tr>" for row in section.rows)
    count = f"{len(section.rows)} row{'' if len(section.rows) == 1 else 's'}"
    return (
        f'<section id="{section.name}"><h2>{escape(section.title)}</h2>\n<p>{escape(section.note)}</p>\n'
        f'<div class="chart" id="chart-{section.name}" role="img" aria-label="{escape(section.title)}"></div>\n'
        f'<details><summary>Table, {count}</summary><div class="scroll"><table>'
        f"<thead><tr>{titles}</tr></thead>\n<tbody>{rows}</tbody></table></div></details></section>"
    )


def _td(x: Any) -> str:
    return f"<td>{_cell(x)}</td>" if isinstance(x, str) or x is None else f'<td class="number">{_cell(x)}</td>'


def _cell(x: Any) -> str:
    if x is None:
        return ""
    if isinstance(x, str):
        return escape(x)
    return f'<data value="{x!r}">{format(x, "," if isinstance(x, int) else ".4g")}</data>'
