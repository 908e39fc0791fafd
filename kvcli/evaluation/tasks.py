"""Tasks: items that a subject and its reference both answer, scored side by side.

Both sides answer every item on a packed cache, the reference on the exact plan. Scores alone hide what a cache costs,
since answers flip in both directions while the mean stays (Dutta et al., "Accuracy is Not All You Need", 2024): so
flips stand beside them, and an exact paired test.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from kvcli.errors import InputError
from kvcli.evaluation.intervals import bootstrap, sign_test
from kvcli.runtime.packed_model import PackedModel


@dataclass(frozen=True)
class Settings:
    """What tasks make their items by.

    Attributes
    ----------
    items
        Of each task, at the most.
    lengths
        Tokens of the contexts that synthetic tasks build.
    tokens
        To generate at the most.
    seed
        Of everything random.
    text
        Source of the texts that generation continues, as in ``--data``.
    folder
        Where the files of data sets lie; None asks the hub.
    questions
        Of each data set of multiple choice; None for as many as of other tasks.
    """

    items: int
    lengths: tuple[int, ...]
    tokens: int
    seed: int = 0
    text: str = "builtin"
    folder: Path | None = None
    questions: int | None = None


@dataclass(frozen=True)
class Outcome:
    """How one side answered one item.

    Attributes
    ----------
    score
        0 to 1.
    answer
        Plain JSON; another answer than the reference's is a flip.
    log_likelihood
        Nats of the right answer, a token; None where there is none.
    measures
        Further figures, by name.
    """

    score: float
    answer: Any
    log_likelihood: float | None = None
    measures: Mapping[str, float] = field(default_factory=dict)


class Task(Protocol):
    """A named family of items."""

    @property
    def name(self) -> str:
        """As in ``--tasks``."""
        ...

    def items(self, model: PackedModel, settings: Settings) -> Sequence[Any]:
        """Return the items, which only depend on the model's tokenizer and context, and on the settings."""
        ...

    def measure(self, model: PackedModel, item: Any, reference: Outcome | None) -> Outcome:
        """Let a model answer; ``reference`` is the reference's answer, None while the reference answers."""
        ...


class Log:
    """Outcomes in a file of JSON lines, so that an interrupted evaluation goes on where it was.

    Parameters
    ----------
    path
        None keeps nothing.
    sides
        What identifies the reference and the subject, and all that decides their answers.

    Raises
    ------
    InputError
        For a file that holds something else.
    """

    def __init__(self, path: Path | None, sides: Mapping[str, str]) -> None:
        self.path, self.sides = path, sides
        self.found: dict[str, Outcome] = {}
        if path is None or not path.exists():
            return
        for number, line in enumerate(path.read_text("utf-8").splitlines(keepends=True), 1):
            if not line.endswith("\n"):
                path.write_text(path.read_text("utf-8")[: -len(line)], "utf-8")  # it was cut while it was written
                break
            try:
                row = json.loads(line)
                self.found[row["key"]] = Outcome(**row["outcome"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path} line {number} is not an outcome of an evaluation.") from error

    def measure(
        self, task: Task, side: str, item: Any, against: Outcome | None, work: Callable[[], Outcome]
    ) -> Outcome:
        """Return what is known of an item, or find it out and write it down."""
        what = [task.name, self.sides[side], repr(item), None if against is None else asdict(against)]
        key = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        if key not in self.found:
            self.found[key] = work()
            if self.path is not None:
                row = {"key": key, "task": task.name, "side": side, "outcome": asdict(self.found[key])}
                with self.path.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(row) + "\n")
        return self.found[key]


def run(
    task: Task,
    items: Sequence[Any],
    subject: PackedModel,
    reference: PackedModel,
    *,
    seed: int = 0,
    log: Log | None = None,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Let both sides answer all items of a task.

    Parameters
    ----------
    task, items
        What is asked.
    subject, reference
        Who answers.
    seed
        Of the bootstrap.
    log
        Where outcomes are kept.
    around
        Entered while the subject answers.
    step
        Called once an item and side.

    Returns
    -------
    dict
        As :func:`summarize`.
    """
    log = log or Log(None, {"reference": "", "subject": ""})
    pairs = []
    for item in items:
        before = log.measure(task, "reference", item, None, partial(task.measure, reference, item, None))
        step()

        def answer(item: Any = item, before: Outcome = before) -> Outcome:
            with around():
                return task.measure(subject, item, before)

        pairs.append((before, log.measure(task, "subject", item, before, answer)))
        step()
    return summarize(pairs, seed)


def summarize(pairs: Sequence[tuple[Outcome, Outcome]], seed: int = 0) -> dict[str, Any]:
    """Return a task's figures from the outcomes of reference and subject.

    Returns
    -------
    dict
        ``score`` and ``reference`` (means), ``flips`` (share of items with another answer), ``items``, ``won`` and
        ``lost`` (items that the subject answers better and worse), bootstrap intervals of 95 % (``interval``,
        ``reference_interval``, ``difference_interval``), ``p_value`` of the exact sign test, ``log_likelihood`` of the
        right answers with the mean difference, its interval and the mean size of the differences (``shift``), and
        further measures of both sides.

    Raises
    ------
    InputError
        If there is no item.
    """
    if not pairs:
        raise InputError("a task without items was evaluated.")
    before, after = ([x.score for x in side] for side in zip(*pairs, strict=True))
    differences = [b - a for a, b in zip(before, after, strict=True)]
    found: dict[str, Any] = {
        "score": _mean(after), "reference": _mean(before),
        "flips": _mean([a.answer != b.answer for a, b in pairs]),
        "items": len(pairs), "won": sum(x > 0 for x in differences), "lost": sum(x < 0 for x in differences),
        "interval": bootstrap(after, seed=seed), "reference_interval": bootstrap(before, seed=seed),
        "difference": _mean(differences), "difference_interval": bootstrap(differences, seed=seed),
        "p_value": sign_test(differences),
    }  # fmt: skip
    likely = [
        (a.log_likelihood, b.log_likelihood)
        for a, b in pairs
        if a.log_likelihood is not None and b.log_likelihood is not None
    ]
    if likely:
        apart = [b - a for a, b in likely]
        found["log_likelihood"] = {
            "value": _mean([b for _, b in likely]), "reference": _mean([a for a, _ in likely]),
            "difference": _mean(apart), "interval": bootstrap(apart, seed=seed),
            "shift": _mean([abs(x) for x in apart]),
        }  # fmt: skip
    for name in pairs[0][1].measures:
        a, b = (_mean([x.measures[name] for x in side]) for side in zip(*pairs, strict=True))
        found[name] = {"value": b, "reference": a}
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
