"""Vega-Lite specifications of a page's charts, drawn from the same rows as its tables.

Text and lines take ``currentColor``, so that charts follow the page from light to dark and onto paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvcli.report.gathering import Section

_Spec = dict[str, Any]

# Okabe and Ito's with a lighter blue: told apart by people who see colours differently, readable on light and dark
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#2e86c1", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
GREY, OLIVE = "#8c8c8c", "#a89f00"
CACHES = {
    "kvcli": BLUE, "llama.cpp": ORANGE, "KIVI, 32 exact": GREEN, "KIVI, 128 exact": OLIVE,
    "Transformers HQQ": PURPLE, "Transformers quanto": GREY,
}  # fmt: skip
KEYS = {"domain": ["K", "V"], "range": [SKY, ORANGE]}
HEIGHT = 300

CONFIG: _Spec = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "currentColor", "titleColor": "currentColor", "tickColor": "currentColor",
        "domainColor": "currentColor", "gridColor": "currentColor", "gridOpacity": 0.15,
        "labelFontSize": 12, "titleFontSize": 13, "titleFontWeight": "normal",
    },
    "legend": {
        "labelColor": "currentColor", "titleColor": "currentColor", "orient": "top", "title": None,
        "labelFontSize": 12, "labelLimit": 300, "symbolSize": 90,
    },
}  # fmt: skip


def spec(section: Section) -> _Spec:
    """Return the Vega-Lite specification of a section, with its data."""
    data = [dict(zip(section.columns, row, strict=True)) for row in section.rows]
    return {"width": "container", "height": HEIGHT, "config": CONFIG, **_DRAW[section.name](section, data)}


def colours(names: Sequence[str]) -> list[str]:
    """Return the colours of families of caches, ``… on TEXT`` or not, and of what else stands beside them."""
    own = {"predicted": BLUE, "measured": SKY, **CACHES}
    return [own.get(x.partition(" on ")[0], RED) for x in names]


def _field(name: str, kind: str = "quantitative", **more: Any) -> _Spec:
    escaped = name.replace(".", "\\.").replace("[", "\\[").replace("]", "\\]")
    return {"field": escaped, "type": kind, "title": name, **more}


def _tips(section: Section) -> list[_Spec]:
    return [_field(x, "nominal") for x in section.columns]


def _layer(count: int) -> _Spec:
    step = max(1, count // 16)
    return {"axis": {"labelAngle": 0, "values": list(range(0, count, step))}}


def _positive(name: str) -> list[_Spec]:
    # nothing of zero has a place on a logarithmic axis; the table has it
    return [{"filter": f"datum['{name}'] > 0"}]


_Data = list[dict[str, Any]]


def _pareto(section: Section, data: _Data) -> _Spec:
    kinds = list(dict.fromkeys(x["what"] for x in data))
    shapes = {"predicted": "circle", "measured": "square", "chosen": "diamond", "chosen, predicted": "diamond"}
    scale = {"domain": kinds, "range": colours(kinds)}
    shape = {"domain": kinds, "range": [shapes.get(x, "triangle-up") for x in kinds]}
    bits, kl = section.columns[2:4]
    return {
        "height": 400, "data": {"values": data}, "transform": _positive(kl),
        "encoding": {
            "x": _field(bits, scale={"zero": False}), "y": _field(kl, scale={"type": "log"}),
            "color": {"field": "what", "type": "nominal", "scale": scale, "legend": {"columns": 3}},
        },
        "layer": [
            {"transform": [{"filter": "datum.what == 'predicted'"}], "mark": {"type": "line", "opacity": 0.7}},
            {
                "mark": {"type": "point", "filled": True, "opacity": 1},
                "encoding": {
                    "shape": {"field": "what", "type": "nominal", "scale": shape, "legend": {"columns": 3}},
                    "size": {
                        "condition": {"test": "indexof(datum.what, 'chosen') == 0", "value": 260}, "value": 110,
                    },
                    "tooltip": _tips(section),
                },
            },
        ],
    }  # fmt: skip


def _bits(section: Section, data: _Data) -> _Spec:
    long = [
        {"layer": x["layer"], "tensor": which, "bits": x[f"{which} bits"], "format": x[f"{which} format"]}
        for x in data
        for which in ("K", "V")
    ]
    scale = {"scheme": "viridis", "domain": [2, 8], "clamp": True, "reverse": True}
    cell = [_field(x, "nominal") for x in ("layer", "tensor", "bits", "format")]
    return {
        "height": 90, "data": {"values": long},
        "encoding": {
            "x": _field("layer", "ordinal", **_layer(len(data))),
            "y": _field("tensor", "nominal", axis={"title": None, "labelFontSize": 14}),
        },
        "layer": [
            {
                "mark": {"type": "rect", "stroke": "currentColor", "strokeOpacity": 0.25},
                "encoding": {
                    "color": _field("bits", scale=scale, legend={"title": "bits", "format": "d", "tickCount": 6}),
                    "tooltip": cell,
                },
            },
            {
                "mark": {"type": "text", "fontSize": 12 if len(data) <= 40 else 8},
                "encoding": {
                    "text": _field("bits"),
                    "color": {"condition": {"test": "datum.bits >= 5", "value": "white"}, "value": "black"},
                },
            },
        ],
    }  # fmt: skip


def _by_tensor(section: Section, data: _Data, values: Mapping[str, str], y: str, *, log: bool) -> _Spec:
    """Draw two columns of one layer each as a line of K and one of V."""
    long = [{"layer": x["layer"], "tensor": which, y: x[column]} for x in data for which, column in values.items()]
    return _lines(long, y, len(data), log=log)


def _lines(long: _Data, y: str, layers: int, *, log: bool = False, **encoding: Any) -> _Spec:
    names = [x for x in long[0] if x != y] + [y]
    return {
        "data": {"values": long}, "transform": _positive(y) if log else [],
        "mark": {"type": "line", "point": {"size": 60}},
        "encoding": {
            "x": _field("layer", "ordinal", **_layer(layers)), "y": _field(y, scale={"type": "log"} if log else {}),
            "color": {"field": "tensor", "type": "nominal", "scale": KEYS},
            "tooltip": [_field(x, "nominal") for x in names], **encoding,
        },
    }  # fmt: skip


def _sensitivity(section: Section, data: _Data) -> _Spec:
    return _by_tensor(section, data, {"K": section.columns[1], "V": section.columns[2]}, "mean KL (nats)", log=True)


def _front(section: Section, data: _Data) -> _Spec:
    bits, loss = section.columns
    return {
        "data": {"values": data}, "mark": {"type": "line", "point": {"size": 60}, "color": BLUE},
        "encoding": {
            "x": _field(bits, scale={"zero": False}), "y": _field(loss, scale={"zero": False}),
            "tooltip": _tips(section),
        },
    }  # fmt: skip


def _predictors(section: Section, data: _Data) -> _Spec:
    layers = sorted({x["layer"] for x in data})
    drawn = _lines(data, "variance left (share)", 1)
    drawn["encoding"]["x"] = _field("layer", "ordinal", axis={"labelAngle": 0}, sort=layers)
    return drawn


def _qsur(section: Section, data: _Data) -> _Spec:
    heads: dict[tuple[int, str], _Data] = {}
    for x in data:
        heads.setdefault((x["layer"], x["tensor"]), []).append(x)
    long = [
        {"layer": layer, "tensor": which, "transforms": name, "QSUR": sum(x[column] for x in own) / len(own)}
        for (layer, which), own in heads.items()
        for name, column in (("without", "before"), ("with", "after"))
    ]
    dash = {
        "field": "transforms", "type": "nominal",
        "scale": {"domain": ["without", "with"], "range": [[4, 4], [1, 0]]},
        "legend": {"symbolType": "stroke", "symbolStrokeColor": "gray", "symbolStrokeWidth": 2, "symbolSize": 300},
    }  # fmt: skip
    drawn = _lines(long, "QSUR", 1 + max(x["layer"] for x in data))
    drawn["encoding"]["y"]["scale"] = {"zero": False}
    del drawn["mark"]
    # points that belonged to the lines would wipe the dashes out of the legend
    lines = {"mark": "line", "encoding": {"strokeDash": dash}}
    points = {"mark": {"type": "point", "filled": True, "size": 60, "opacity": 1}}
    return {**drawn, "layer": [lines, points]}


def _learning(section: Section, data: _Data) -> _Spec:
    return {
        "data": {"values": data}, "mark": {"type": "line", "point": len(data) < 100},
        "encoding": {
            "x": _field("step"), "y": _field("loss", scale={"zero": False}), "tooltip": _tips(section),
            "color": {
                "field": "text", "type": "nominal",
                "scale": {"domain": ["training", "held out"], "range": [SKY, ORANGE]},
            },
        },
    }  # fmt: skip


def _memory(section: Section, data: _Data) -> _Spec:
    context, packed, exact, _ = section.columns
    long = [
        {"context": x[context], "cache": name, "MiB": x[column] / 2**20}
        for x in data
        for name, column in (("packed", packed), ("16 bits", exact))
    ]
    return {
        "data": {"values": long}, "mark": {"type": "line", "point": {"size": 50}},
        "encoding": {
            "x": _field("context", title=context, scale={"type": "log", "base": 2}),
            "y": _field("MiB", scale={"type": "log"}),
            "tooltip": [_field(x, "nominal") for x in ("context", "cache", "MiB")],
            "color": {
                "field": "cache", "type": "nominal", "scale": {"domain": ["packed", "16 bits"], "range": [SKY, ORANGE]},
            },
        },
    }  # fmt: skip


def _sequence(section: Section, data: _Data) -> _Spec:
    first, last, kl = section.columns
    return {
        "data": {"values": data}, "mark": {"type": "bar", "color": BLUE},
        "encoding": {
            "x": _field(first, scale={"zero": False}, bin="binned", title="position (token)", axis={"tickCount": 8}),
            "x2": {"field": last}, "y": _field(kl), "tooltip": _tips(section),
        },
    }  # fmt: skip


def _tasks(section: Section, data: _Data) -> _Spec:
    return {
        "height": 60 + 28 * len(data), "data": {"values": data},
        "encoding": {"y": _field("task", "nominal", sort=None, axis={"title": None, "labelLimit": 300})},
        "layer": [
            {
                "mark": {"type": "rule", "color": BLUE, "strokeWidth": 2},
                "encoding": {
                    "x": _field("lower end", title="score less that of 16 bits"), "x2": {"field": "upper end"},
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 90, "color": BLUE, "opacity": 1},
                "encoding": {"x": _field("difference", title="score less that of 16 bits"), "tooltip": _tips(section)},
            },
            {
                "data": {"values": [{"zero": 0}]},
                "mark": {"type": "rule", "color": "currentColor", "strokeDash": [4, 4]},
                "encoding": {"x": {"field": "zero", "type": "quantitative"}, "y": None},
            },
        ],
    }  # fmt: skip


_DRAW: dict[str, Callable[[Section, _Data], _Spec]] = {
    "pareto": _pareto,
    "bits": _bits,
    "sensitivity": _sensitivity,
    "front": _front,
    "predictors": _predictors,
    "qsur": _qsur,
    "learning": _learning,
    "memory": _memory,
    "sequence": _sequence,
    "tasks": _tasks,
}
