"""Calibration without a search: the plan is given, and what it costs is measured."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcli.calibration.corpora import Corpus
from kvcli.calibration.pipeline import Budget, Calibration, exact_layers
from kvcli.calibration.presets import Preset
from kvcli.calibration.sensitivity import Probe
from kvcli.calibration.stages import Run, Show, Stages, in_turn, silent
from kvcli.errors import BudgetError
from kvcli.models.architectures import Rope
from kvcli.models.loading import LoadedModel
from kvcli.plan import CachePlan
from kvcli.runtime.packed_cache import ATTENTION


def budget_for(loaded: LoadedModel, preset: Preset, bits: float | None, context: int, nominal: bool) -> Budget:
    """Return the budget that a preset is held to on a model.

    Parameters
    ----------
    loaded
        The model.
    preset
        The plan.
    bits
        Ceiling that the plan has to be within; None: what the plan takes.
    context, nominal
        How bits are counted, as in :class:`~kvcli.calibration.pipeline.Budget`.

    Raises
    ------
    BudgetError
        If the plan takes more bits, naming them.
    InputError
        If the preset is for another number of layers.
    """
    plan = preset.plan(exact_layers(loaded), loaded.dtype)
    spent = plan.nominal_bits if nominal else plan.effective_bits(context)
    budget = Budget(spent if bits is None else bits, context, nominal)
    if spent > budget.bits + 1e-9:
        kind = "nominal bits" if nominal else f"effective bits at {context} tokens"
        raise BudgetError(f"preset {preset.name} takes {spent:.3f} {kind}, more than {bits:g}.")
    return budget


def window_cost(model: PreTrainedModel, ids: Tensor, rope: Rope, plan: CachePlan, window: int) -> dict[str, float]:
    """Return what a plan costs on one of [windows, tokens] ids: the fields of :class:`~.sensitivity.Cost`."""
    return asdict(Probe(model, ids[window][None], rope, {}).cost_of(plan))


@torch.no_grad()
def calibrate(
    loaded: LoadedModel,
    corpus: Corpus,
    preset: Preset,
    budget: Budget,
    out: Path,
    *,
    fresh: bool = False,
    show: Show = silent,
    run: Run = in_turn,
) -> Calibration:
    """Apply a preset and measure its loss on every window of a corpus; :func:`.pipeline.write` makes the artifact.

    Parameters
    ----------
    loaded
        The model; its attention is switched to ``kvcli``.
    corpus
        At least one window; the second half of each is scored.
    preset
        The plan.
    budget
        Of :func:`budget_for`; recorded in the artifact.
    out, fresh, show, run
        As in :func:`.pipeline.calibrate`.

    Raises
    ------
    InputError
        If the preset is for another number of layers.
    """
    plan = preset.plan(exact_layers(loaded), loaded.dtype)
    loaded.model.set_attn_implementation(ATTENTION)
    stages = Stages.beside(out, fresh=fresh, show=show)
    named = {"preset": preset.name, "mode": preset.mode, "sha256": preset.sha256}
    costs = stages.map(
        "verify", partial(window_cost, loaded.model, corpus.ids, loaded.rope, plan), list(range(len(corpus.ids))),
        description="the plan, end to end", run=run,
        settings={
            "model": loaded.sha256, "dtype": loaded.dtype, "data": corpus.sha256, "preset": named,
            "tokens": corpus.ids.shape[1],
        },
    )  # fmt: skip
    means = {name: sum(x[name] for x in costs) / len(costs) for name in ("kl", "delta_nll")}
    summary = {
        "block_size": plan.block_size, "sink_tokens": plan.sink_tokens, "residual_window": plan.residual_window,
        "effective_bits": plan.effective_bits(budget.context), "nominal_bits": plan.nominal_bits, **means,
    }  # fmt: skip
    return Calibration(budget, plan, {}, {"preset": named, "verified": [summary], "chosen": 0}, stages)
