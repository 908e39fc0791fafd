"""The tasks by name, and the suites that are made of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from kvcli.errors import InputError
from kvcli.evaluation import data_sets, fidelity
from kvcli.evaluation.choice import MultipleChoice
from kvcli.evaluation.generation import Continuation, Sums
from kvcli.evaluation.retrieval import Retrieval, key_values, passkey
from kvcli.evaluation.sharing import SharedContext
from kvcli.evaluation.tasks import Settings, Task
from kvcli.runtime.packed_model import PackedModel

CHOICES = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "mmlu")
_ALL: list[Task] = [
    Retrieval("passkey", passkey), Retrieval("kv_retrieval", key_values), Continuation(), SharedContext(),
    *(MultipleChoice(name) for name in CHOICES), Sums(),
]  # fmt: skip
TASKS = {task.name: task for task in _ALL}

SuiteName = Literal["quick", "standard", "long"]
WINDOWS = 4  # of perplexity, KL and flips, where no suite says how many
SYNTHETIC = ("passkey", "kv_retrieval", "sharing", "generation")


@dataclass(frozen=True)
class Suite:
    """What is measured by default.

    Attributes
    ----------
    tasks
        Names, those of :data:`kvcli.evaluation.fidelity.TASKS` among them.
    items
        Of each task.
    questions
        Of each data set of multiple choice, which are short.
    windows
        Of perplexity, KL and flips.
    lengths
        Tokens of synthetic contexts; a float is a share of the model's context.
    tokens
        To generate.
    """

    tasks: tuple[str, ...]
    items: int
    questions: int
    windows: int
    lengths: tuple[int | float, ...]
    tokens: int

    def lengths_of(self, max_context: int) -> tuple[int, ...]:
        """Return the lengths for a model, none longer than its context."""
        wanted = (int(x * max_context) if isinstance(x, float) else x for x in self.lengths)
        return tuple(sorted({min(x, max_context) for x in wanted}))


SUITES: dict[SuiteName, Suite] = {
    "quick": Suite((*fidelity.TASKS, *SYNTHETIC), 4, 4, 2, (512, 1024), 32),
    "standard": Suite(
        (*fidelity.TASKS, *SYNTHETIC, "arc_easy", "hellaswag", "piqa", "winogrande", "mmlu", "gsm8k"),
        20, 60, 8, (1024, 2048), 128,
    ),
    "long": Suite((*fidelity.TASKS, *SYNTHETIC), 40, 40, 8, (0.125, 0.25, 0.5, 1.0), 1024),
}  # fmt: skip


def gather(
    names: Sequence[str], model: PackedModel, settings: Settings, *, everything: bool = False, skip: bool = False
) -> tuple[dict[str, Sequence[Any]], dict[str, str]]:
    """Return the items of tasks, and why tasks have none.

    Parameters
    ----------
    names
        Those of :data:`TASKS`.
    model, settings
        What items are made by.
    everything
        Take data sets whole; synthetic tasks, which have no end, take the settings' number of items.
    skip
        Pass over tasks whose items cannot be had.

    Raises
    ------
    InputError
        If a task's items cannot be had.
    """
    found: dict[str, Sequence[Any]] = {}
    skipped: dict[str, str] = {}
    for name in names:
        whole = everything and name in data_sets.HUB
        try:
            own = replace(settings, items=sys.maxsize, questions=None) if whole else settings
            found[name] = TASKS[name].items(model, own)
        except InputError as error:
            if not skip:
                raise
            skipped[name] = str(error)
    return found, skipped
