"""The plot of fidelity.json: mean KL against effective bits, a line for every family of caches.

An image of its own, unlike the report's charts, which take the page's colours: so it brings the colour of its text, one
for light and one for dark.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vl_convert

from kvcli.report import charts

STYLE = "<style>svg{color:#3d444d}@media(prefers-color-scheme:dark){svg{color:#d1d7e0}}</style>"
SHAPES = ("diamond", "circle", "square", "triangle-up", "triangle-down", "cross", "triangle-right")


def spec(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Vega-Lite specification, with its data: all rows of a KL above 0."""
    rows = [
        {"cache": x["name"], "family": x["family"], "bits": x["effective_bits"], "KL": x["kl"]["mean"]}
        for x in result["results"]
        if x["kl"]["mean"] > 0
    ]
    families = list(dict.fromkeys(x["family"] for x in rows))
    colours = {"domain": families, "range": charts.colours(families)}
    shapes = {"domain": families, "range": [SHAPES[i % len(SHAPES)] for i in range(len(families))]}
    family = {"field": "family", "type": "nominal", "legend": {"columns": 3, "symbolSize": 110}}
    return {
        "width": 660, "height": 420, "config": charts.CONFIG, "data": {"values": rows},
        "encoding": {
            "x": {
                "field": "bits", "type": "quantitative", "scale": {"zero": False},
                "title": f"effective bits at {result['window']} tokens",
            },
            "y": {
                "field": "KL", "type": "quantitative", "scale": {"type": "log"},
                "axis": {"values": [10.0**x for x in range(-6, 3)], "format": "~g"},
                "title": "mean KL from the 16-bit cache (nats a token)",
            },
            "color": {**family, "scale": colours},
        },
        "layer": [
            {"mark": {"type": "line", "strokeWidth": 2}},
            {
                "mark": {"type": "point", "filled": True, "opacity": 1, "size": 90},
                "encoding": {"shape": {**family, "scale": shapes}},
            },
        ],
    }  # fmt: skip


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the plot as an SVG file."""
    drawn = vl_convert.vegalite_to_svg(spec(result))
    opening = drawn.index(">", drawn.index("<svg")) + 1
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{drawn[:opening]}{STYLE}{drawn[opening:]}\n", "utf-8")
