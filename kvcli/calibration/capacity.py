"""The second plan of an artifact: how sequences that nobody uses are packed again, with the full predictors.

Running sequences keep the plan as it is, and decoding touches codes only. What is idle needs not be read at every step,
so that AQUA-KV's full predictors (Shutova et al., 2025, arXiv:2501.19392) cost it nothing but one pass each way: its
pages are decoded, predicted layer by layer, and their residuals packed in few bits. Sinks and the residual window stay
what they are, so both plans share them, and the size of pages.

The exact keys and values of packed tokens are gone by then, and what is packed again are reconstructions. Predictors
are fitted to exact ones with the error of the *second* plan's bits added (:func:`kvcli.calibration.aqua_kv.fit`); the
first plan's error is a fraction of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch
from torch import Tensor

from kvcli.artifact.reader import Artifact
from kvcli.calibration import adapting
from kvcli.calibration.adapting import AdapterSettings, check, on_residuals, refitted, search
from kvcli.calibration.aqua_kv import WHICH
from kvcli.calibration.corpora import Corpus
from kvcli.calibration.measuring import check_probe
from kvcli.calibration.pipeline import Budget, Calibration, check_budget
from kvcli.calibration.sensitivity import Sensitivity
from kvcli.calibration.space import SearchSpace, Setting
from kvcli.calibration.stages import Show, silent
from kvcli.calibration.surrogate import least_bits, solve
from kvcli.errors import BudgetError, InputError
from kvcli.models.loading import LoadedModel
from kvcli.plan import CachePlan, LayerPlan

BITS = 2.5  # effective, where that can be reached


def in_setting(found: Sensitivity, plan: CachePlan) -> Sensitivity:
    """Return measurements cut to plans that share a plan's pages, sinks and window."""
    setting = Setting(plan.block_size, plan.sink_tokens, plan.residual_window)
    formats = {"k": found.space.k, "v": found.space.v}
    # without sinks or window, scales along tokens would pack a layer later than those that are predicted from it
    late = setting.sink_tokens or setting.residual_window
    at = {w: [i for i, x in enumerate(formats[w]) if late or x.is_token_wise] for w in WHICH}
    if not all(at.values()):
        raise InputError("the recipe has no format that packs tokens at once, as a plan without sinks or window must.")
    space = replace(
        found.space, k=tuple(found.space.k[i] for i in at["k"]), v=tuple(found.space.v[i] for i in at["v"]),
        block_sizes=(setting.block_size,), sink_tokens=(setting.sink_tokens,),
        residual_windows=(setting.residual_window,),
    )  # fmt: skip
    error, kl = ({w: [[row[i] for i in at[w]] for row in x[w]] for w in WHICH} for x in (found.error, found.kl))
    return replace(found, space=space, error=error, kl=kl, ratio={setting: 1.0})


def check_bits(
    space: SearchSpace, geometry: list[LayerPlan], settings: AdapterSettings, context: int, dtype: str
) -> None:
    """Raise :class:`BudgetError`, naming the least reachable, if no plan of the space has the bits asked for."""
    if settings.mode == "capacity" and settings.capacity_bits is not None:
        with _named():
            check_budget(space, geometry, Budget(settings.capacity_bits, context), dtype)


@contextmanager
def _named() -> Iterator[None]:
    """Say of a budget that cannot be met which one it is."""
    try:
        yield
    except BudgetError as error:
        raise BudgetError(f"--capacity-bits: {error}") from None


@torch.no_grad()
def apply(
    loaded: LoadedModel, corpus: Corpus, found: Calibration, settings: AdapterSettings, *, show: Show = silent
) -> None:
    """Give a calibration a capacity plan, and measure what that plan alone would cost.

    Parameters
    ----------
    loaded
        The model that was calibrated.
    corpus
        The text it was calibrated on.
    found
        Changed in place: the capacity plan and its tensors, report, and the moments that ``solve`` refits from.
    settings
        The predictors; unless their mode is ``capacity`` nothing is done.
    show
        Makes progress displays.

    Raises
    ------
    BudgetError
        If the bits that were asked for cannot be met with the plan's sinks and window, naming the least.
    KvcliError
        If a predictor is not finite.
    """
    if settings.mode != "capacity":
        return
    full, plan = replace(settings, mode="always"), found.plan
    costs = in_setting(Sensitivity.from_json(found.report["sensitivity"]), plan)
    context, bits = found.budget.context, settings.capacity_bits
    budget = Budget(_reachable(costs, context, BITS) if bits is None else bits, context)
    k, v = (min(x, key=lambda fmt: fmt.bits) for x in (costs.space.k, costs.space.v))  # an exact one predicts nothing
    layers = tuple(costs.space.layer(x, k, v) for x in costs.geometry)
    own = adapting.statistics(loaded, corpus, found, full.applied(replace(plan, layers=layers)))
    with _named():
        best = search(costs, own, full, budget)[0]
    check(best.fitted)
    tensors = {**found.tensors, **best.fitted.tensors}
    probe = check_probe(loaded, corpus.ids, found.tensors)
    with show("the capacity plan, end to end", 2) as bar:
        plain = probe.cost_of(plan)
        bar.advance()
        cost = probe.using(tensors).cost_of(best.plan)
    found.report["adapters"] = {
        "settings": asdict(settings), "left": best.fitted.left, "ridge": best.fitted.ridge,
        "kl": {"none": plain.kl, "capacity": cost.kl}, "model_bytes": best.plan.model_bytes(),
    }  # fmt: skip
    found.capacity = best.plan, tensors
    found.moments = (own.train + own.held_out).to_tensors()


def again(artifact: Artifact, found: Sensitivity, plan: CachePlan, context: int) -> tuple[CachePlan, dict[str, Tensor]]:
    """Return a capacity plan for another plan of an artifact that has one, and its tensors.

    The artifact's own if it fits; else one of its bits, or of the least that can be reached, refitted in closed form.

    Raises
    ------
    InputError
        As :func:`kvcli.calibration.adapting.again`.
    """
    assert artifact.capacity is not None
    if plan.shares_pages_with(artifact.capacity):
        return artifact.capacity, artifact.capacity_tensors()
    settings = adapting.settings_of(artifact)
    try:
        costs = on_residuals(in_setting(found, plan), artifact.report["adapters"]["left"])
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{artifact.path.name} holds no usable statistics of its predictors.") from None
    bits = _reachable(costs, context, settings.capacity_bits or BITS)
    chosen = replace(settings, mode="always").applied(solve(costs, bits, context)[0].plan)
    means = {name: x for name, x in artifact.capacity_tensors().items() if name.endswith(".mean")}
    return chosen, {**means, **refitted(artifact, chosen)}


def _reachable(costs: Sensitivity, context: int, bits: float) -> float:
    """Return ``bits``, or the least that any plan has if that is more."""
    return max(bits, least_bits(costs, context, False))
