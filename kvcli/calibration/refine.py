"""Plans around the surrogate's optimum, to be measured end to end before one is chosen.

The surrogate is solved exactly, but it is a model: losses do not quite add up, and each was measured once, on a few
tokens. So the best plans of the leading settings are measured, and then, under the setting that did best, the exact
optima of the same surrogate with some losses weighed up or down. Each is the best plan there is if the surrogate errs
in that direction, which random neighbours of the optimum are not.

On half a thousand tokens a plan's KL is uncertain by several per cent, more than most of these plans differ. Settings
differ by more, so the best measured one is taken. A neighbour replaces the optimum only if it is better by more than
two standard errors: on the standing model the best of the neighbours by a hair on one text was 10 % worse on another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from kvcli.calibration.measuring import Measuring
from kvcli.calibration.sensitivity import TENSORS, Cost, Sensitivity, Which
from kvcli.calibration.space import Setting
from kvcli.calibration.surrogate import Frontier, Solution, solve
from kvcli.plan import CachePlan
from kvcli.quant.format import KVFormat

LEADING = 3  # settings whose best plans are measured
LOW_BITS = 2  # formats of at most so many bits are weighed apart


@dataclass(frozen=True)
class Tilt:
    """How the surrogate's losses are changed.

    Attributes
    ----------
    keys
        Factor on what keys cost.
    low
        Factor on what formats of at most :data:`LOW_BITS` bits cost, which lie furthest from the format measured.
    power
        Exponent on every loss. Below 1 it spreads bits more evenly over layers, as it should be where the errors of
        layers add up in step: (Σ √x)² instead of Σ x.
    """

    keys: float = 1.0
    low: float = 1.0
    power: float = 1.0


TILTS = (Tilt(power=0.8), Tilt(keys=1.4), Tilt(keys=0.7), Tilt(low=1.4))


def tilted(found: Sensitivity, tilt: Tilt) -> Sensitivity:
    """Return the measurements with their losses changed."""

    def cost(x: float, which: Which, fmt: KVFormat) -> float:
        weight = (tilt.keys if which == "k" else 1.0) * (tilt.low if fmt.bits <= LOW_BITS else 1.0)
        return float(weight * x**tilt.power)

    formats: dict[Which, tuple[KVFormat, ...]] = {"k": found.space.k, "v": found.space.v}
    kl: dict[Which, list[list[float]]] = {
        w: [[cost(x, w, f) for x, f in zip(layer, formats[w], strict=True)] for layer in found.kl[w]] for w in TENSORS
    }
    return replace(found, kl=kl)


def predicted(found: Sensitivity, plan: CachePlan) -> float:
    """Return the mean KL that the additive model predicts for a plan of the space."""
    k, v = ({f: i for i, f in enumerate(x)} for x in (found.space.k, found.space.v))
    rows = zip(plan.layers, found.kl["k"], found.kl["v"], strict=True)
    loss = sum(keys[k[x.k]] + values[v[x.v]] for x, keys, values in rows)
    return loss * found.ratio[Setting(plan.block_size, plan.sink_tokens, plan.residual_window)]


@dataclass(frozen=True)
class Tried:
    """A plan that was measured end to end, and the mean KL that the additive model predicted for it."""

    plan: CachePlan
    predicted_kl: float
    cost: Cost


def search(
    work: Measuring, found: Sensitivity, ids: Tensor, bits: float, context: int, *, nominal: bool
) -> tuple[list[Tried], int]:
    """Measure the best plans of the leading settings, then the neighbours of the best of these.

    Returns what was measured, and which of it is chosen.

    Parameters
    ----------
    work
        Measures plans.
    found
        The measurements of layers and settings.
    ids
        Calibration windows.
    bits, context, nominal
        The budget.

    Raises
    ------
    BudgetError
        If no plan meets the budget.
    """
    check = work.check(ids)

    def tried(name: str, solutions: list[Solution], description: str) -> list[Tried]:
        costs = work.plans(name, check, [s.plan for s in solutions], description)
        return [Tried(s.plan, s.predicted_kl, c) for s, c in zip(solutions, costs, strict=True)]

    leading = solve(found, bits, context, nominal=nominal)[:LEADING]
    first = tried("verify", leading, "best plans, end to end")
    best = min(first, key=lambda x: x.cost.kl)
    setting = Setting(best.plan.block_size, best.plan.sink_tokens, best.plan.residual_window)
    near = neighbours(found, setting, bits, context, nominal=nominal, known=[x.plan for x in first])
    around = tried("refine", near, "plans around the best")
    chosen = min([best, *(x for x in around if x.cost.is_below(best.cost))], key=lambda x: x.cost.kl)
    return first + around, (first + around).index(chosen)


def neighbours(
    found: Sensitivity, setting: Setting, bits: float, context: int, *, nominal: bool, known: Sequence[CachePlan]
) -> list[Solution]:  # fmt: skip
    """Return the distinct optima of the tilted surrogates under one setting, without plans ``known`` already."""
    plans = list(known)
    solutions: list[Solution] = []
    for tilt in TILTS:
        best = Frontier(tilted(found, tilt), setting, bits, context, nominal).best(bits)
        if best is not None and best.plan not in plans:
            plans.append(best.plan)
            solutions.append(Solution(best.plan, predicted(found, best.plan)))
    return solutions
