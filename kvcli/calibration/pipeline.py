"""Calibration from a loaded model to a written artifact: moments, sensitivity, settings, search, verify.

What takes long is a list of independent evaluations (one layer, one plan). Each is kept beside the output as soon as it
is finished, so that a calibration that was killed repeats none of them; :func:`calibrate` takes what runs them, here or
on workers. :mod:`kvcli.calibration.solving` makes further artifacts from what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from kvcli import plugins
from kvcli.artifact.writer import ArtifactWriter
from kvcli.calibration import refine, sensitivity, surrogate
from kvcli.calibration.capture import layer_inputs
from kvcli.calibration.corpora import Corpus
from kvcli.calibration.measuring import Measuring, check_probe, nll_per_kl
from kvcli.calibration.objectives import TaskObjective
from kvcli.calibration.refine import Tried
from kvcli.calibration.sensitivity import Sensitivity
from kvcli.calibration.space import SearchSpace, load_recipe, recipe_names
from kvcli.calibration.stages import Run, Show, Stages, in_turn, silent
from kvcli.calibration.surrogate import Frontiers, Solution
from kvcli.errors import InputError, UsageError
from kvcli.models.loading import LoadedModel, copy_source_files, state_dict_for_saving
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.packed_cache import ATTENTION

MAX_BITS, MAX_CONTEXT = 64, 10**9  # what an artifact can state
CURVE = tuple(x / 4 for x in range(8, 33))  # budgets of the predicted Pareto curve: 2 … 8 bits


Search = Literal["surrogate", "kvtuner-nsga2", "kvtuner-moead"]


@dataclass(frozen=True)
class Budget:
    """A ceiling on bits.

    Attributes
    ----------
    bits
        The ceiling.
    context
        Tokens of one sequence at which effective bits are counted.
    nominal
        Count nominal bits, as papers do.
    """

    bits: float
    context: int
    nominal: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.bits <= MAX_BITS:
            raise UsageError(f"--bits {self.bits:g} is not between 0 and {MAX_BITS}.")
        if not 0 < self.context <= MAX_CONTEXT:
            raise UsageError(f"--context {self.context} is not between 1 and {MAX_CONTEXT} tokens.")


@dataclass
class Calibration:
    """What calibration found.

    Attributes
    ----------
    budget, plan
        What was asked and what was chosen.
    tensors
        What ``kv.safetensors`` will hold.
    report
        What ``report.json`` will hold: measurements, the predicted curve, plans measured end to end.
    stages
        Finished stages, for the artifact's provenance.
    moments
        What predictors are refitted from, if there are any.
    capacity
        The plan by which idle sequences are packed again and its tensors, if there is one.
    """

    budget: Budget
    plan: CachePlan
    tensors: dict[str, Tensor]
    report: dict[str, Any]
    stages: Stages = field(repr=False)
    moments: dict[str, Tensor] = field(default_factory=dict, repr=False)
    capacity: tuple[CachePlan, dict[str, Tensor]] | None = field(default=None, repr=False)


def search_space(recipe: str, geometry: list[LayerPlan]) -> SearchSpace:
    """Return the search space of a recipe, a recipe file or a quantizer plug-in, cut to what fits the model.

    Raises
    ------
    InputError
        If there is no such recipe, or nothing in it fits.
    """
    space = load_recipe(recipe)
    if space is None:
        found = [x.name for x in plugins.discover() if x.family == "quantizer"]
        if recipe not in found:
            raise InputError(f"there is no recipe {recipe!r}; there are {', '.join(recipe_names() + sorted(found))}.")
        space = plugins.load(recipe, family="quantizer")().search_space(geometry)
    return space.fitting(geometry)


def exact_layers(loaded: LoadedModel) -> list[LayerPlan]:
    """Return the model's layers in exact formats."""
    exact = KVFormat.exact()
    return [LayerPlan(g.num_kv_heads, g.head_dim, exact, exact, kind=g.kind, window=g.window) for g in loaded.geometry]


def moments(loaded: LoadedModel, plan: CachePlan, ids: Tensor, step: Callable[[], None]) -> dict[str, Tensor]:
    """Return the mean of every layer's keys before RoPE and of its values, without the first tokens (sinks)."""
    sums: dict[str, Tensor] = {}
    skip = min(sensitivity.BASE.sink_tokens, ids.shape[1] - 1)
    count = len(ids) * (ids.shape[1] - skip)
    for window in ids:
        for i, _, seen in layer_inputs(loaded.model, plan, window[None]):
            positions = torch.arange(ids.shape[1], device=seen.key.device)
            for which, x in (("k", loaded.rope.unrotate(seen.key, positions)), ("v", seen.value)):
                name = f"layer.{i}.{which}.mean"
                total = x[0, :, skip:].double().sum(1)
                sums[name] = sums[name] + total if name in sums else total
        step()
    return {name: (total / count).float().cpu() for name, total in sums.items()}


@torch.no_grad()
def calibrate(
    loaded: LoadedModel,
    corpus: Corpus,
    budget: Budget,
    out: Path,
    *,
    recipe: str = "balanced",
    search: Search = "surrogate",
    trials: int = 200,
    task: TaskObjective | None = None,
    seed: int = 0,
    means: dict[str, Tensor] | None = None,
    fresh: bool = False,
    show: Show = silent,
    run: Run = in_turn,
) -> Calibration:
    """Find the plan that spends a budget best on a model; :func:`write` makes the artifact of it.

    Parameters
    ----------
    loaded
        The model; its attention is switched to ``kvcli``.
    corpus
        At least one window; its first ones serve layer measurements, others settings and verification, all the means.
    budget
        Ceiling on bits.
    out
        The artifact to be; finished stages are kept beside it.
    recipe
        Name of a search space.
    search
        ``surrogate``: the exact optimum of the additive model, and plans around it measured end to end; or KVTuner's
        own search by Optuna's NSGA-II or by MOEA/D, whose front goes into the report.
    trials, task, seed
        Of KVTuner's search; a task's errors take the place of KL.
    means
        What centred layers take off, instead of the plain means; the model's hash stands for them in stages.
    fresh
        Forget finished stages of an interrupted run.
    show
        Makes progress displays.
    run
        Runs the independent evaluations, by default here and one after another.

    Raises
    ------
    BudgetError
        If no plan meets the budget, naming the least reachable, before anything is measured; if KVTuner's search found
        none.
    InputError
        If the recipe does not exist or does not fit the model.
    UsageError
        If stages are to be forgotten that another calibration uses, or Optuna is not installed.
    """
    geometry = exact_layers(loaded)
    space = search_space(recipe, geometry)
    check_budget(space, geometry, budget, loaded.dtype)
    if search != "surrogate":
        from kvcli.calibration import paper_search

        paper_search.check_installed()
        if not space.layerwise:
            raise UsageError(f"--search {search} gives each layer its own formats; recipe {recipe} gives all the same.")
    loaded.model.set_attn_implementation(ATTENTION)
    stages = Stages.beside(out, fresh=fresh, show=show)
    ids = corpus.ids
    exact = CachePlan(tuple(geometry), dtype=loaded.dtype)
    source = {"model": loaded.sha256, "dtype": loaded.dtype, "data": corpus.sha256}

    with stages:  # nobody else forgets them meanwhile
        tensors: dict[str, Tensor] = {}
        if space.center and means:
            tensors = dict(means)
        elif space.center:
            tensors = stages.run(
                "moments", lambda step: moments(loaded, exact, ids, step),
                description="means of keys and values", settings=source, steps=len(ids),
            )  # fmt: skip
        work = Measuring(loaded, tensors, space, geometry, stages, source, run)
        costs = work.costs(ids)
        more: dict[str, Any] = {}
        if search == "surrogate":
            tried, chosen = refine.search(work, costs, ids, budget.bits, budget.context, nominal=budget.nominal)
        else:
            sampler = paper_search.SAMPLERS[search]
            tried, front = paper_search.search(work, costs, ids, budget, sampler, trials=trials, seed=seed, task=task)
            chosen, more = 0, {"front": front.to_json()}
    scale = scale_of((x.cost.kl, x.predicted_kl) for x in tried)
    report = {
        "sensitivity": costs.to_json(),
        "scale": scale,
        "nll_per_kl": nll_per_kl([x.cost for x in tried], check_probe(loaded, ids, tensors).scored_tokens),
        "verified": [summary(x, budget.context, kl=x.cost.kl, delta_nll=x.cost.delta_nll) for x in tried],
        "chosen": chosen,
        "curve": curve(costs, scale, budget.context),
        **more,
    }
    return Calibration(budget, tried[chosen].plan, tensors, report, stages)


def scale_of(losses: Iterable[tuple[float, float]]) -> float:
    """Return how many times the predicted loss plans cost, from pairs of both; 1 where nothing is lost, in 16 bits."""
    return median([kl / predicted for kl, predicted in losses if kl > 0 and predicted > 0] or [1.0])


def check_budget(space: SearchSpace, geometry: list[LayerPlan], budget: Budget, dtype: str) -> None:
    """Raise :class:`BudgetError`, naming the least reachable, if nothing in the space can meet the budget."""
    surrogate.solve(Sensitivity.unmeasured(space, geometry, dtype), budget.bits, budget.context, nominal=budget.nominal)


def summary(solution: Solution | Tried, context: int, **more: Any) -> dict[str, Any]:
    """Return a solution's shared settings, bits and predicted loss as plain JSON."""
    plan = solution.plan
    return {
        "block_size": plan.block_size, "sink_tokens": plan.sink_tokens, "residual_window": plan.residual_window,
        "effective_bits": plan.effective_bits(context), "nominal_bits": plan.nominal_bits,
        "predicted_kl": solution.predicted_kl, **more,
    }  # fmt: skip


def curve(found: Sensitivity, scale: float, context: int) -> list[dict[str, Any]]:
    """Return the best predicted plan for budgets from 2 to 8 effective bits: the Pareto curve of the report."""
    frontiers = Frontiers(found, context, bits=max(CURVE))
    points = []
    for bits in CURVE:
        best = frontiers.best(bits)
        if best is not None:
            points.append({"bits": bits, **summary(best, context, kl=best.predicted_kl * scale)})
    return points


def write(loaded: LoadedModel, corpus: Corpus, found: Calibration, out: Path, *, seed: int, overwrite: bool) -> Path:
    """Write the artifact of a calibration and forget its finished stages."""
    with ArtifactWriter(out, overwrite=overwrite) as writer:
        copy_source_files(loaded, writer.path)
        writer.write_weights(state_dict_for_saving(loaded))
        writer.write_tensors(found.tensors, found.capacity[1] if found.capacity else None)
        writer.write_json("report.json", found.report)
        if found.moments:
            (writer.path / "calibration").mkdir()
            save_file(found.moments, writer.path / "calibration" / "moments.safetensors")
        path = writer.commit({
            "plan": found.plan.to_json(), "context": found.budget.context,
            **({"capacity": found.capacity[0].to_json()} if found.capacity else {}),
            "budget": {"bits": found.budget.bits, "nominal": found.budget.nominal},
            "stages": found.stages.record,
            "source": {
                "model": loaded.source, "sha256": loaded.source_sha256, "dtype": loaded.dtype,
                "changed": changed(loaded, writer.path),
            },
            "calibration": {"data": corpus.name, "sha256": corpus.sha256, "tokens": corpus.ids.numel(), "seed": seed},
        })  # fmt: skip
    found.stages.discard()
    return path


def changed(loaded: LoadedModel, folder: Path) -> list[str]:
    """Return the keys of config.json that differ from the source's, none for a .gguf, which has no config.json."""
    original = loaded.files[0].parent / "config.json"
    if not original.exists():
        return []
    before, after = (json.loads(path.read_text()) for path in (original, folder / "config.json"))
    return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
