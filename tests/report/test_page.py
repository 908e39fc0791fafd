"""The report: its numbers are those of report.json, and it opens in a browser without a word or a request."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kvcli.artifact.reader import Artifact
from kvcli.artifact.schema import MANIFEST
from kvcli.errors import InputError
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.report import charts
from kvcli.report.gathering import sections, stated

pytest.importorskip("vl_convert")

from kvcli.report.page import library, render

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LAYERS = 3
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "results" / "fidelity.json"


def point(effective: float, kl: float, **more: Any) -> dict[str, Any]:
    shared = {"block_size": 16, "sink_tokens": 4, "residual_window": 16}
    return {
        **shared,
        "effective_bits": effective,
        "nominal_bits": effective - 0.3,
        "predicted_kl": kl,
        "kl": kl,
        **more,
    }


REPORT = {
    "sensitivity": {
        "measured": {
            which: {"format": {"bits": 3}, "kl": [scale / 3 ** (i + 1) for i in range(LAYERS)]}
            for which, scale in (("k", 0.1), ("v", 0.01))
        }
    },
    "verified": [point(4.1, 1 / 70, delta_nll=0.01), point(4.2, 1 / 90, delta_nll=0.02)],
    "chosen": 1,
    "curve": [point(b, math.exp(-b), bits=b) for b in (2.0, 3.0, 4.0)],
    "front": {
        "nominal": False, "context": 512, "evaluations": 7, "points": [{"bits": 3.3, "loss": 0.123456789}],
    },
    "mode": {"adapters": "always", "reason": "<b>asked</b> for"},
    "adapters": {
        "left": {"10.k": 1 / 7, "2.v": 1 / 9}, "ridge": {"10.k": 1e-3, "2.v": 1e-2},
        "kl": {"none": 0.2, "always": 0.1}, "model_bytes": 5,
    },
    "transforms": {
        "qsur": {
            side: [{"k": [x / (i + 3), x / 7], "v": [x / 11, x / 13]} for i in range(LAYERS)]
            for side, x in (("before", 0.5), ("after", 0.9))
        },
        "curve": [1 / 3, 1 / 6], "held_out": [{"step": 0, "loss": 1 / 2}, {"step": 2, "loss": 1 / 5}],
    },
}  # fmt: skip
TASK = {
    "items": 6, "score": 0.5, "reference": 2 / 3, "difference": -1 / 6, "difference_interval": [-0.5, 1 / 9],
    "flips": 1 / 6, "p_value": 0.77,
}  # fmt: skip


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """An artifact with all that a report can hold."""
    layers = tuple(LayerPlan(2, 32, KVFormat(2 + i, group=16), KVFormat(2, group=16)) for i in range(LAYERS))
    manifest = {
        "context": 512, "budget": {"bits": 4.25, "nominal": False}, "kvcli_version": "0.1.0",
        "source": {"model": "<script>alert(1)</script>", "sha256": "ab" * 32},
        "calibration": {"data": "builtin", "tokens": 1024, "seed": 0},
    }  # fmt: skip
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    return Artifact(tmp_path, manifest, CachePlan(layers, dtype="float32"), REPORT)


@pytest.fixture
def evaluation(artifact: Artifact) -> dict[str, Any]:
    """What ``kvcli eval --json`` prints, as far as a report shows it."""
    return {
        "artifact": hashlib.sha256((artifact.path / MANIFEST).read_bytes()).hexdigest(), "data": "/a/folder/text.txt",
        "context": 256, "windows": 2, "effective_bits": 4.3, "kl": {"mean": 1 / 60}, "flips": {"rate": 1 / 8},
        "kl_by_position": [{"first": 128 + 8 * i, "tokens": 8, "mean": 1 / (50 + i)} for i in range(16)],
        "tasks": {"passkey": TASK, "generation": {**TASK, "difference": -1 / 7}},
    }  # fmt: skip


class _Values(HTMLParser):
    """All numbers of a page, with all their digits."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[float] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "data":
            self.found.add(float(dict(attrs)["value"]))


def floats(x: Any) -> set[float]:
    if isinstance(x, dict):
        return set().union(*map(floats, x.values()))
    if isinstance(x, list):
        return set().union(*map(floats, x))
    return {x} if isinstance(x, float) else set()


def test_every_number_that_is_drawn_is_the_reports_and_stands_on_the_page(artifact, evaluation):
    found = _Values(render(artifact, evaluation)).found
    shown = ("measured", "front", "left", "ridge", "qsur", "held_out")
    parts = {**REPORT, **REPORT["sensitivity"], **REPORT["adapters"], **REPORT["transforms"]}
    for name in shown:
        assert floats(parts[name]) <= found, name
    for x in (*REPORT["curve"], *REPORT["verified"]):
        assert {x["effective_bits"], x["kl"]} <= found
    assert floats(parts["curve"]) <= found
    assert floats(evaluation) <= found
    memory = {artifact.plan.bytes_at(512), artifact.plan.effective_bits(512), artifact.plan.as_exact().bytes_at(512)}
    assert memory <= found


def test_charts_are_drawn_from_the_rows_of_the_tables(artifact, evaluation):
    for section in sections(artifact, evaluation):
        drawn = floats(charts.spec(section)["data"]["values"])
        tables = {x for row in section.rows for x in row if isinstance(x, float)}
        if section.name == "memory":  # in MiB
            drawn = {x * 2**20 for x in drawn}
            tables = {float(x) for row in section.rows for x in row[1:3]}
        if section.name == "qsur":  # means of heads
            assert min(tables) <= min(drawn) <= max(drawn) <= max(tables)
        else:
            assert drawn == tables, section.name


def test_no_legend_has_symbols_that_cannot_be_seen(artifact, evaluation):
    import vl_convert

    seen = 0
    for section in sections(artifact, evaluation):
        for legend in vl_convert.vegalite_to_vega(charts.spec(section)).get("legends", []):
            symbols = legend.get("encode", {}).get("symbols", {}).get("update", {})
            assert "fill" in legend or symbols.get("stroke", {}).get("value") != "transparent", section.name
            seen += 1
    assert seen > 3


def test_peers_are_those_of_the_benchmark_and_only_for_its_model(artifact):
    assert not any("llama.cpp" in row[0] for row in sections(artifact)[0].rows)
    measured = json.loads(BENCHMARK.read_text())
    source = {**artifact.manifest["source"], "model": measured["model"]}
    pareto = sections(replace(artifact, manifest={**artifact.manifest, "source": source}))[0]
    own = [x for x in pareto.rows if x[0].endswith(f" on {measured['data']}")]
    assert [x[2:] for x in own] == [
        (x["effective_bits"], x["kl"]["mean"], x["flips"]["rate"]) for x in measured["results"]
    ]
    assert {x["family"] for x in measured["results"]} >= {"kvcli", "llama.cpp"}
    scale = charts.spec(pareto)["encoding"]["color"]["scale"]
    drawn = dict(zip(scale["domain"], scale["range"], strict=True))
    assert len({drawn[x] for x in {x[0] for x in own}}) == len({x[0] for x in own})
    assert "benchmarks/results/fidelity.json" in pareto.note


def test_why_predictors_are_used_so_stands_beside_the_bits(artifact, evaluation):
    (bits,) = (x for x in sections(artifact, evaluation) if x.name == "bits")
    assert bits.note.endswith("Predictors: always, <b>asked</b> for.")
    assert "<b>asked" not in render(artifact, evaluation)


def test_what_a_plan_costs_is_measured_or_predicted():
    assert stated(REPORT) == {"kl": 1 / 90, "ppl_pct": pytest.approx(100 * math.expm1(0.02)), "measured": True}
    solved = {"kl": 0.3, "predicted_ppl_pct": 3.0, "measured_kl": None, "measured_ppl_pct": None}
    assert stated({"verified": [], "solved": solved}) == {"kl": 0.3, "ppl_pct": 3.0, "measured": False}
    solved |= {"measured_kl": 0.2, "measured_ppl_pct": 2.0}
    assert stated({"verified": [], "solved": solved}) == {"kl": 0.2, "ppl_pct": 2.0, "measured": True}
    assert stated({}) == {"kl": None, "ppl_pct": None, "measured": False}


def test_an_artifact_without_a_report_still_has_its_plan(artifact):
    assert [x.name for x in sections(replace(artifact, report={}))] == ["bits", "memory"]


@pytest.mark.parametrize(
    "wrong",
    [{"curve": [{"bits": 2}]}, {"verified": 3}, {"curve": [point(2, math.nan, bits=2)]}, {"adapters": {"left": {}}}],
)
def test_a_report_of_another_shape_is_refused_in_one_sentence(artifact, wrong):
    with pytest.raises(InputError, match=r"^report\.json is not as kvcli writes it"):
        render(replace(artifact, report={**REPORT, **wrong}))


def test_an_evaluation_of_something_else_is_refused(artifact, evaluation):
    with pytest.raises(InputError, match="not of"):
        sections(artifact, {**evaluation, "artifact": "0" * 64})
    with pytest.raises(InputError, match=r"^the evaluation is not as"):
        sections(artifact, {**evaluation, "tasks": {"passkey": {}}})


def test_a_table_says_how_many_rows_it_has(artifact, evaluation):
    page = render(artifact, evaluation)
    counts = [len(x.rows) for x in sections(artifact, evaluation)]
    assert 1 in counts
    assert re.findall(r"<summary>Table, (.*?)</summary>", page) == ["1 row" if n == 1 else f"{n} rows" for n in counts]


def test_the_page_is_one_small_file_that_names_no_folder(artifact, evaluation):
    page = render(artifact, evaluation)
    assert len(page.encode()) < 5 * 2**20
    assert "<script>alert" not in page
    assert "/a/folder" not in page
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page.replace(library(), ""))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_every_chart_and_has_nothing_to_say(artifact, evaluation, tmp_path, scheme):
    playwright = pytest.importorskip("playwright.sync_api")
    file = tmp_path / "page.html"
    file.write_text(render(artifact, evaluation), "utf-8")
    count = len(sections(artifact, evaluation))
    said: list[str] = []
    asked: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(color_scheme=scheme)
        tab.set_default_timeout(120_000)
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("console", lambda message: said.append(message.text))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(file.as_uri())
        playwright.expect(tab.locator(".chart svg.marks")).to_have_count(count)
        for chart in tab.locator(".chart svg.marks").all():
            assert chart.locator("[aria-label$='axis']").count() or chart.locator(".role-axis").count()
        tab.emulate_media(media="print")
        ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        browser.close()
    assert said == []
    assert [x for x in asked if not x.startswith(("file:", "data:"))] == []
    assert ground == "rgb(255, 255, 255)"
