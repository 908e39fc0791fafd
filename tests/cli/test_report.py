"""``kvcli report`` and ``kvcli compare`` as their user meets them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from cli_checks import accepted, names, refused


def test_a_page_of_an_artifact_and_of_its_evaluation(pristine, warm, text, tmp_path):
    pytest.importorskip("vl_convert")
    (tmp_path / "eval.json").write_text(accepted(warm("eval", pristine, *text, "--json")))
    words = ("report", pristine, "--eval", "eval.json", "-o", "page.html")
    found = json.loads(accepted(warm(*words, "--json", cwd=tmp_path)))
    page = (tmp_path / "page.html").read_text("utf-8")
    assert found == {"path": "page.html", "bytes": len(page.encode())}
    values = {float(x.partition('"')[0]) for x in page.split('<data value="')[1:]}
    report = json.loads((pristine / "report.json").read_text())
    for x in (*report["curve"], *report["verified"]):
        assert {x["effective_bits"], x["kl"]} <= values
    for which in ("k", "v"):
        assert set(report["sensitivity"]["measured"][which]["kl"]) <= values
    evaluated = json.loads((tmp_path / "eval.json").read_text())
    assert {x["mean"] for x in evaluated["kl_by_position"]} <= values
    refused(warm(*words, cwd=tmp_path), 2, "--force")
    assert "written to" in accepted(warm(*words, "--force", cwd=tmp_path))
    (tmp_path / "eval.json").write_text("[]")
    refused(warm(*words, "--force", cwd=tmp_path), 3, "eval.json")
    refused(warm("report", pristine, "-o", tmp_path / "none" / "page.html"), 2, "page.html")
    assert names(tmp_path) == ["eval.json", "page.html"]


@pytest.fixture(scope="module")
def second(pristine, warm, tmp_path_factory) -> Path:
    """The same model at fewer bits, not run."""
    out = tmp_path_factory.mktemp("second") / "fewer"
    accepted(warm("solve", pristine, "--bits", 3.5, "-o", out, "--json"))
    return out


def test_artifacts_beside_16_bits_without_running_them(pristine, second, warm):
    found = json.loads(accepted(warm("compare", pristine, second, "--json")))
    assert [x["name"] for x in found["artifacts"]] == ["artifact", "fewer", "16 bits"]
    assert [x["kl_measured"] for x in found["artifacts"]] == [True, False, False]
    for path, own in zip((pristine, second), found["artifacts"], strict=False):
        shown = json.loads(accepted(warm("inspect", path, "--json")))
        assert all(own[x] == shown[x] for x in ("effective_bits", "nominal_bits", "block_size", "model_bytes"))
        assert own["bytes_at"]["8192"] == shown["bytes_at"]["8192"]
        assert found["artifacts"][2]["bytes_at"]["8192"] == shown["bytes_at_16_bits"]["8192"]
    done = warm("compare", pristine, second)
    assert "~" in done.stderr
    assert "KL on calibration text" in done.stdout


def test_what_is_measured_is_what_eval_measures(pristine, second, warm, text):
    words = (*text, "--tasks", "ppl,kl,flips,passkey", "--json")
    first, other, exact = json.loads(accepted(warm("compare", pristine, second, *words)))["artifacts"]
    alone = json.loads(accepted(warm("eval", second, *words)))
    assert other["fidelity"]["kl"] == alone["kl"]
    assert other["fidelity"]["ppl"] == alone["ppl"]
    assert other["fidelity"]["measured_bytes"] == alone["measured_bytes"]
    assert first["fidelity"]["ppl"]["reference"] == alone["ppl"]["reference"] == exact["fidelity"]["ppl"]["value"]
    assert exact["fidelity"]["kl"]["mean"] == exact["tasks"]["passkey"]["flips"] == 0
    assert exact["fidelity"]["measured_bytes"] == alone["reference_bytes"]
    assert first["tasks"]["passkey"]["reference"] == other["tasks"]["passkey"]["reference"]
    assert exact["tasks"]["passkey"]["score"] == first["tasks"]["passkey"]["reference"]


@pytest.mark.slow
def test_speed_is_one_race_of_all(pristine, second, warm):
    done = warm("compare", pristine, second, "--speed", "--depth", 64, "--threads", 1, "--json")
    found = [x["speed"] for x in json.loads(done.stdout)["artifacts"]]
    assert len(found) == 3
    assert len({x["backend"] for x in found}) == 1
    assert all(x["tokens_per_s"] > 0 and x["depth"] == 64 for x in found)


def test_refusals_of_compare(pristine, warm, tmp_path):
    refused(warm("compare", pristine, "--window", 64), 2, "--window")
    refused(warm("compare", pristine, "--tasks", "kl,nothing"), 2, "'nothing'")
    refused(warm("compare", pristine, "--data", "builtin", "--window", 10**6), 2, "context")
    refused(warm("compare", pristine, "--speed", "--depth", 10**6), 2, "context")
    refused(warm("compare", pristine, tmp_path), 3)
