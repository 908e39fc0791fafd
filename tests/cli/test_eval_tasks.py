"""``kvcli eval`` with tasks and suites, as its user meets it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from cli_checks import accepted, refused

ROWS = [{"question": f"Who is {x}?", "choices": ["a dog", "the sun"], "answer": 0} for x in ("Tim", "Lily", "Max")]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(x) + "\n" for x in ROWS))
    return tmp_path


def test_tasks_report_scores_flips_and_intervals_and_go_on_where_they_were(pristine, warm, text, data):
    words = ("--tasks", "passkey,piqa", *text, "--lengths", "150", "--task-data", data, "--resume", data / "log.jsonl")
    found = json.loads(accepted(warm("eval", pristine, *words, "--limit", 2, "--json")))
    assert set(found["tasks"]) == {"passkey", "piqa"}
    for x in found["tasks"].values():
        assert {"score", "reference", "flips", "interval", "difference_interval", "p_value", "items"} <= set(x)
        assert x["items"] == 2
        assert x["interval"][0] <= x["score"] <= x["interval"][1]
    assert not {"ppl", "kl", "flips"} & set(found)
    assert found["effective_bits"] > 0
    lines = (data / "log.jsonl").read_text()
    assert len(lines.splitlines()) == 8
    assert json.loads(accepted(warm("eval", pristine, *words, "--limit", 2, "--json"))) == found
    assert (data / "log.jsonl").read_text() == lines


def test_a_suite_takes_the_tasks_that_it_can_have_and_prints_a_table(pristine, warm, text, data):
    words = ("--suite", "standard", *text, "--lengths", "300", "--task-data", data)
    done = warm("eval", pristine, *words)
    assert done.returncode == 0, done.stderr
    for word in ("perplexity", "passkey", "kv_retrieval", "sharing", "generation", "piqa", "95 % interval"):
        assert word in done.stdout
    assert "hellaswag is left out" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--tasks", "piqa", "--task-data", "none"), 2, "--task-data"),
        (("--tasks", "hellaswag", "--task-data", "."), 3, "hellaswag.jsonl"),
        (("--tasks", "passkey", "--lengths", "9999"), 2, "9999"),
        (("--tasks", "passkey", "--lengths", "8"), 3, "too short"),
        (("--tasks", "generation", "--data", "-"), 2, "generation"),
        (("--tasks", "passkey", "--resume", "."), 2, "--resume"),
        (("--tasks", "nonsense"), 2, "passkey"),
        (("--suite", "huge"), 2, "quick"),
    ],
)
def test_wrong_usage_of_tasks(warm, pristine, words, code, said):
    refused(warm("eval", pristine, *words), code, said)
