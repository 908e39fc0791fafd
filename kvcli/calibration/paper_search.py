"""KVTuner's own search as a way to calibrate: ``kvcli calibrate --search kvtuner-nsga2``.

The steps are :mod:`kvcli.calibration.kvtuner`'s; here they are stages. What Optuna has evaluated is kept in a file
beside the other stages, so that a search that was killed goes on where it was.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvcli.calibration import kvtuner, sensitivity
from kvcli.calibration.measuring import (
    CHECK_WINDOWS,
    PROBE_TOKENS,
    PROBE_WINDOWS,
    Measuring,
)
from kvcli.calibration.objectives import TaskObjective, TaskScorer
from kvcli.calibration.refine import Tried, predicted
from kvcli.calibration.relative_errors import RelativeErrors, measure
from kvcli.calibration.sensitivity import Sensitivity
from kvcli.calibration.space import Setting
from kvcli.errors import UsageError
from kvcli.plan import CachePlan

if TYPE_CHECKING:
    from kvcli.calibration.pipeline import Budget

SAMPLERS: dict[str, kvtuner.Sampler] = {"kvtuner-nsga2": "nsga2", "kvtuner-moead": "moead"}


def check_installed() -> None:
    """Raise :class:`UsageError` unless the packages that the search needs are there."""
    for name in ("optuna", "sklearn"):
        if find_spec(name) is None:
            raise UsageError("KVTuner's search needs Optuna and scikit-learn: pip install 'kvcli[search]'.")


def best_setting(found: Sensitivity, context: int) -> Setting:
    """Return what all layers share in the search: the setting that is worth its bits.

    The paper fixes it. Here each setting's measured ratio is weighed against the bits it takes, at 6 dB a bit: an even
    plan loses a quarter as much for every bit it is given.
    """
    plans = sensitivity.setting_plans(found.space, found.geometry, found.dtype)
    layers = list(next(iter(plans.values())).layers)

    def worth(setting: Setting) -> float:
        bits = found.space.plan(layers, setting, found.dtype).effective_bits(context)
        return found.ratio[setting] * math.exp2(2 * bits)

    return min(found.ratio, key=worth)


def search(
    work: Measuring, costs: Sensitivity, ids: Tensor, budget: Budget, sampler: kvtuner.Sampler, *, trials: int,
    seed: int, task: TaskObjective | None = None,
) -> tuple[list[Tried], kvtuner.Front]:  # fmt: skip
    """Search as the paper does, and return the best plan within the budget and the whole front.

    Parameters
    ----------
    work
        Model, space and stages.
    costs
        The surrogate's measurements: here they choose the setting.
    ids
        Calibration windows.
    budget
        Ceiling on bits, and the search's soft cap.
    sampler, trials, seed
        Of the multi-objective search.
    task
        Whose errors (1 - score) are minimised beside bits, instead of KL.

    Raises
    ------
    BudgetError
        If no plan that the search reached meets the budget.
    InputError
        If the task's items cannot be had.
    UsageError
        If Optuna is not installed.
    """
    stages, space, geometry, dtype = work.stages, work.space, work.geometry, work.loaded.dtype
    setting = best_setting(costs, budget.context)
    inputs = [x["name"] for x in stages.record]
    first = ids[:PROBE_WINDOWS, :PROBE_TOKENS]
    errors = RelativeErrors.from_json(stages.run(
        "errors", lambda step: measure(work.probe(first), space, geometry, setting, dtype, step).to_json(),
        description="relative errors of each layer", inputs=inputs, steps=len(geometry) * len(first),
        settings={
            **work.source, "space": space.to_json(), "setting": vars(setting), "windows": len(first),
            "tokens": first.shape[1],
        },
    ))  # fmt: skip
    groups = kvtuner.group(errors, space, geometry)
    check = work.check(ids)
    settings: dict[str, Any] = {
        "sampler": sampler, "trials": trials, "seed": seed, "cap": budget.bits, "context": budget.context,
        "nominal": budget.nominal, "windows": CHECK_WINDOWS, "tokens": ids.shape[1],
        **({} if task is None else {"task": task.to_json()}),
    }  # fmt: skip
    storage = stages.file("search", settings=settings, inputs=["errors"], suffix=".sqlite")

    score = task and TaskScorer(task, work.loaded, CachePlan(tuple(geometry), dtype=dtype))

    def evaluate(plan: CachePlan) -> float:
        return 1 - float(score(plan, work.tensors)["score"]) if score else check.cost_of(plan).kl

    front = kvtuner.Front.from_json(stages.run(
        "search", lambda step: kvtuner.search(
            groups, space, geometry, setting, dtype, budget.context, evaluate, trials=trials, cap=budget.bits,
            nominal=budget.nominal, sampler=sampler, seed=seed, storage=storage, step=step,
        ).to_json(),
        description="multi-objective search", settings=settings, inputs=["errors"], steps=trials,
    ))  # fmt: skip
    best = kvtuner.best(front, budget.bits)
    (cost,) = work.plans("verify", check, [best.plan], "the chosen plan, end to end")
    return [Tried(best.plan, predicted(costs, best.plan), cost)], front
