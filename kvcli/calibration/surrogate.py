"""The plan that spends a budget best, by what each choice was measured to cost.

After KVTuner (Li et al., 2025, arXiv:2502.04420), which gives each layer a precision for keys and one for values.
Departures: losses add up over tensors and layers, and the plan is the exact optimum of that sum under a ceiling on
effective bits (a knapsack) instead of a genetic search.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvcli.calibration import knapsack
from kvcli.calibration.sensitivity import Sensitivity
from kvcli.calibration.space import Setting, fits
from kvcli.errors import BudgetError
from kvcli.plan import CachePlan, LayerPlan

NO_CEILING = 1e6  # bits: more than any plan takes


@dataclass(frozen=True)
class Solution:
    """A plan and the mean KL, in nats a token, that the additive model predicts for it."""

    plan: CachePlan
    predicted_kl: float


def solve_setting(found: Sensitivity, setting: Setting, bits: float, context: int, nominal: bool) -> Solution | None:
    """Return the best plan under one setting, or None if even the smallest exceeds the budget."""
    space, geometry = found.space, found.geometry
    pairs = [
        (a, b)
        for a, k in enumerate(space.k)
        for b, v in enumerate(space.v)
        if fits(k, setting.block_size) and fits(v, setting.block_size)
    ]
    if not pairs:
        return None
    cost: dict[LayerPlan, list[int]] = {}  # layers of one geometry weigh alike

    def plan_of(choices: list[int]) -> CachePlan:
        chosen = [pairs[c] for c in choices]
        layers = [space.layer(x, space.k[a], space.v[b]) for x, (a, b) in zip(geometry, chosen, strict=True)]
        return space.plan(layers, setting, found.dtype)

    def spent(plan: CachePlan) -> float:
        return plan.nominal_bits if nominal else plan.effective_bits(context)

    length = plan_of([0] * len(geometry)).worst_length(context)
    for x in set(geometry):
        options = [space.layer(x, space.k[a], space.v[b]) for a, b in pairs]
        cost[x] = [
            o.k.bits + o.v.bits if nominal else space.plan([o], setting, found.dtype).layer_bytes_at(0, length)
            for o in options
        ]
    weights = [cost[x] for x in geometry]
    losses = [[k[a] + v[b] for a, b in pairs] for k, v in zip(found.kl["k"], found.kl["v"], strict=True)]
    per_bit = 2 * len(geometry) if nominal else length * sum(x.scalars_per_token for x in geometry) / 8
    ceiling = math.floor(bits * per_bit + 1e-9)
    while (choices := knapsack.solve(weights, losses, ceiling)) is not None:
        plan = plan_of(choices)
        over = spent(plan) - bits
        if over <= 1e-9:
            loss = sum(x[c] for x, c in zip(losses, choices, strict=True)) * found.ratio[setting]
            return Solution(plan, loss)
        # another length of the last block is the worst one for this plan: tighten by what it is over
        ceiling = min(ceiling - 1, math.floor(ceiling - over * per_bit))
    return None


def solve(found: Sensitivity, bits: float, context: int, *, nominal: bool = False) -> list[Solution]:
    """Return the best plan of every setting that can meet the budget, best first.

    Parameters
    ----------
    found
        The measurements.
    bits
        Ceiling on effective bits at ``context``, or on nominal bits.
    context
        Tokens of one sequence at which effective bits are counted.
    nominal
        Count as papers do.

    Raises
    ------
    BudgetError
        Naming the least reachable budget.
    """
    solutions = [s for setting in found.ratio if (s := solve_setting(found, setting, bits, context, nominal))]
    if not solutions:
        least = least_bits(found, context, nominal)
        kind = "nominal" if nominal else "effective"
        raise BudgetError(
            f"{bits:g} {kind} bits at {context} tokens cannot be met; the least reachable is {least:.3f}."
        )
    return sorted(solutions, key=lambda s: s.predicted_kl)


def least_bits(found: Sensitivity, context: int, nominal: bool) -> float:
    """Return the smallest budget any plan of the space meets, rounded up to three decimals."""
    free = Sensitivity.unmeasured(found.space, found.geometry, found.dtype)
    plans = [s.plan for setting in found.ratio if (s := solve_setting(free, setting, NO_CEILING, context, nominal))]
    least = min(p.nominal_bits if nominal else p.effective_bits(context) for p in plans)
    return math.ceil(least * 1000 - 1e-6) / 1000
