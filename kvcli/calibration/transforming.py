"""The stage of calibration that finds OSTQuant's transforms and fuses them: importance, start, learning, QSUR.

The model in memory is changed in place into an ordinary one that computes the same function; whatever comes after
(weights, means, the search) sees that model alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcli.calibration import fisher, learning, qsur
from kvcli.calibration.capture import embed, plain_cache, run_layers
from kvcli.calibration.corpora import Corpus
from kvcli.calibration.fusing import fuse, settle
from kvcli.calibration.learn_settings import LearnSettings
from kvcli.calibration.learning import Learner, Student
from kvcli.calibration.ostquant import identity, transforms
from kvcli.calibration.pipeline import exact_layers
from kvcli.calibration.qsur import Moments
from kvcli.calibration.stages import Show, Stages, Step, silent
from kvcli.calibration.womi import womi
from kvcli.errors import InputError, KvcliError, UsageError
from kvcli.models.loading import LoadedModel
from kvcli.plan import CachePlan
from kvcli.protocols import Transform, Which
from kvcli.quant.transforms import hadamard
from kvcli.runtime.packed_cache import ATTENTION

CHECKED = 128  # tokens on which the function is compared before and after
SPREAD = 4  # windows of which QSUR is taken, and means that are only counted from
# of the largest logit; a model is as sensitive to how its weights are rounded as its dtype is coarse
TOLERANCE = {"float64": 1e-6, "float32": 1e-3, "float16": 0.05, "bfloat16": 0.2}
WHICH: tuple[Which, Which] = ("k", "v")


def is_quantized(loaded: LoadedModel) -> bool:
    """Whether the model's linear layers are stored in few bits, so that nothing can be fused into them."""
    return loaded.quantized is not None or hasattr(loaded.model.config, "quantization_config")


def check(loaded: LoadedModel, settings: LearnSettings) -> CachePlan:
    """Return the cache that learning sees.

    Raises
    ------
    InputError
        If the model is quantised or the format does not fit it.
    UsageError
        If geoopt is not installed and is needed.
    """
    if is_quantized(loaded):
        raise InputError("Transforms fuse into unquantised weights, and the model's are quantised.")
    if settings.steps:
        learning.check_installed()
    return settings.plan(exact_layers(loaded), loaded.dtype)


def apply(
    loaded: LoadedModel,
    corpus: Corpus,
    settings: LearnSettings,
    out: Path,
    *,
    seed: int = 0,
    fresh: bool = False,
    show: Show = silent,
) -> tuple[dict[str, Any], dict[str, Tensor], list[dict[str, Any]]]:
    """Learn transforms on a corpus and fuse them into the model in memory.

    Finished stages, and unfinished learning, are kept beside ``out`` as those of the search are.

    Parameters
    ----------
    loaded
        Changed in place; its hash becomes another.
    corpus
        Its windows are cut into windows of ``settings.tokens``.
    settings
        What is learned, and how.
    out
        The artifact to be.
    seed
        Of everything random.
    fresh
        Forget what an earlier run left.
    show
        Makes progress displays.

    Returns
    -------
    tuple
        What ``report.json`` says under ``transforms``; the means to take off (``layer.{i}.{k|v}.mean``), none where
        nothing is centred; and the stages that ran.

    Raises
    ------
    InputError, UsageError
        As :func:`check`; and if there are fewer windows than are held out.
    KvcliError
        If learning diverges, or the fused model computes another function.
    """
    plan = check(loaded, settings)
    loaded.model.set_attn_implementation(ATTENTION)
    length = corpus.ids.shape[1] // settings.tokens * settings.tokens
    ids = corpus.ids[:, :length].reshape(-1, settings.tokens)[: settings.windows]
    if settings.steps and len(ids) <= settings.held_out:
        raise UsageError(f"{len(ids)} windows are too few to hold {settings.held_out} out and learn from the rest.")
    source = {"model": loaded.sha256, "dtype": loaded.dtype, "data": corpus.sha256, "seed": seed}
    shared = {**source, "learn": {k: v for k, v in settings.to_json().items() if k not in _OF_LEARNING}}
    # weighted means do not depend on the plain ones they are counted from, so these need little text
    few = ids[:SPREAD] if settings.means else ids
    spread_of = {**source, "windows": len(few), "tokens": ids.shape[1], "sinks": settings.sink_tokens}
    stages = Stages.beside(out, fresh=fresh, show=show)
    with stages:
        spread = stages.run(
            "spread", lambda step: _spread(loaded, plan, few, step),
            description="means and covariances", settings=spread_of, steps=len(few),
        )  # fmt: skip
        moments = _moments(spread, len(plan.layers))
        plain: list[dict[Which, Tensor]] = [{w: own[w].mean for w in WHICH} for own in moments]
        importance: list[dict[Which, fisher.Importance]] | None = None
        if settings.means or settings.start == "closed-form":
            found = stages.run(
                "importance", partial(_importance, loaded, plan, plain, ids, seed),
                description="importance of keys and values", settings=shared, inputs=["spread"], steps=len(ids),
            )  # fmt: skip
            importance = _unpacked(found, len(plan.layers))
        means = plain
        if settings.means and importance is not None:
            means = [{w: p[w] + x[w].mean for w in WHICH} for p, x in zip(plain, importance, strict=True)]
        whole = {**source, "learn": settings.to_json()}
        inputs = [x["name"] for x in stages.record]
        unfinished = stages.file("transforms", settings=whole, inputs=inputs, suffix=".unfinished")

        def learn(step: Step) -> dict[str, Tensor]:
            start = _start(loaded, settings, importance, seed)
            if not settings.steps:
                return {**start, "curve": torch.zeros(0), "held_out": torch.zeros(0, 2)}
            student = Student(loaded, plan, means, settings)
            result = Learner(student, start, ids, settings, seed=seed).run(unfinished, step)
            curves = {"curve": torch.tensor(result.curve), "held_out": torch.tensor(result.held_out)}
            return {**result.parameters, **curves}

        learned = stages.run(
            "transforms", learn, description="learning transforms", steps=settings.steps, settings=whole, inputs=inputs
        )  # fmt: skip
        unfinished.unlink(missing_ok=True)
    curve, held_out = learned.pop("curve"), learned.pop("held_out")
    settled = settle(loaded.model.config, learned)
    maps = transforms(loaded.model.config, settled)
    before = _logits(loaded, ids)
    added = fuse(loaded.model, maps)
    difference = float((_logits(loaded, ids) - before).abs().max() / before.abs().max())
    if not difference <= TOLERANCE[loaded.dtype]:
        raise KvcliError(f"The fused model computes another function: its logits differ by {difference:.2g}.")
    tensors = _mapped(means, maps) if settings.center else {}
    loaded.changes["transforms"] = {"settings": settings.to_json(), "sha256": _digest({**settled, **tensors})}
    report = {
        "settings": settings.to_json(), "curve": curve.tolist(),
        "held_out": [{"step": int(at), "loss": x} for at, x in held_out.tolist()],
        "qsur": _qsur(moments, plain, means, maps, plan), "logit_difference": difference, "untied_bytes": added,
    }  # fmt: skip
    return report, tensors, stages.record


#: What the importance of keys and values does not depend on.
_OF_LEARNING = frozenset({
    "maps", "format", "transform", "weights", "activations", "means", "start", "loss", "held_out", "steps", "batch",
    "rotation_rate", "scale_rate", "check_every", "patience",
})  # fmt: skip


def _spread(loaded: LoadedModel, plan: CachePlan, ids: Tensor, step: Step) -> dict[str, Tensor]:
    def windows() -> Any:
        for window in ids:
            yield window[None]
            step()

    found = qsur.kv_moments(loaded.model, plan, windows(), before=loaded.rope, skip=plan.sink_tokens)
    return {
        f"{i}.{which}.{name}": torch.as_tensor(x, dtype=torch.float64)
        for i, own in enumerate(found)
        for which in WHICH
        for name, x in vars(own[which]).items()
    }


def _moments(kept: Mapping[str, Tensor], layers: int) -> list[dict[Which, Moments]]:
    return [
        {w: Moments(kept[f"{i}.{w}.mean"], kept[f"{i}.{w}.scatter"], int(kept[f"{i}.{w}.count"])) for w in WHICH}
        for i in range(layers)
    ]


def _importance(
    loaded: LoadedModel, plan: CachePlan, means: Sequence[Mapping[Which, Tensor]], ids: Tensor, seed: int, step: Step
) -> dict[str, Tensor]:
    found = fisher.gather(loaded.model, loaded.rope, plan, means, ids, seed=seed, step=step)
    return {
        f"{i}.{which}.{name}": x
        for i, own in enumerate(found)
        for which in WHICH
        for name, x in vars(own[which]).items()
    }


def _unpacked(kept: Mapping[str, Tensor], layers: int) -> list[dict[Which, fisher.Importance]]:
    names = ("weight", "shift", "spread", "gradient")
    return [{w: fisher.Importance(*(kept[f"{i}.{w}.{x}"] for x in names)) for w in WHICH} for i in range(layers)]


def _start(
    loaded: LoadedModel,
    settings: LearnSettings,
    importance: Sequence[Mapping[Which, fisher.Importance]] | None,
    seed: int,
) -> dict[str, Tensor]:
    if settings.start == "womi":
        return womi(loaded.model, settings.maps, seed=seed)
    if settings.start == "closed-form" and importance is not None:
        return fisher.closed_form(loaded.model, importance, settings.maps)
    return identity(loaded.model.config, settings.maps)


def _mapped(means: Sequence[Mapping[Which, Tensor]], maps: Sequence[Transform]) -> dict[str, Tensor]:
    """Return the means as the fused model has them."""
    out = {}
    for i, own in enumerate(means):
        for which, mean in own.items():
            x = mean[:, None]
            for each in maps:
                x = each.forward(i, which, x)
            out[f"layer.{i}.{which}.mean"] = x[:, 0].float().contiguous()
    return out


def _qsur(
    moments: Sequence[Mapping[Which, Moments]],
    plain: Sequence[Mapping[Which, Tensor]],
    means: Sequence[Mapping[Which, Tensor]],
    maps: Sequence[Transform],
    plan: CachePlan,
) -> dict[str, Any]:
    """Return QSUR^(1/d) of what is quantised, per layer and head: without and with the transforms."""
    online = hadamard if plan.layers[0].transform == "hadamard" else None

    def centred(taken: Sequence[Mapping[Which, Tensor]]) -> list[dict[Which, Moments]]:
        keep = 1.0 if plan.layers[0].center else 0.0
        return [
            {w: Moments(own[w].mean - keep * off[w], own[w].scatter, own[w].count) for w in WHICH}
            for own, off in zip(moments, taken, strict=True)
        ]

    return {
        "before": qsur.report(centred(plain), online=online), "after": qsur.report(centred(means), maps, online=online),
    }  # fmt: skip


@torch.no_grad()
def _logits(loaded: LoadedModel, ids: Tensor) -> Tensor:
    """Return the logits of the exact model on the beginning of the first window."""
    exact = CachePlan(tuple(exact_layers(loaded)), dtype=loaded.dtype)
    hidden = run_layers(loaded.model, embed(loaded.model, ids[:1, :CHECKED]), plain_cache(exact), 0)
    out: Tensor = loaded.model.lm_head(hidden).double()
    return out


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
