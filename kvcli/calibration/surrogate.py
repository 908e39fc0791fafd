"""The plan that spends a budget best, by what each choice was measured to cost.

After KVTuner (Li et al., 2025, arXiv:2502.04420), which gives each layer a precision for keys and one for values.
Departures: losses add up over tensors and layers, and the plan is the exact optimum of that sum under a ceiling on
effective bits (a knapsack) instead of a genetic search.

What was tried on the standing model (768 tokens, every layer at 2, 3 and 4 bits, keys and values alone and together)
and left out, because it does not pay: a second measured format (KL goes as the squared output error to the power 0.97
to 1.03; the plan from one format is within 3 % of that from three); the interaction of a layer's keys and values (1.01
of the sum at 4 bits, 1.03 at 3, 1.13 at 2); and that of layers, which adds up to 0.16 of the sum at 3 bits and 0.5 at 2
but is nearly the same for all (correlation 0.005 on average, and the change of the log-probabilities at one width has
little to do with that at another: 0.2 to 0.3), so that it changes the scale of the prediction and not the plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from kvcli.calibration.knapsack import Knapsack
from kvcli.calibration.sensitivity import Sensitivity
from kvcli.calibration.space import SearchSpace, Setting, fits
from kvcli.errors import BudgetError
from kvcli.plan import CachePlan, LayerPlan

NO_CEILING = 1e6  # bits: more than any plan takes


@dataclass(frozen=True)
class Solution:
    """A plan and the mean KL, in nats a token, that the additive model predicts for it."""

    plan: CachePlan
    predicted_kl: float


@lru_cache(maxsize=256)
def _pairs(space: SearchSpace, setting: Setting) -> list[tuple[int, int]]:
    """Return every pair of a key's and a value's format that pages of this setting hold."""
    k, v = ([i for i, f in enumerate(x) if fits(f, setting.block_size)] for x in (space.k, space.v))
    return [(a, b) for a in k for b in v]


@lru_cache(maxsize=1024)
def _weights(space: SearchSpace, setting: Setting, layer: LayerPlan, dtype: str, length: int | None) -> list[int]:
    """Return what each pair weighs in a layer: bytes at ``length`` tokens, or twice the nominal bits if None."""
    options = [space.layer(layer, space.k[a], space.v[b]) for a, b in _pairs(space, setting)]
    if length is None:
        return [o.k.bits + o.v.bits for o in options]
    return [space.plan([o], setting, dtype).layer_bytes_at(0, length) for o in options]


class Frontier:
    """The best plans under one setting, for every budget up to a ceiling.

    Parameters
    ----------
    found
        The measurements.
    setting
        What all layers share.
    bits
        Greatest budget that will be asked for.
    context
        Tokens of one sequence at which effective bits are counted.
    nominal
        Count as papers do.
    """

    def __init__(self, found: Sensitivity, setting: Setting, bits: float, context: int, nominal: bool) -> None:
        self.found, self.setting, self.context, self.nominal = found, setting, context, nominal
        self._choices = _pairs(found.space, setting)
        if not self._choices:
            return
        length = self._plan([0] * len(found.geometry)).worst_length(context)
        weights = [_weights(found.space, setting, x, found.dtype, None if nominal else length) for x in found.geometry]
        kl = zip(found.kl["k"], found.kl["v"], strict=True)
        self._losses = [[k[a] + v[b] for a, b in self._choices] for k, v in kl]
        if not found.space.layerwise:  # one choice, which all layers pay for
            weights, self._losses = ([[sum(x) for x in zip(*each, strict=True)]] for each in (weights, self._losses))
        scalars = sum(x.scalars_per_token for x in found.geometry)
        self._per_bit = 2 * len(found.geometry) if nominal else length * scalars / 8
        self._knapsack = Knapsack(weights, self._losses, math.floor(bits * self._per_bit + 1e-9))

    def _plan(self, choices: list[int]) -> CachePlan:
        space, chosen = self.found.space, [self._choices[c] for c in choices]
        if not space.layerwise:
            chosen = chosen[:1] * len(self.found.geometry)
        layers = [space.layer(x, space.k[a], space.v[b]) for x, (a, b) in zip(self.found.geometry, chosen, strict=True)]
        return space.plan(layers, self.setting, self.found.dtype)

    def best(self, bits: float) -> Solution | None:
        """Return the best plan within ``bits``, or None if even the smallest exceeds them."""
        if not self._choices:
            return None
        ceiling = math.floor(bits * self._per_bit + 1e-9)
        while (choices := self._knapsack.solve(ceiling)) is not None:
            plan = self._plan(choices)
            over = spent(plan, self.context, nominal=self.nominal) - bits
            if over <= 1e-9:
                loss = sum(x[c] for x, c in zip(self._losses, choices, strict=True))
                return Solution(plan, loss * self.found.ratio[self.setting])
            # another length of the last block is the worst one for this plan: tighten by what it is over
            ceiling = min(ceiling - 1, math.floor(ceiling - over * self._per_bit))
        return None


class Frontiers:
    """The best plans of every setting, for every budget up to a ceiling; parameters as of :class:`Frontier`."""

    def __init__(self, found: Sensitivity, context: int, *, nominal: bool = False, bits: float = NO_CEILING) -> None:
        self.context, self.nominal = context, nominal
        self._each = [Frontier(found, setting, bits, context, nominal) for setting in found.ratio]

    def all(self, bits: float) -> list[Solution]:
        """Return the best plan of every setting that can meet the budget, best first."""
        solutions = [s for frontier in self._each if (s := frontier.best(bits))]
        return sorted(solutions, key=lambda s: s.predicted_kl)

    def best(self, bits: float) -> Solution | None:
        """Return the best plan of all settings, or None if the budget cannot be met."""
        return next(iter(self.all(bits)), None)


def spent(plan: CachePlan, context: int, *, nominal: bool) -> float:
    """Return the bits that a budget counts."""
    return plan.nominal_bits if nominal else plan.effective_bits(context)


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
    solutions = Frontiers(found, context, nominal=nominal, bits=bits).all(bits)
    if not solutions:
        least = least_bits(found, context, nominal)
        kind = "nominal" if nominal else "effective"
        raise BudgetError(
            f"{bits:g} {kind} bits at {context} tokens cannot be met; the least reachable is {least:.3f}."
        )
    return solutions


def least_bits(found: Sensitivity, context: int, nominal: bool) -> float:
    """Return the smallest budget any plan of the space meets, rounded up to three decimals."""
    free = Sensitivity.unmeasured(found.space, found.geometry, found.dtype)
    plans = [s.plan for s in Frontiers(free, context, nominal=nominal).all(NO_CEILING)]
    least = min(spent(p, context, nominal=nominal) for p in plans)
    return math.ceil(least * 1000 - 1e-6) / 1000
