"""The measurements of a calibration as stages: layers, settings and whole plans, each a list of independent tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from kvcli.calibration import sensitivity
from kvcli.calibration.sensitivity import Cost, Probe, Sensitivity
from kvcli.calibration.space import SearchSpace
from kvcli.calibration.stages import Run, Stages
from kvcli.models.loading import LoadedModel
from kvcli.plan import CachePlan, LayerPlan

# What a layer costs differs more from one text to the next than within one: many short windows rather than a few long.
PROBE_TOKENS = 256
PROBE_WINDOWS = 6
# Settings and plans are compared on whole windows that no layer was measured on. Short ones would flatter the residual
# window, which covers a larger share of them, and a single one may be of a kind of text that attends to little else.
CHECK_WINDOWS = 2
SPREAD = 0.25  # of the true ratio from 1, over models and texts


@dataclass
class Measuring:
    """The stages that measure, for one model and search space.

    Attributes
    ----------
    loaded, tensors, space, geometry
        The model, what its codecs need, candidates, and layers in exact formats.
    stages
        Where results are kept.
    source
        What every result depends on: model, dtype and text.
    run
        Runs the tasks.
    """

    loaded: LoadedModel
    tensors: dict[str, Tensor]
    space: SearchSpace
    geometry: list[LayerPlan]
    stages: Stages
    source: dict[str, Any]
    run: Run
    _check: Probe | None = field(default=None, init=False)

    def probe(self, ids: Tensor) -> Probe:
        """Return the model on these windows."""
        return Probe(self.loaded.model, ids, self.loaded.rope, self.tensors)

    def check(self, ids: Tensor) -> Probe:
        """Return :func:`check_probe`, the same at every call, so that the exact model runs on it once."""
        if self._check is None:
            self._check = check_probe(self.loaded, ids, self.tensors)
        return self._check

    def costs(self, ids: Tensor) -> Sensitivity:
        """Measure layers and settings on the first windows."""
        inputs = [x["name"] for x in self.stages.record]
        space, dtype = self.space, self.loaded.dtype
        first = ids[:PROBE_WINDOWS, :PROBE_TOKENS]
        base = sensitivity.base_setting(space, self.geometry)
        shared = {**self.source, "space": space.to_json(), "base": vars(base)}
        layers = self.stages.map(
            "sensitivity", partial(sensitivity.measure_layer, self.probe(first), space, self.geometry, dtype),
            list(range(len(self.geometry))), description="sensitivity of each layer", inputs=inputs, run=self.run,
            settings={**shared, "windows": PROBE_WINDOWS, "tokens": PROBE_TOKENS},
        )  # fmt: skip
        plans = sensitivity.setting_plans(space, self.geometry, dtype)
        check = self.check(ids)
        measured = self.stages.map(
            "settings", partial(sensitivity.measure_plan, check), [x.to_json() for x in plans.values()],
            description="sinks, window and page size", inputs=inputs, run=self.run,
            settings={**shared, "windows": CHECK_WINDOWS, "tokens": ids.shape[1]},
        )  # fmt: skip
        kl = {setting: x["kl"] for setting, x in zip(plans, measured, strict=True)}
        ratio = sensitivity.setting_ratios(space, self.geometry, kl)
        found = sensitivity.layer_costs(space, layers)
        return Sensitivity(space, self.geometry, dtype, found["error"], found["kl"], found["measured"], ratio)

    def plans(self, name: str, probe: Probe, plans: Sequence[CachePlan], description: str) -> list[Cost]:
        """Measure plans end to end."""
        if not plans:
            return []
        found = self.stages.map(
            name, partial(sensitivity.measure_plan, probe), [x.to_json() for x in plans],
            description=description, inputs=[x["name"] for x in self.stages.record if x["name"] == "moments"],
            settings={**self.source, "windows": CHECK_WINDOWS, "tokens": probe.ids.shape[1]}, run=self.run,
        )  # fmt: skip
        return [Cost(**x) for x in found]


def check_probe(loaded: LoadedModel, ids: Tensor, tensors: Mapping[str, Tensor]) -> Probe:
    """Return the probe on which whole plans are compared: windows that no layer was measured on, if there are any."""
    rows = [(PROBE_WINDOWS + i) % len(ids) for i in range(min(CHECK_WINDOWS, len(ids)))]
    return Probe(loaded.model, ids[rows], loaded.rope, tensors)


def nll_per_kl(measured: Sequence[Cost], tokens: int) -> float:
    """Return by how much the loss on the text is expected to grow per nat of KL.

    Were the text the model's own, the two would be equal in the mean. On text of others the mean over n tokens strays
    by √(2 KL / n), which is far more than the KL itself where that is small, and strays alike for similar plans on the
    same tokens. So the measured ratio is drawn towards 1, by its variance 2 / (n KL) against :data:`SPREAD` squared.

    Parameters
    ----------
    measured
        Plans measured end to end on the same tokens.
    tokens
        How many tokens were scored.
    """
    kl = sum(x.kl for x in measured) / len(measured)
    delta_nll = sum(x.delta_nll for x in measured) / len(measured)
    weight = SPREAD**2 * tokens / 2
    return max(0.0, (weight * delta_nll + 1) / (weight * kl + 1))
