"""The stage of calibration that predicts: it searches again, on residuals, and solve refits what it finds.

What is stored are residuals, and an error is as large as what is coded: a layer that is told well by the ones before
needs fewer bits than one that is not. So every loss that was measured is multiplied by the share of variance that its
predictor leaves (:func:`on_residuals`), which itself depends on the bits, for predictors read reconstructions: fit and
search take turns. Nothing is measured anew but a few plans at the end. Predictors change no bit of the cache, so that
a plan within a budget stays within it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from kvcli.artifact.reader import Artifact
from kvcli.calibration import aqua_kv
from kvcli.calibration.aqua_kv import Fitted, Mode, Statistics
from kvcli.calibration.corpora import Corpus
from kvcli.calibration.measuring import check_probe
from kvcli.calibration.moments import Moments
from kvcli.calibration.pipeline import Budget, Calibration, curve, summary
from kvcli.calibration.sensitivity import Sensitivity
from kvcli.calibration.space import read_recipe
from kvcli.calibration.stages import Show, silent
from kvcli.calibration.surrogate import Solution, solve
from kvcli.errors import InputError, KvcliError
from kvcli.models.loading import LoadedModel
from kvcli.plan import CachePlan

MOMENTS = "calibration/moments.safetensors"
TOKENS = 32768  # of calibration text by default: a predictor has hundreds of inputs
ROUNDS = 2  # of fitting and searching in turn; a third changes a bit here and there
LEADING = 3  # settings whose best plans are measured


@dataclass(frozen=True)
class AdapterSettings:
    """What is predicted from what, and how predictors are stored: see :func:`kvcli.calibration.aqua_kv.design`."""

    mode: Mode = "none"
    depth: int = aqua_kv.DEPTH
    back: int = 1
    star: bool = False
    both: bool = True
    bits: int = 16
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in aqua_kv.MODES:
            raise InputError(f"adapters: mode {self.mode!r} is not one of {', '.join(aqua_kv.MODES)}.")
        for name in ("depth", "back", "rank"):
            value = getattr(self, name)
            if not ((type(value) is int and value >= 1) or (name == "rank" and value is None)):
                raise InputError(f"adapters: {name} must be a whole number of at least 1.")
        for name in ("star", "both"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"adapters: {name} must be true or false.")
        if self.bits not in (4, 8, 16):
            raise InputError(f"adapters: bits {self.bits} is not one of 4, 8 and 16.")

    @classmethod
    def of_recipe(cls, name: str) -> AdapterSettings:
        """Read a recipe's section ``adapters``; without one, or without such a recipe, nothing is predicted.

        Raises
        ------
        InputError
            If the section is not valid.
        """
        section = (read_recipe(name) or {}).get("adapters", {})
        if not isinstance(section, dict):
            raise InputError(f"recipe {name} is not a recipe: its section 'adapters' is no mapping.")
        known = [x.name for x in fields(cls)]
        if unknown := sorted(set(map(str, section)) - set(known)):
            raise InputError(f"adapters has no {unknown[0]!r}; it has {', '.join(known)}.")
        return cls(**section)

    def applied(self, plan: CachePlan) -> CachePlan:
        """Return a plan with these predictors."""
        return replace(plan, layers=tuple(aqua_kv.design(plan.layers, **asdict(self))))


def on_residuals(found: Sensitivity, left: Mapping[str, float]) -> Sensitivity:
    """Return what formats cost where residuals are stored; ``left`` is the share of variance, by tensor (``3.v``)."""
    kl = {w: [[x * left.get(f"{i}.{w}", 1.0) for x in row] for i, row in enumerate(found.kl[w])] for w in aqua_kv.WHICH}
    return replace(found, kl=kl)


@dataclass(frozen=True)
class Candidate:
    """A plan with its predictors, and the mean KL that the additive model predicts for it."""

    plan: CachePlan
    fitted: Fitted
    predicted_kl: float


def search(costs: Sensitivity, own: Statistics, settings: AdapterSettings, budget: Budget) -> list[Candidate]:
    """Return the best plan with predictors under each of the leading settings.

    Parameters
    ----------
    costs
        What was measured without predictors.
    own
        What predictors are fitted to.
    settings
        The predictors.
    budget
        Ceiling on bits.

    Raises
    ------
    BudgetError
        If no plan meets the budget.
    """

    def solutions(left: Mapping[str, float]) -> list[Solution]:
        return solve(on_residuals(costs, left), budget.bits, budget.context, nominal=budget.nominal)

    left: Mapping[str, float] = {}
    for _ in range(ROUNDS):
        left = aqua_kv.fit(settings.applied(solutions(left)[0].plan), own).left
    plans = [(settings.applied(x.plan), x.predicted_kl) for x in solutions(left)[:LEADING]]
    return [Candidate(plan, aqua_kv.fit(plan, own), kl) for plan, kl in plans]


@torch.no_grad()
def apply(
    loaded: LoadedModel, corpus: Corpus, found: Calibration, settings: AdapterSettings, *, fixed: bool = False,
    show: Show = silent,
) -> None:  # fmt: skip
    """Give a calibration predictors: search again on residuals, fit, and measure with and without them.

    Parameters
    ----------
    loaded
        The model that was calibrated.
    corpus
        The text it was calibrated on.
    found
        Changed in place: plan, tensors, report, and the moments that ``solve`` refits from.
    settings
        The predictors; with mode ``none`` nothing is done.
    fixed
        Leave the plan's formats as they are, because they are a preset's or another search's.
    show
        Makes progress displays.

    Raises
    ------
    UsageError
        As :func:`kvcli.calibration.aqua_kv.design`.
    KvcliError
        If a predictor is not finite.
    """
    if settings.mode == "none":
        return
    widest = settings.applied(found.plan)
    source = {"model": loaded.sha256, "dtype": loaded.dtype, "data": corpus.sha256}

    def moments(step: Any) -> dict[str, Tensor]:
        own = aqua_kv.statistics(loaded, widest, corpus.ids, step)
        parts = (("train ", own.train), ("held out ", own.held_out))
        return {prefix + name: x for prefix, part in parts for name, x in part.to_tensors().items()}

    with found.stages as stages:
        kept = stages.run(
            "adapters", moments, description="second moments of keys and values", steps=len(corpus.ids),
            settings={**source, "layers": [str(x.predictor) for x in widest.layers]},
        )  # fmt: skip
    own = Statistics(*(Moments.from_tensors(_under(kept, prefix)) for prefix in ("train ", "held out ")))
    chosen = found.report["verified"][found.report.get("chosen", 0)]
    if fixed:
        tried = [Candidate(widest, aqua_kv.fit(widest, own), chosen["predicted_kl"])]
    else:
        costs = Sensitivity.from_json(found.report["sensitivity"])
        tried = search(costs, own, settings, found.budget)
    probe, measured = check_probe(loaded, corpus.ids, found.tensors), []
    with show("plans with predictors, end to end", 1 + len(tried)) as bar:
        plain = probe.cost_of(found.plan)
        for x in tried:
            bar.advance()
            _check(x.fitted)
            measured.append(probe.using({**found.tensors, **x.fitted.tensors}).cost_of(x.plan))
    at = min(range(len(tried)), key=lambda i: measured[i].kl)
    best, cost = tried[at], measured[at]
    report = found.report
    report["adapters"] = {
        "settings": asdict(settings), "left": best.fitted.left, "ridge": best.fitted.ridge,
        "kl": {"none": plain.kl, settings.mode: cost.kl}, "model_bytes": best.plan.model_bytes(),
    }  # fmt: skip
    report["chosen"] = len(report["verified"]) + at
    for x, c in zip(tried, measured, strict=True):
        solution = Solution(x.plan, x.predicted_kl)
        report["verified"].append(summary(solution, found.budget.context, kl=c.kl, delta_nll=c.delta_nll))
    if not fixed:
        report["scale"] = cost.kl / best.predicted_kl
        report["curve"] = curve(on_residuals(costs, best.fitted.left), report["scale"], found.budget.context)
    found.plan, found.tensors = best.plan, {**found.tensors, **best.fitted.tensors}
    found.moments = (own.train + own.held_out).to_tensors()


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def _check(fitted: Fitted) -> None:
    for name, x in fitted.tensors.items():
        if x.is_floating_point() and not x.isfinite().all():
            raise KvcliError(f"{name} is not finite: the calibration text gives keys or values that are not.")


def settings_of(artifact: Artifact) -> AdapterSettings:
    """Return the kind of predictors that an artifact has.

    Raises
    ------
    InputError
        If its report does not say so in a way that is understood.
    """
    stated = artifact.report.get("adapters")
    try:
        return AdapterSettings() if stated is None else AdapterSettings(**stated["settings"])
    except (KeyError, TypeError, InputError) as error:
        raise InputError(f"{artifact.path.name} holds no usable statistics of its predictors: {error}.") from None


def again(artifact: Artifact, plan: CachePlan) -> tuple[CachePlan, dict[str, Tensor]]:
    """Return another plan for an artifact's model with the artifact's kind of predictors, refitted, and all tensors.

    An artifact without predictors gives the plan and the tensors that it has.

    Raises
    ------
    InputError
        If the artifact has predictors and not, or not whole, the moments they were fitted to.
    """
    settings = settings_of(artifact)
    if settings.mode == "none":
        return plan, artifact.tensors()
    stated = artifact.report["adapters"]
    path = artifact.path / MOMENTS
    if not path.is_file():
        raise InputError(f"{path} is missing: without it the predictors cannot be refitted.")
    try:
        ridges = {str(name): float(x) for name, x in stated["ridge"].items()}
        moments = Moments.from_tensors(load_file(path))
        plan = settings.applied(plan)
        fitted = aqua_kv.fit(plan, Statistics(moments, Moments()), ridges)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, InputError) as error:
        raise InputError(f"{artifact.path.name} holds no usable statistics of its predictors: {error}.") from None
    means = {name: x for name, x in artifact.tensors().items() if name.endswith(".mean")}
    return plan, {**means, **fitted.tensors}
