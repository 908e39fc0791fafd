"""What plans are chosen by where it is not the loss on a text: how well the model still does a task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kvcli.errors import UsageError
from kvcli.evaluation import suites, tasks
from kvcli.models.loading import LoadedModel
from kvcli.plan import CachePlan
from kvcli.runtime.packed_model import PackedModel

PREFIX = "task:"
LENGTH, TOKENS = 1024, 48  # of a synthetic context, and to generate


@dataclass(frozen=True)
class TaskObjective:
    """A task, and how many of its items a plan is judged by.

    Attributes
    ----------
    name
        One of :data:`kvcli.evaluation.suites.TASKS`.
    items
        At the most.
    seed
        Of the items drawn.
    folder
        Where the files of data sets lie; None looks for them as ``kvcli eval`` does.
    """

    name: str
    items: int
    seed: int = 0
    folder: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what decides the items as plain JSON."""
        return {**vars(self), "folder": self.folder and str(self.folder)}


def task_name(objective: str, *, others: tuple[str, ...]) -> str | None:
    """Return the task that ``task:NAME`` names, or None for one of ``others``.

    Raises
    ------
    UsageError
        For anything else.
    """
    name = objective.removeprefix(PREFIX)
    if name != objective and name in suites.TASKS:
        return name
    if objective in others:
        return None
    raise UsageError(
        f"there is no objective {objective!r}; there are {', '.join(others)} and {PREFIX} with one of "
        f"{', '.join(suites.TASKS)}."
    )


class TaskScorer:
    """Scores of plans on one task, the exact plan answering the same items.

    Parameters
    ----------
    objective
        The task and its items.
    loaded
        The model.
    exact
        The plan of the reference.

    Raises
    ------
    InputError
        If the task's items cannot be had.
    """

    def __init__(self, objective: TaskObjective, loaded: LoadedModel, exact: CachePlan) -> None:
        self.objective, self.loaded = objective, loaded
        self.reference = PackedModel(loaded, exact, {})
        settings = tasks.Settings(
            objective.items, (min(LENGTH, loaded.max_context),), TOKENS, objective.seed, folder=objective.folder
        )
        self.items = suites.TASKS[objective.name].items(self.reference, settings)
        self._known = tasks.Log(None, {"reference": ""})  # the reference answers once for all plans

    def __call__(self, plan: CachePlan, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the figures of :func:`kvcli.evaluation.tasks.summarize` for a plan and what its codecs need."""
        self._known.sides = {"reference": "", "subject": json.dumps(plan.to_json())}
        subject = PackedModel(self.loaded, plan, tensors)
        return tasks.run(
            suites.TASKS[self.objective.name], self.items, subject, self.reference, seed=self.objective.seed,
            log=self._known,
        )  # fmt: skip
