"""The stage of calibration that predicts: it searches again, on residuals, and solve refits what it finds.

What is stored are residuals, and an error is as large as what is coded: a layer that is told well by the ones before
needs fewer bits than one that is not. So every loss that was measured is multiplied by the share of variance that its
predictor leaves (:func:`on_residuals`), which itself depends on the bits, for predictors read reconstructions: fit and
search take turns. Nothing is measured anew but a few plans at the end. Predictors change no bit of the cache, so that
a plan within a budget stays within it.

Mode ``capacity`` leaves the plan alone and finds a second one beside it, :mod:`kvcli.calibration.capacity`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from kvcli.artifact.reader import Artifact
from kvcli.calibration import aqua_kv
from kvcli.calibration.aqua_kv import Fitted, Statistics
from kvcli.calibration.corpora import Corpus
from kvcli.calibration.measuring import check_probe
from kvcli.calibration.moments import Moments
from kvcli.calibration.pipeline import MAX_BITS, Budget, Calibration, curve, scale_of, summary
from kvcli.calibration.sensitivity import Sensitivity
from kvcli.calibration.space import section
from kvcli.calibration.stages import Show, silent
from kvcli.calibration.surrogate import Solution, solve
from kvcli.errors import InputError, KvcliError
from kvcli.models.loading import LoadedModel
from kvcli.plan import CachePlan

MOMENTS = "calibration/moments.safetensors"
TOKENS = 32768  # of calibration text by default: a predictor has hundreds of inputs
ROUNDS = 2  # of fitting and searching in turn; a third changes a bit here and there
LEADING = 3  # settings whose best plans are measured
MODES = (*aqua_kv.MODES, "capacity")


@dataclass(frozen=True)
class AdapterSettings:
    """What is predicted from what, and how predictors are stored: see :func:`kvcli.calibration.aqua_kv.design`.

    With mode ``capacity`` nothing is predicted in the plan itself, and everything in a second one of ``capacity_bits``
    effective bits; None for :data:`kvcli.calibration.capacity.BITS`. ``reason`` says why it is this mode.
    """

    mode: Literal["none", "absorbed", "always", "capacity"] = "none"
    depth: int = aqua_kv.DEPTH
    back: int = 1
    star: bool = False
    both: bool = True
    bits: int = 16
    rank: int | None = None
    capacity_bits: float | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"adapters: mode {self.mode!r} is not one of {', '.join(MODES)}.")
        for name in ("depth", "back", "rank"):
            value = getattr(self, name)
            if not ((type(value) is int and value >= 1) or (name == "rank" and value is None)):
                raise InputError(f"adapters: {name} must be a whole number of at least 1.")
        for name in ("star", "both"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"adapters: {name} must be true or false.")
        if not isinstance(self.reason, str):
            raise InputError("adapters: reason is no text.")
        if self.bits not in (4, 8, 16):
            raise InputError(f"adapters: bits {self.bits} is not one of 4, 8 and 16.")
        bits = self.capacity_bits
        if bits is not None and not (type(bits) in (int, float) and 0 < bits <= MAX_BITS):
            raise InputError(f"adapters: capacity_bits is not between 0 and {MAX_BITS}.")

    @classmethod
    def of_recipe(cls, name: str) -> AdapterSettings:
        """Read a recipe's section ``adapters``; without one, or without such a recipe, nothing is predicted.

        Raises
        ------
        InputError
            If the section is not valid.
        """
        stated = section(name, "adapters") or {}
        known = [x.name for x in fields(cls)]
        if unknown := sorted(set(map(str, stated)) - set(known)):
            raise InputError(f"adapters has no {unknown[0]!r}; it has {', '.join(known)}.")
        return cls(**stated)

    @property
    def predicts(self) -> bool:
        """Whether the plan that sequences run on has predictors."""
        return self.mode in ("absorbed", "always")

    def applied(self, plan: CachePlan) -> CachePlan:
        """Return a plan with these predictors."""
        if not self.predicts:
            return plan
        how = {name: x for name, x in asdict(self).items() if name not in ("capacity_bits", "reason")}
        early = [i for i in range(len(plan.layers)) if plan.is_portable(i)]
        return replace(plan, layers=tuple(aqua_kv.design(plan.layers, **how, early=early)))


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
        The predictors; with mode ``none`` nothing is done, ``capacity`` is for :mod:`kvcli.calibration.capacity`.
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
    if not settings.predicts:
        return
    widest = settings.applied(found.plan)
    own = statistics(loaded, corpus, found, widest)
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
            check(x.fitted)
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
        report["scale"] = scale_of([(cost.kl, best.predicted_kl)])
        report["curve"] = curve(on_residuals(costs, best.fitted.left), report["scale"], found.budget.context)
    found.plan, found.tensors = best.plan, {**found.tensors, **best.fitted.tensors}
    found.moments = (own.train + own.held_out).to_tensors()


def statistics(loaded: LoadedModel, corpus: Corpus, found: Calibration, widest: CachePlan) -> Statistics:
    """Collect, as a stage of a calibration, what fitting the predictors of a plan needs."""
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
    return Statistics(*(Moments.from_tensors(_under(kept, prefix)) for prefix in ("train ", "held out ")))


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def check(fitted: Fitted) -> None:
    """Raise :class:`KvcliError`, naming the tensor, if a predictor is not finite."""
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
    if not settings.predicts:
        return plan, artifact.tensors()
    plan = settings.applied(plan)
    means = {name: x for name, x in artifact.tensors().items() if name.endswith(".mean")}
    return plan, {**means, **refitted(artifact, plan)}


def refitted(artifact: Artifact, plan: CachePlan) -> dict[str, Tensor]:
    """Fit a plan's predictors to the moments, and with the ridges, that an artifact has; raises as :func:`again`."""
    path = artifact.path / MOMENTS
    if not path.is_file():
        raise InputError(f"{path} is missing: without it the predictors cannot be refitted.")
    try:
        ridges = {str(name): float(x) for name, x in artifact.report["adapters"]["ridge"].items()}
        moments = Moments.from_tensors(load_file(path))
        return aqua_kv.fit(plan, Statistics(moments, Moments()), ridges).tensors
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, InputError) as error:
        raise InputError(f"{artifact.path.name} holds no usable statistics of its predictors: {error}.") from None
