"""Further artifacts from what one calibration measured: another budget, or the fewest bits within a loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvcli.artifact.reader import Artifact
from kvcli.artifact.writer import ArtifactWriter
from kvcli.calibration import adapting, capacity, corpora
from kvcli.calibration.measuring import check_probe
from kvcli.calibration.objectives import TaskScorer
from kvcli.calibration.pipeline import Budget, check_budget, curve, summary
from kvcli.calibration.sensitivity import Cost, Probe, Sensitivity
from kvcli.calibration.surrogate import Frontiers, Solution, solve
from kvcli.errors import BudgetError, InputError, UsageError
from kvcli.models.loading import LoadedModel
from kvcli.plan import CachePlan, LayerPlan
from kvcli.runtime.packed_cache import ATTENTION

OBJECTIVES = ("kl", "ppl")  # besides tasks
CANDIDATES = 4  # settings whose best plans are measured for a budget, where measuring was asked for
ATTEMPTS = 6  # budgets that are measured on the way to a loss
STEP = 0.01  # bits: how closely a loss is met
MOST_BITS = 16.0


@dataclass(frozen=True)
class Solved:
    """A plan for a budget or a loss.

    Attributes
    ----------
    plan
        The plan.
    predicted_kl
        Mean KL in nats a token, by the additive model scaled to what was measured end to end.
    predicted_ppl_pct
        By how many per cent perplexity is predicted to grow.
    measured
        What it cost on calibration text, if that was measured.
    task
        How it did on the task that was to decide, as :func:`kvcli.evaluation.tasks.summarize`, with its name.
    """

    plan: CachePlan
    predicted_kl: float
    predicted_ppl_pct: float
    measured: Cost | None = None
    task: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what was predicted and measured as plain JSON."""
        kl, ppl = (None, None) if self.measured is None else (self.measured.kl, percent(self.measured.delta_nll))
        return {
            "predicted_kl": self.predicted_kl, "measured_kl": kl,
            "predicted_ppl_pct": self.predicted_ppl_pct, "measured_ppl_pct": ppl,
            **({} if self.task is None else {"task": self.task}),
        }  # fmt: skip


def percent(delta_nll: float) -> float:
    """Return by how many per cent perplexity grows when the loss a token grows by so many nats."""
    return 100 * math.expm1(delta_nll)


class Solver:
    """An artifact's measurements, for any budget.

    Parameters
    ----------
    artifact
        A calibrated or solved artifact.

    Raises
    ------
    InputError
        If the artifact's report holds no measurements of its model.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.adapters = adapting.settings_of(artifact)
        try:
            self.found = Sensitivity.from_json(artifact.report["sensitivity"])
            if self.adapters.predicts:
                self.found = adapting.on_residuals(self.found, artifact.report["adapters"]["left"])
            self.scale = float(artifact.report["scale"])
            self.nll_per_kl = float(artifact.report.get("nll_per_kl", 1.0))
            if self.found.dtype != artifact.plan.dtype or _shapes(self.found.geometry) != _shapes(artifact.plan.layers):
                raise ValueError("measured on another model")
            if not 0 < self.scale < math.inf or not math.isfinite(self.nll_per_kl):
                raise ValueError("a scale is not a number")
        except (KeyError, TypeError, ValueError, AttributeError, InputError):
            raise InputError(f"{artifact.path.name} holds no usable measurements in report.json.") from None

    def check(self, budget: Budget) -> None:
        """Raise :class:`BudgetError`, naming the least reachable, if no plan meets the budget."""
        check_budget(self.found.space, self.found.geometry, budget, self.found.dtype)

    def within_bits(
        self, budget: Budget, probe: Probe | None = None, objective: str | TaskScorer = "kl",
        step: Callable[[], None] = lambda: None,
    ) -> Solved:  # fmt: skip
        """Return the plan of least predicted loss within a budget.

        With a probe the best plans of the leading settings are measured, and the best measured one is returned: by KL,
        by the loss on the text for objective ``ppl``, or by the score on a task, where equal scores leave it to KL.
        Without, ``kl`` and ``ppl`` have one optimum, for perplexity is predicted from KL (see
        :func:`kvcli.calibration.measuring.nll_per_kl`).

        Raises
        ------
        BudgetError
            If no plan meets the budget.
        """
        solutions = solve(self.found, budget.bits, budget.context, nominal=budget.nominal)
        if probe is None:
            return self._solved(solutions[0])
        measured = []
        for found in solutions[:CANDIDATES]:
            plan, tensors = adapting.again(self.artifact, found.plan)
            solved = self._solved(found, probe.using(tensors).cost_of(plan))
            if isinstance(objective, TaskScorer):
                solved = replace(solved, task={"name": objective.objective.name, **objective(plan, tensors)})
            measured.append(solved)
            step()
        return min(measured, key=lambda x: _loss(x, objective))

    def within_loss(
        self, most: float, context: int, probe: Probe | None = None, *, nominal: bool = False,
        step: Callable[[], None] = lambda: None,
    ) -> Solved:  # fmt: skip
        """Return the plan of fewest bits whose predicted KL is at most ``most``; with a probe, its measured one.

        Then what was measured corrects the prediction and the search goes on, a few times.

        Raises
        ------
        BudgetError
            If no plan loses so little, naming the least loss.
        """
        frontiers = Frontiers(self.found, context, nominal=nominal, bits=MOST_BITS)
        richest = frontiers.best(MOST_BITS)
        assert richest is not None
        good: Solved | None = None
        lowest, correction = math.inf, 1.0  # least measured loss so far; measured over predicted
        for _ in range(ATTEMPTS if probe else 1):
            found = self._fewest(frontiers, most / correction) or richest
            if good is not None and self.adapters.applied(found.plan) == good.plan:
                break
            cost = None
            if probe:
                plan, tensors = adapting.again(self.artifact, found.plan)
                cost = probe.using(tensors).cost_of(plan)
            solved = self._solved(found, cost)
            loss = solved.predicted_kl if cost is None else cost.kl
            step()
            lowest = min(lowest, loss)
            if loss <= most:
                if good is None or _bits(solved.plan, context, nominal) < _bits(good.plan, context, nominal):
                    good = solved
            elif found.plan == richest.plan:
                break
            correction = max(loss / solved.predicted_kl, correction if loss > most and good is None else 0)
            correction *= 1.02 if loss > most else 1  # or it would stop just above
        if good is None:
            kind = "measured" if probe else "predicted"
            raise BudgetError(f"a mean KL of {most:g} cannot be met; the least {kind} is {lowest:.3g}.")
        return good

    def _fewest(self, frontiers: Frontiers, most: float) -> Solution | None:
        """Return the plan of fewest bits predicted to lose at most ``most``, by bisection: the loss falls with bits."""

        def best(bits: float) -> Solution | None:
            found = frontiers.best(bits)
            return found if found and found.predicted_kl * self.scale <= most else None

        low, high = 0.0, MOST_BITS
        found = best(high)
        while found and high - low > STEP:
            middle = (low + high) / 2
            better = best(middle)
            found, low, high = (better, low, middle) if better else (found, middle, high)
        return found

    def _solved(self, solution: Solution, measured: Cost | None = None) -> Solved:
        kl = solution.predicted_kl * self.scale
        return Solved(self.adapters.applied(solution.plan), kl, percent(self.nll_per_kl * kl), measured)

    def write(self, solved: Solved, budget: Budget, out: Path, *, overwrite: bool) -> Path:
        """Write the artifact of a solution; weight files are linked, not copied, on one file system."""
        artifact, manifest = self.artifact, self.artifact.manifest
        report = {**artifact.report, "verified": [], "curve": curve(self.found, self.scale, budget.context)}
        for name in ("chosen", "front"):  # of the plan that was calibrated
            report.pop(name, None)
        report["solved"] = {
            **summary(Solution(solved.plan, solved.predicted_kl), budget.context, kl=solved.predicted_kl),
            **solved.to_json(),
        }
        stage = {
            "name": "solve",
            "settings": {"bits": budget.bits, "context": budget.context, "nominal": budget.nominal},
            "sha256": manifest["files"]["report.json"]["sha256"],
        }
        plan, tensors = adapting.again(artifact, solved.plan)
        more: dict[str, Any] = {}
        idle = None
        if artifact.capacity is not None:
            second, idle = capacity.again(artifact, self.found, plan, budget.context)
            more = {"capacity": second.to_json()}
        with ArtifactWriter(out, overwrite=overwrite) as writer:
            writer.link(artifact, "*")
            writer.write_tensors(tensors, idle)
            writer.write_json("report.json", report)
            return writer.commit({
                "plan": plan.to_json(), "context": budget.context,
                "budget": {"bits": budget.bits, "nominal": budget.nominal},
                "stages": [*manifest["stages"], stage],
                "source": manifest["source"], "calibration": manifest["calibration"], **more,
            })  # fmt: skip


def calibration_text(artifact: Artifact, loaded: LoadedModel, length: int) -> corpora.Corpus:
    """Return the text that an artifact was calibrated on, read again by its name.

    Raises
    ------
    UsageError
        If it is not there any more: the artifact names the text, but does not hold it.
    """
    stated = artifact.manifest["calibration"]
    missing = f"the calibration text {stated['data']} cannot be read again: name a text to measure on with --data."
    if "-" in stated["data"].split(","):
        raise UsageError(missing)
    try:
        corpus = corpora.tokens(stated["data"], loaded, num_tokens=stated["tokens"], seed=stated["seed"], length=length)
    except InputError as error:
        raise UsageError(missing) from error
    if corpus.sha256 != stated["sha256"]:
        raise UsageError(missing)
    return corpus


def probe_of(artifact: Artifact, loaded: LoadedModel, corpus: corpora.Corpus) -> Probe:
    """Return the probe that calibration compared plans on."""
    loaded.model.set_attn_implementation(ATTENTION)
    return check_probe(loaded, corpus.ids, artifact.tensors())


@torch.no_grad()
def find(
    solver: Solver, budget: Budget | None, most_kl: float | None, context: int, probe: Probe | None, *,
    nominal: bool, objective: str | TaskScorer = "kl", step: Callable[[], None] = lambda: None,
) -> Solved:  # fmt: skip
    """Solve for a budget, or for a loss where there is none."""
    if budget is not None:
        return solver.within_bits(budget, probe, objective, step)
    assert most_kl is not None
    return solver.within_loss(most_kl, context, probe, nominal=nominal, step=step)


def _loss(solved: Solved, objective: str | TaskScorer) -> tuple[float, float]:
    assert solved.measured is not None
    cost = solved.measured
    if solved.task is not None:
        return -solved.task["score"], cost.kl
    return (cost.kl if objective == "kl" else cost.delta_nll), 0.0


def _bits(plan: CachePlan, context: int, nominal: bool) -> float:
    return plan.nominal_bits if nominal else plan.effective_bits(context)


def _shapes(layers: list[LayerPlan] | tuple[LayerPlan, ...]) -> list[tuple[Any, ...]]:
    """Return what makes layers those of one model: heads, channels and windows."""
    return [(x.num_kv_heads, x.head_dim, x.kind, x.window) for x in layers]
