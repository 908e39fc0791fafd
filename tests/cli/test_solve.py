"""``kvcli solve`` and ``kvcli calibrate --search`` as their user meets them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from cli_checks import accepted, names, refused, rewritten


def test_the_fewest_bits_within_a_loss(pristine, warm, tmp_path):
    spent = []
    for i, most in enumerate((0.1, 0.01)):
        found = json.loads(accepted(warm("solve", pristine, "--max-kl", most, "-o", tmp_path / str(i), "--json")))
        assert found["predicted_kl"] <= most
        assert found["measured_kl"] is None
        spent.append(found["effective_bits"])
        made = json.loads(accepted(warm("inspect", tmp_path / str(i), "--json")))
        assert made["budget"]["bits"] == made["effective_bits"] == spent[-1]
    assert spent[0] < spent[1]


def test_what_was_predicted_can_be_measured(pristine, warm, tmp_path):
    words = ("solve", pristine, "--bits", 4.5, "--verify")
    found = json.loads(accepted(warm(*words, "-o", tmp_path / "A", "--json")))
    assert found["effective_bits"] <= 4.5
    assert found["predicted_kl"] / 4 < found["measured_kl"] < 4 * found["predicted_kl"]
    assert found["measured_ppl_pct"] != found["predicted_ppl_pct"]
    report = json.loads((tmp_path / "A/report.json").read_text())
    assert report["solved"]["measured_kl"] == found["measured_kl"]
    shown = accepted(warm(*words, "--objective", "ppl", "-o", tmp_path / "B"))
    assert "predicted mean KL 0.0" in shown
    assert "on calibration text" in shown


def test_a_task_can_decide(pristine, warm, tmp_path):
    words = ("solve", pristine, "--bits", 3, "--verify", "--objective", "task:kv_retrieval", "--task-items", 3)
    found = json.loads(accepted(warm(*words, "-o", tmp_path / "A", "--json")))
    assert found["task"]["name"] == "kv_retrieval"
    assert found["task"]["items"] == 3
    assert json.loads((tmp_path / "A/report.json").read_text())["solved"]["task"] == found["task"]
    assert "kv_retrieval" in accepted(warm(*words, "-o", tmp_path / "B"))


def test_with_the_model_at_hand_the_measured_loss_is_what_is_bounded(pristine, warm, tmp_path):
    words = ("solve", pristine, "--max-kl", 0.02, "--verify", "-o", tmp_path / "A", "--json")
    assert json.loads(accepted(warm(*words)))["measured_kl"] <= 0.02


def test_text_to_measure_on_can_be_named(artifact, warm, tmp_path):
    rewritten(artifact, lambda manifest: manifest["calibration"].update(data="notes.txt"))
    words = ("solve", artifact, "--bits", 4, "--verify", "-o", tmp_path / "A")
    refused(warm(*words), 2, "notes.txt cannot be read again", "--data")
    assert "on builtin:prose" in accepted(warm(*words, "--data", "builtin:prose"))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "--max-kl"),
        (("--bits", 4, "--max-kl", 0.1), 2, "--max-kl"),
        (("--max-kl", 0), 2, "not above 0"),
        (("--max-kl", "nan"), 2, "not above 0"),
        (("--max-kl", "1e-12"), 4, "the least predicted is"),
        (("--bits", 1), 4, "the least reachable is"),
        (("--bits", 4, "--data", "builtin"), 2, "--verify"),
        (("--bits", 4, "--objective", "task:passkey"), 2, "--verify"),
        (("--bits", 4, "--objective", "task:chess", "--verify"), 2, "'task:chess'"),
        (("--bits", 4, "--objective", "passkey"), 2, "'passkey'"),
        (("--max-kl", 0.1, "--objective", "task:passkey", "--verify"), 2, "--max-kl bounds KL"),
        (("--bits", 4, "--objective", "task:piqa", "--verify", "--task-data", "nowhere"), 3, "piqa"),
    ],
)
def test_what_cannot_be_solved_is_refused_and_nothing_is_written(pristine, warm, tmp_path, words, code, said):
    refused(warm("solve", pristine, *words, "-o", tmp_path / "A"), code, said)
    assert names(tmp_path) == []


@pytest.mark.parametrize("search", ["kvtuner-nsga2", "kvtuner-moead"])
def test_kvtuners_search_is_a_choice_and_keeps_its_front(tinystories, warm, tmp_path, small, search):
    pytest.importorskip("optuna")
    pytest.importorskip("sklearn")
    words = ("calibrate", tinystories, "--bits", 6, *small, "--search", search, "--trials", 20, "-o", tmp_path / "A")
    found = json.loads(accepted(warm(*words, "--json")))
    assert found["effective_bits"] <= 6
    front = json.loads((tmp_path / "A/report.json").read_text())["front"]
    assert front["trials"] == 20
    assert names(tmp_path) == ["A"]
    solved = json.loads(accepted(warm("solve", tmp_path / "A", "--bits", 4, "-o", tmp_path / "B", "--json")))
    assert solved["effective_bits"] <= 4
    assert "front" not in json.loads((tmp_path / "B/report.json").read_text())


def test_kvtuners_search_can_weigh_a_tasks_errors(tinystories, warm, tmp_path, small):
    pytest.importorskip("optuna")
    pytest.importorskip("sklearn")
    words = ("calibrate", tinystories, "--bits", 6, *small, "--objective", "task:kv_retrieval", "--task-items", 2)
    refused(warm(*words, "-o", tmp_path / "A"), 2, "--search kvtuner")
    accepted(warm(*words, "--search", "kvtuner-nsga2", "--trials", 4, "-o", tmp_path / "A"))
    front = json.loads((tmp_path / "A/report.json").read_text())["front"]
    assert all(x["loss"] in (0, 0.5, 1) for x in front["points"])


def test_predictors_leave_the_plan_of_kvtuners_search_as_it_is(tinystories, warm, tmp_path, small):
    pytest.importorskip("optuna")
    pytest.importorskip("sklearn")
    words = ("calibrate", tinystories, "--bits", 6, *small, "--search", "kvtuner-nsga2", "--trials", 8)
    plans = []
    for mode in ("none", "absorbed"):
        # the same text in both, for predictors read more by default
        accepted(warm(*words, "--tokens", 2048, "--adapters", mode, "-o", tmp_path / mode))
        plans.append(json.loads((tmp_path / mode / "kvcli.json").read_text())["plan"])
    plain, predicted = ([(x["k"], x["v"]) for x in plan["layers"]] for plan in plans)
    assert plain == predicted
    assert [x["predictor"] is not None for x in plans[1]["layers"]] == [True, True]
