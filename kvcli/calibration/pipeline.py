"""Calibration from a loaded model to a written artifact: moments, sensitivity, settings, search, verify."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcli import plugins
from kvcli.artifact.reader import Artifact
from kvcli.artifact.writer import ArtifactWriter, check_target
from kvcli.calibration import sensitivity, surrogate
from kvcli.calibration.capture import layer_inputs
from kvcli.calibration.corpora import Corpus
from kvcli.calibration.sensitivity import Probe, Sensitivity
from kvcli.calibration.space import SearchSpace, Setting, load_recipe, recipe_names
from kvcli.calibration.stages import Show, Stages, silent
from kvcli.calibration.surrogate import Solution
from kvcli.errors import InputError, UsageError
from kvcli.models.loading import LoadedModel, copy_source_files, state_dict_for_saving
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.packed_cache import ATTENTION

MAX_BITS, MAX_CONTEXT = 64, 10**9  # what an artifact can state
PROBE_TOKENS = 384  # per window when layers are compared; settings and plans are measured on whole windows
PROBE_WINDOWS = 2
VERIFIED = 3  # plans measured end to end before one is chosen
CURVE = tuple(x / 4 for x in range(8, 33))  # budgets of the predicted Pareto curve: 2 … 8 bits


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
    """

    budget: Budget
    plan: CachePlan
    tensors: dict[str, Tensor]
    report: dict[str, Any]
    stages: Stages = field(repr=False)


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
    return {name: (total / count).float() for name, total in sums.items()}


@torch.no_grad()
def calibrate(
    loaded: LoadedModel,
    corpus: Corpus,
    budget: Budget,
    out: Path,
    *,
    recipe: str = "balanced",
    fresh: bool = False,
    show: Show = silent,
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
    fresh
        Forget finished stages of an interrupted run.
    show
        Makes progress displays.

    Raises
    ------
    BudgetError
        If no plan meets the budget, naming the least reachable, before anything is measured.
    InputError
        If the recipe does not exist or does not fit the model.
    """
    geometry = exact_layers(loaded)
    space = search_space(recipe, geometry)
    check_budget(space, geometry, budget, loaded.dtype)
    loaded.model.set_attn_implementation(ATTENTION)
    stages = Stages.beside(out, fresh=fresh, show=show)
    ids = corpus.ids
    length = ids.shape[1]
    exact = CachePlan(tuple(geometry), dtype=loaded.dtype)
    source = {"model": loaded.sha256, "dtype": loaded.dtype, "data": corpus.sha256}

    tensors: dict[str, Tensor] = {}
    if space.center:
        tensors = stages.run(
            "moments", lambda step: moments(loaded, exact, ids, step),
            description="means of keys and values", settings=source, steps=len(ids),
        )  # fmt: skip
    inputs = [x["name"] for x in stages.record]
    layers_probe = Probe(loaded.model, ids[:PROBE_WINDOWS, :PROBE_TOKENS], loaded.rope, tensors)
    found = stages.run(
        "sensitivity", lambda step: sensitivity.measure_layers(layers_probe, space, geometry, loaded.dtype, step),
        description="sensitivity of each layer", inputs=inputs, steps=len(geometry),
        settings={**source, "space": space.to_json(), "windows": PROBE_WINDOWS, "tokens": PROBE_TOKENS},
    )  # fmt: skip
    other = ids[PROBE_WINDOWS % len(ids)][None]
    settings_probe = Probe(loaded.model, other, loaded.rope, tensors)

    def ratios(step: Callable[[], None]) -> dict[str, Any]:
        measured = sensitivity.measure_settings(settings_probe, space, geometry, loaded.dtype, step)
        return {"ratio": [[*vars(s).values(), r] for s, r in measured.items()]}

    ratio = stages.run(
        "settings", ratios,
        description="sinks, window and page size", inputs=inputs,
        settings={**source, "space": space.to_json(), "tokens": length},
        steps=len(space.sink_tokens) + len(space.residual_windows) * len(space.block_sizes) - 1,
    )["ratio"]  # fmt: skip
    costs = Sensitivity(
        space, geometry, loaded.dtype, found["error"], found["kl"], found["measured"],
        {Setting(int(b), int(s), int(w)): r for b, s, w, r in ratio},
    )  # fmt: skip
    solutions = surrogate.solve(costs, budget.bits, budget.context, nominal=budget.nominal)[:VERIFIED]
    check = Probe(loaded.model, ids[(PROBE_WINDOWS + 1) % len(ids)][None], loaded.rope, tensors)

    def verify(step: Callable[[], None]) -> dict[str, Any]:
        reference = check.reference(solutions[0].plan)
        kl = []
        for solution in solutions:
            kl.append(check.kl_of(solution.plan, reference))
            step()
        return {"kl": kl}

    measured = stages.run(
        "verify", verify,
        description="best plans, end to end", inputs=["sensitivity", "settings"], steps=len(solutions),
        settings={"plans": [s.plan.to_json() for s in solutions], "tokens": length},
    )["kl"]  # fmt: skip
    best = min(range(len(solutions)), key=lambda i: (measured[i], i))
    report = {
        "sensitivity": costs.to_json(),
        "scale": measured[best] / solutions[best].predicted_kl,
        "verified": [summary(s, budget.context, kl=m) for s, m in zip(solutions, measured, strict=True)],
    }
    report["curve"] = curve(costs, report["scale"], budget.context)
    return Calibration(budget, solutions[best].plan, tensors, report, stages)


def check_budget(space: SearchSpace, geometry: list[LayerPlan], budget: Budget, dtype: str) -> None:
    """Raise :class:`BudgetError`, naming the least reachable, if nothing in the space can meet the budget."""
    surrogate.solve(Sensitivity.unmeasured(space, geometry, dtype), budget.bits, budget.context, nominal=budget.nominal)


def summary(solution: Solution, context: int, **more: Any) -> dict[str, Any]:
    """Return a solution's shared settings, bits and predicted loss as plain JSON."""
    plan = solution.plan
    return {
        "block_size": plan.block_size, "sink_tokens": plan.sink_tokens, "residual_window": plan.residual_window,
        "effective_bits": plan.effective_bits(context), "nominal_bits": plan.nominal_bits,
        "predicted_kl": solution.predicted_kl, **more,
    }  # fmt: skip


def curve(found: Sensitivity, scale: float, context: int) -> list[dict[str, Any]]:
    """Return the best predicted plan for budgets from 2 to 8 effective bits: the Pareto curve of the report."""
    least = surrogate.least_bits(found, context, nominal=False)
    points = []
    for bits in CURVE:
        if bits >= least:
            best = surrogate.solve(found, bits, context)[0]
            points.append({"bits": bits, **summary(best, context, kl=best.predicted_kl * scale)})
    return points


def write(loaded: LoadedModel, corpus: Corpus, found: Calibration, out: Path, *, seed: int, overwrite: bool) -> Path:
    """Write the artifact of a calibration and forget its finished stages."""
    with ArtifactWriter(out, overwrite=overwrite) as writer:
        copy_source_files(loaded, writer.path)
        writer.write_weights(state_dict_for_saving(loaded))
        writer.write_tensors(found.tensors)
        writer.write_json("report.json", found.report)
        path = writer.commit({
            "plan": found.plan.to_json(), "context": found.budget.context,
            "budget": {"bits": found.budget.bits, "nominal": found.budget.nominal},
            "stages": found.stages.record,
            "source": {
                "model": loaded.source, "sha256": loaded.sha256, "dtype": loaded.dtype,
                "changed": changed(loaded, writer.path),
            },
            "calibration": {"data": corpus.name, "sha256": corpus.sha256, "tokens": corpus.ids.numel(), "seed": seed},
        })  # fmt: skip
    found.stages.discard()
    return path


def shapes(layers: Sequence[LayerPlan]) -> list[tuple[Any, ...]]:
    """Return what makes layers those of one model: heads, channels and windows."""
    return [(x.num_kv_heads, x.head_dim, x.kind, x.window) for x in layers]


def changed(loaded: LoadedModel, folder: Path) -> list[str]:
    """Return the keys of config.json that differ from the source's, none for a .gguf, which has no config.json."""
    original = loaded.files[0].parent / "config.json"
    if not original.exists():
        return []
    before, after = (json.loads(path.read_text()) for path in (original, folder / "config.json"))
    return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))


def solve(artifact: Artifact, budget: Budget, out: Path, *, overwrite: bool) -> tuple[Path, CachePlan, float]:
    """Write another artifact for another budget from what an artifact already measured.

    Returns the path, the plan and the KL predicted for it. Weights are linked, not copied, on one file system.

    Raises
    ------
    BudgetError
        If no plan meets the budget.
    InputError
        If the artifact's report holds no measurements.
    """
    check_target(out, overwrite=overwrite)
    try:
        found = Sensitivity.from_json(artifact.report["sensitivity"])
        scale = float(artifact.report["scale"])
        if found.dtype != artifact.plan.dtype or shapes(found.geometry) != shapes(artifact.plan.layers):
            raise ValueError("measured on another model")
    except (KeyError, TypeError, ValueError, AttributeError, InputError):
        raise InputError(f"{artifact.path.name} holds no usable measurements in report.json.") from None
    best = surrogate.solve(found, budget.bits, budget.context, nominal=budget.nominal)[0]
    predicted = best.predicted_kl * scale
    report = {**artifact.report, "verified": [], "curve": curve(found, scale, budget.context)}
    report["solved"] = summary(best, budget.context, kl=predicted)
    stage = {"name": "solve", "settings": {"bits": budget.bits, "context": budget.context, "nominal": budget.nominal}}
    with ArtifactWriter(out, overwrite=overwrite) as writer:
        writer.link(artifact, "*")
        writer.write_tensors(artifact.tensors())
        writer.write_json("report.json", report)
        manifest: Mapping[str, Any] = artifact.manifest
        path = writer.commit({
            "plan": best.plan.to_json(), "context": budget.context,
            "budget": {"bits": budget.bits, "nominal": budget.nominal},
            "stages": [*manifest["stages"], {**stage, "sha256": manifest["files"]["report.json"]["sha256"]}],
            "source": manifest["source"], "calibration": manifest["calibration"],
        })  # fmt: skip
    return path, best.plan, predicted
