"""The evidence: peers are fed and counted right, rows are kept, and the page is that of the result files."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import QuantizedLayer

from kvcli.calibration import corpora
from kvcli.evaluation.fidelity import evaluate
from kvcli.models.loading import LoadedModel, load
from kvcli.runtime.packed_model import PackedModel

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MODULES = ("demo", "evidence", "evidence_page", "fidelity", "fidelity_plot", "peers", "quality_peers")
TOKENS = 200


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The benchmarks, importable as they are when one of them is run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def judge(loaded: LoadedModel, tinystories: Path) -> Any:
    import quality_peers

    windows = corpora.windows("builtin:narrative", loaded.tokenizer, TOKENS, limit=2)
    return quality_peers.Judge(loaded, tinystories, windows)


# --- peers ------------------------------------------------------------------------------------------------------------


def test_kivi_is_measured_as_kvclis_own_plans_are(judge):
    import quality_peers

    found = next(x for x in quality_peers.peers(judge) if x.name == "KIVI, 32 exact, 2 bits").measure()
    plan = quality_peers.kivi_plan(judge, 2, 32)
    assert {(x.k.bits, x.k.axis, x.k.group, x.k.symmetric) for x in plan.layers} == {(2, "channel", 32, False)}
    assert {(x.v.bits, x.v.axis, x.v.symmetric) for x in plan.layers} == {(2, "token", False)}
    subject = PackedModel(judge.loaded, plan, {})
    expected = evaluate(subject, replace(subject, plan=plan.as_exact()), judge.windows)
    assert found["kl"]["mean"] > 0
    assert {x: expected[x] for x in found} == found


class Unquantised(QuantizedLayer):
    """A quantised layer of Transformers that loses nothing."""

    reads: list[int] = []  # noqa: RUF012  # tokens whose codes were read, each time

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor

    def _dequantize(self, tensor: Tensor) -> Tensor:
        self.reads.append(tensor.shape[-2])
        return tensor


def test_a_quantised_cache_that_loses_nothing_is_the_stock_model_in_16_bits(judge, monkeypatch):
    import quality_peers

    Unquantised.reads.clear()
    monkeypatch.setitem(quality_peers.BACKENDS, "none", ("none", "torch", 0))
    monkeypatch.setattr(
        "transformers.QuantizedCache",
        lambda kind, config, nbits, axis_key, axis_value: Cache(
            layers=[Unquantised(residual_length=32) for _ in range(config.num_hidden_layers)]
        ),
    )
    found = quality_peers._transformers(judge, "none", 4)
    assert found["kl"]["mean"] < 1e-5  # the reference rounds keys and values to 16 bits
    assert found["effective_bits"] == 16
    # codes are read for every scored token but the first, in chunks that a full residual ends
    assert sorted(set(Unquantised.reads)) == [TOKENS // 2, TOKENS // 2 + 32, TOKENS // 2 + 64, TOKENS // 2 + 96]


def test_bytes_are_those_of_every_tensor_within():
    from quality_peers import held

    codes, scale = torch.zeros(6, dtype=torch.uint8), torch.zeros(4)
    assert held((codes, {"scale": scale, "zero": scale.half(), "shape": (2, 3), "none": None})) == 6 + 8 + 8
    assert held([codes.int(), [codes]]) == 24 + 6


def test_llama_cpp_is_absent_where_there_is_no_gguf(judge):
    from quality_peers import Absent, peers

    with pytest.raises(Absent, match=r"GGUF|installed"):
        next(x for x in peers(judge) if x.group == "llama.cpp").measure()


@pytest.mark.slow
def test_llama_cpp_reads_as_the_stock_model_does(smollm2):
    pytest.importorskip("llama_cpp")
    from quality_peers import Judge

    loaded = load(str(smollm2), dtype="float32")
    judge = Judge(loaded, smollm2, corpora.windows("builtin:narrative", loaded.tokenizer, 48, limit=1))
    both = [judge.llama.log_probs(judge.windows[0], x, judge.scored) for x in ("f16", "q8_0/q4_0")]
    assert [x[1:] for x in both] == [(16, 48 * 2 * 11520), (6.5, 48 * 6.5 * 11520 / 8)]
    kl = [float((p.exp() * (p - q)).sum(-1).mean()) for p in judge.exact for q, *_ in both]
    assert kl[0] < kl[1] < 0.5
    assert kl[0] < 0.05


# --- rows -------------------------------------------------------------------------------------------------------------


def row(name: str, family: str, bits: float, kl: float = 0.1) -> dict[str, Any]:
    return {
        "kind": "kvcli" if family == "kvcli" else "peer", "name": name, "family": family, "effective_bits": bits,
        "kl": {"mean": kl}, "ppl": {"delta_pct": 1.0}, "flips": {"rate": 0.1}, "seconds": 1.0,
    }  # fmt: skip


def test_rows_are_kept_for_the_same_question_only(tmp_path):
    from fidelity import Rows

    path, asked = tmp_path / "new" / "rows.json", {"question": "?", "windows": 4}
    rows = Rows(path, asked, fresh=False)
    rows.result["skipped"]["b"] = "not installed"
    for x in (row("a", "them", 4), row("b", "them", 8), row("c", "kvcli", 3)):
        rows.add(x)
    kept = Rows(path, asked, fresh=False)
    assert [x["name"] for x in kept.result["results"]] == ["c", "b", "a"]
    assert kept.result["skipped"] == {}
    assert kept.has("a")
    assert not Rows(path, asked, fresh=True).has("a")
    assert not Rows(path, {**asked, "windows": 1}, fresh=False).has("a")


def test_every_row_is_on_the_plot():
    pytest.importorskip("vl_convert")
    from fidelity_plot import spec

    found = json.loads((RESULTS / "fidelity.json").read_text())
    drawn = spec(found)
    assert [(x["bits"], x["KL"]) for x in drawn["data"]["values"]] == [
        (x["effective_bits"], x["kl"]["mean"]) for x in found["results"]
    ]
    scale = drawn["encoding"]["color"]["scale"]
    assert scale["domain"] == list(dict.fromkeys(x["family"] for x in found["results"]))
    assert len(set(scale["range"])) == len(scale["domain"])
    committed = (ROOT / "docs" / "evidence" / "fidelity.svg").read_text()
    assert all(x in committed for x in scale["domain"])
    assert committed.count('aria-roledescription="point"') == len(found["results"])


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_is_that_of_the_result_files():
    from evidence_page import page

    assert page(RESULTS) == (ROOT / "docs" / "evidence.md").read_text("utf-8"), "run python benchmarks/evidence.py"


def evidence() -> dict[str, Any]:
    interval = {"interval": [0.25, 0.75]}
    fidelity = {
        "context": 64, "windows": 2, "scored_tokens": 64,
        "ppl": {"value": 11.5, "reference": 10.0, "delta_pct": 15.0, "interval_pct": [14.0, 16.0]},
        "kl": {"mean": 0.5, "p99": 0.0004321, "p999": 2.5, **interval}, "flips": {"rate": 0.5, **interval},
        "kl_by_position": [{"first": 32, "tokens": 16, "mean": 0.375}, {"first": 48, "tokens": 16, "mean": 0.625}],
    }  # fmt: skip
    task = {
        "items": 60, "reference": 0.7, "score": 0.65, "interval": [0.6, 0.7], "difference": -0.05, "won": 3, "lost": 6,
        "difference_interval": [-0.1, 0.0], "flips": 0.2, "p_value": 0.5078,
        "repetition": {"value": 0.3, "reference": 0.2},
    }  # fmt: skip
    plan = {
        "effective_bits": 3.2468, "nominal_bits": 2.75, "block_size": 16, "sink_tokens": 4, "residual_window": 32,
        "bytes_at": {"1024": 2**20}, "bytes_at_16_bits": {"1024": 5 * 2**20},
    }  # fmt: skip
    return {
        "model": "m", "data": "d.txt", "suite": "quick", "limit": 2, "questions": 3, "windows": None,
        "window": 64, "calibration": "c", "recipe": "r",
        "artifacts": {"3.25": {"plan": plan, "fidelity": fidelity, "tasks": {"passkey": task}}},
        "skipped": {"mmlu": "no file"},
    }  # fmt: skip


def test_what_was_measured_stands_on_the_page(tmp_path):
    from evidence_page import page

    (tmp_path / "evidence.json").write_text(json.dumps(evidence()))
    shown = page(tmp_path)
    for line in (
        "| 3.25 | 3.247 | 2.75 | 16 | 4 + 32 | 1.0 MiB |",
        "| 16 bits | 16 | 16 |  |  | 5.0 MiB |",
        "| 3.25 | 11.500 | +15.00 (+14.00 to +16.00) | 0.5000 (0.2500 to 0.7500) | 0.00043 | 2.5000 "
        "| 50.0 (25.0 to 75.0) |",
        "| 48 to 63 | 0.6250 |",
        "| passkey | 3.25 | 60 | 0.700 | 0.650 (0.600 to 0.700) | -0.050 (-0.100 to 0.000) | 3 / 6 | 20.0 | 0.51 |",
        "| passkey | 3.25 | repetition | 0.200 | 0.300 |",
        "Not asked, for want of their data: mmlu.",
    ):
        assert f"{line}\n" in shown
    assert "--data d.txt --suite quick --limit 2 --questions 3 --keep" in shown
    assert "##" not in re.sub(r"^## (Bits and bytes|Perplexity, KL and flips|KL along.*|Tasks)$", "", shown, flags=re.M)


MORE = {
    "composition": {
        "data": "d.txt", "results": [
            {
                "methods": names, "budget": 3.25, "windows": 2, "effective_bits": 3.2, "model_bytes": 2**20,
                "kl": {"mean": 0.5, "p99": 1.0, "p999": 2.0}, "ppl": {"delta_pct": 3.0}, "flips": {"rate": 0.25},
                "decode_s": 0.05, "calibration_s": 120.0,
            }
            for names in (["search", "adapters"], [])
        ],
    },
    "capacity": {
        "data": "d.txt", "windows": 2, "rounds": 5, "machine": {"threads": 2}, "results": [{
            "tokens": 1024, "bits": {"running": 3.5, "idle": 2.5, "16 bits": 16.0}, "kl": {"mean": 0.0125},
            "flips": {"rate": 0.05}, "seconds": {"demote": 0.5, "promote": 0.25}, "ratios": {"prefill / promote": 12.0},
        }],
    },
    "soak": {
        "settings": {"clients": 64, "minutes": 10.0, "memory": "64MiB"}, "finished": 99, "different": 0, "vanished": 9,
        "checks": {"no_5xx": True, "memory_flat": False}, "last_metrics": {"kvcli_preemptions_total": 7.0},
        "memory_growth": 1.25,
    },
}  # fmt: skip


def test_ablation_idle_sequences_and_soak_stand_on_the_page(tmp_path):
    from evidence_page import page

    for name, found in MORE.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    shown = page(tmp_path)
    own = "3.200 | 0.5000 | 1.0000 | 2.0000 | +3.00 | 25.0 | 1.0 MiB | 50 | 2 |"
    assert shown.index(f"| none | {own}\n") < shown.index(f"| search + predictors | {own}\n")
    assert "| 1024 | 3.50 | 2.50 | 0.0125 | 5.0 | 0.50 | 0.25 | 12.0 |\n" in shown
    said = " ".join(shown.split())
    assert "99 answers finished, 0 of them different" in said
    assert "1.250 times that in the second. Holds: no 5xx. Does not hold: memory flat." in said


def test_a_page_of_nothing_has_no_table(tmp_path):
    from evidence_page import HEAD, page

    assert page(tmp_path) == HEAD


def test_what_is_measured_is_not_measured_again(tmp_path, monkeypatch):
    import evidence as script

    asked: list[tuple[str, ...]] = []
    whole = evidence()["artifacts"]["3.25"]

    def kvcli(*words: str) -> dict[str, Any]:
        asked.append(words)
        if words[0] in ("calibrate", "solve"):
            out = Path(words[words.index("-o") + 1])
            out.mkdir()
            (out / "kvcli.json").write_text(json.dumps(words))
            (out / "config.json").write_text('{"max_position_embeddings": 1024}')
            return {}
        if words[0] == "inspect":
            more = {"context": 64, "effective_bits_with_model": 3.3, "model_bytes": 5, "dtype": "float32"}
            layer = {"k": {"bits": 3}, "v": {"bits": 2}}
            sizes = {"bytes_at": {"1024": 1, "4096": 4}, "bytes_at_16_bits": {"1024": 5, "4096": 20}}
            return {**whole["plan"], **more, **sizes, "layers": [layer, layer]}
        tasks = words[words.index("--tasks") + 1].split(",")
        return {**whole["fidelity"], "tasks": dict.fromkeys(tasks, whole["tasks"]["passkey"])}

    monkeypatch.setattr(script, "kvcli", kvcli)
    monkeypatch.setattr(script.data_sets, "records", lambda name, folder: refuse(name))

    def refuse(name: str) -> list[Any]:
        raise script.InputError(f"no {name}")

    args = argparse.Namespace(
        model=Path("m"), data="/texts/d.txt", suite="standard", limit=None, questions=None, windows=2, window=64,
        calibration="builtin", recipe="balanced", bits="3.25,wrecked", tasks=None, task_data=None,
        keep=tmp_path / "keep", results=tmp_path,
    )  # fmt: skip
    for name in ("3.25", "wrecked"):
        script.Evidence(args).measure(name)
    done = [x[0] for x in asked]
    assert done == ["calibrate", "solve", "inspect", "eval", "eval", "inspect", "calibrate", "inspect", "eval", "eval"]
    preset = (tmp_path / "keep" / "wrecked.yaml").read_text()
    assert preset.count("nbits_key: 2") == preset.count("nbits_value: 2") == 2
    found = json.loads((tmp_path / "evidence.json").read_text())
    assert found["artifacts"]["3.25"]["tasks"].keys() == {"passkey", "kv_retrieval", "sharing", "generation"}
    assert found["artifacts"]["3.25"]["plan"]["bytes_at"] == {"1024": 1}
    assert "mmlu" in found["skipped"]
    assert found["data"] == "d.txt"
    asked.clear()
    script.Evidence(args).measure("3.25")
    assert asked == []
    (tmp_path / "keep" / "3.25" / "kvcli.json").write_text("another artifact")
    script.Evidence(args).measure("3.25")
    assert [x[0] for x in asked] == ["inspect", "eval", "eval"]
