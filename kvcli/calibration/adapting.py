"""The stage of calibration that predicts: after the search it gives the plan its predictors, and solve refits them.

Predictors change no bit of the cache, so the plan that was found within a budget stays within it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
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
from kvcli.calibration.pipeline import Calibration
from kvcli.errors import InputError, KvcliError
from kvcli.models.loading import LoadedModel
from kvcli.plan import CachePlan

MOMENTS = "calibration/moments.safetensors"


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

    def applied(self, plan: CachePlan) -> CachePlan:
        """Return a plan with these predictors."""
        return replace(plan, layers=tuple(aqua_kv.design(plan.layers, **asdict(self))))


@torch.no_grad()
def apply(loaded: LoadedModel, corpus: Corpus, found: Calibration, settings: AdapterSettings) -> None:
    """Fit predictors for the plan that calibration found, and measure it with and without them.

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

    Raises
    ------
    UsageError
        As :func:`kvcli.calibration.aqua_kv.design`.
    KvcliError
        If a predictor is not finite.
    """
    if settings.mode == "none":
        return
    plan = settings.applied(found.plan)
    source = {"model": loaded.sha256, "dtype": loaded.dtype, "data": corpus.sha256}

    def moments(step: Any) -> dict[str, Tensor]:
        own = aqua_kv.statistics(loaded, plan, corpus.ids, step)
        parts = (("train ", own.train), ("held out ", own.held_out))
        return {prefix + name: x for prefix, part in parts for name, x in part.to_tensors().items()}

    with found.stages as stages:
        kept = stages.run(
            "adapters", moments, description="second moments of keys and values", steps=len(corpus.ids),
            settings={**source, "layers": [str(x.predictor) for x in plan.layers]},
        )  # fmt: skip
    own = Statistics(*(Moments.from_tensors(_under(kept, prefix)) for prefix in ("train ", "held out ")))
    fitted = aqua_kv.fit(plan, own)
    _check(fitted)
    tensors = {**found.tensors, **fitted.tensors}
    plain = check_probe(loaded, corpus.ids, found.tensors).cost_of(found.plan)
    cost = check_probe(loaded, corpus.ids, tensors).cost_of(plan)
    found.report["adapters"] = {
        "settings": asdict(settings), "left": fitted.left, "ridge": fitted.ridge,
        "kl": {"none": plain.kl, settings.mode: cost.kl}, "model_bytes": plan.model_bytes(),
    }  # fmt: skip
    chosen = found.report["verified"][found.report.get("chosen", 0)]
    found.report["verified"].append({**chosen, "kl": cost.kl, "delta_nll": cost.delta_nll})
    found.report["chosen"] = len(found.report["verified"]) - 1
    found.plan, found.tensors = plan, tensors
    found.moments = (own.train + own.held_out).to_tensors()


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def _check(fitted: Fitted) -> None:
    for name, x in fitted.tensors.items():
        if x.is_floating_point() and not x.isfinite().all():
            raise KvcliError(f"{name} is not finite: the calibration text gives keys or values that are not.")


def again(artifact: Artifact, plan: CachePlan) -> tuple[CachePlan, dict[str, Tensor]]:
    """Return another plan for an artifact's model with the artifact's kind of predictors, refitted, and all tensors.

    An artifact without predictors gives the plan and the tensors that it has.

    Raises
    ------
    InputError
        If the artifact has predictors and not, or not whole, the moments they were fitted to.
    """
    stated = artifact.report.get("adapters")
    if stated is None:
        return plan, artifact.tensors()
    path = artifact.path / MOMENTS
    if not path.is_file():
        raise InputError(f"{path} is missing: without it the predictors cannot be refitted.")
    try:
        settings = AdapterSettings(**stated["settings"])
        ridges = {str(name): float(x) for name, x in stated["ridge"].items()}
        moments = Moments.from_tensors(load_file(path))
        plan = settings.applied(plan)
        fitted = aqua_kv.fit(plan, Statistics(moments, Moments()), ridges)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, InputError) as error:
        raise InputError(f"{artifact.path.name} holds no usable statistics of its predictors: {error}.") from None
    means = {name: x for name, x in artifact.tensors().items() if name.endswith(".mean")}
    return plan, {**means, **fitted.tensors}
