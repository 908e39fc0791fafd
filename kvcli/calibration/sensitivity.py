"""Sensitivity of a model to how each layer's keys and values are stored, and to what all layers share.

After KVTuner (Li et al., 2025, arXiv:2502.04420): sensitivities are measured layer by layer on captured attention.
Departure: the loss is the KL divergence of the model's output distribution, measured end to end for one format per
layer and tensor, and carried over to the other formats by their attention output error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvcli.calibration.capture import Attention, layer_inputs, plain_cache, run_layers
from kvcli.calibration.space import SearchSpace, Setting, fits
from kvcli.models.architectures import Rope
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.attention import visible
from kvcli.runtime.packed_cache import PackedCache, StoredLayer
from kvcli.runtime.packed_layer import PackedLayer

Which = Literal["k", "v"]
TENSORS: tuple[Which, Which] = ("k", "v")
BASE = Setting(block_size=16, sink_tokens=4, residual_window=0)  # under which layers are compared
MIN_KL = 1e-12  # nats; below this a measurement is rounding


@dataclass
class Sensitivity:
    """What was measured, enough to solve for any budget without the model.

    Attributes
    ----------
    space, geometry, dtype
        Candidates, the model's layers (in exact formats), compute dtype.
    error
        ``error[which][layer][format]``: squared relative error of the attention output, ‖ô - o‖² / ‖o‖².
    kl
        ``kl[which][layer][format]``: mean KL in nats a token that this choice alone costs.
    measured
        ``measured[which]``: the format that was measured end to end, and its KL in every layer.
    ratio
        Per setting, what it multiplies the loss by, relative to :data:`BASE`.
    """

    space: SearchSpace
    geometry: list[LayerPlan]
    dtype: str
    error: dict[Which, list[list[float]]]
    kl: dict[Which, list[list[float]]]
    measured: dict[Which, dict[str, Any]]
    ratio: dict[Setting, float]

    @classmethod
    def unmeasured(cls, space: SearchSpace, geometry: list[LayerPlan], dtype: str) -> Sensitivity:
        """Return a stand-in where nothing costs anything: enough to ask which budgets can be met."""
        free: dict[Which, list[list[float]]] = {
            "k": [[0.0] * len(space.k)] * len(geometry), "v": [[0.0] * len(space.v)] * len(geometry),
        }  # fmt: skip
        return cls(space, geometry, dtype, free, free, {}, dict.fromkeys(space.settings(), 1.0))

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON."""
        return {
            "space": self.space.to_json(),
            "geometry": [x.to_json() for x in self.geometry],
            "dtype": self.dtype,
            "error": self.error, "kl": self.kl, "measured": self.measured,
            "ratio": [{**asdict(s), "ratio": r} for s, r in self.ratio.items()],
        }  # fmt: skip

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Sensitivity:
        """Rebuild from :meth:`to_json`; raise ValueError, TypeError or KeyError if the parts do not fit together."""
        found = cls(
            SearchSpace.from_json(obj["space"]), [LayerPlan.from_json(x) for x in obj["geometry"]], obj["dtype"],
            obj["error"], obj["kl"], obj["measured"],
            {Setting(*(r[f] for f in Setting.__dataclass_fields__)): r["ratio"] for r in obj["ratio"]},
        )  # fmt: skip
        widths: dict[Which, int] = {"k": len(found.space.k), "v": len(found.space.v)}
        for table in (found.error, found.kl):
            for which, width in widths.items():
                if [len(row) for row in table[which]] != [width] * len(found.geometry):
                    raise ValueError("a table has another shape than the search space")
                if not all(math.isfinite(x) and x >= 0 for row in table[which] for x in row):
                    raise ValueError("a loss is not a number")
        if not found.ratio or not set(found.ratio) <= set(found.space.settings()):
            raise ValueError("the settings are not the search space's")
        if not all(math.isfinite(x) and x >= 0 for x in found.ratio.values()):
            raise ValueError("a ratio is not a number")
        return found


def anchor(formats: tuple[KVFormat, ...]) -> int:
    """Return the format measured end to end: the first listed of the second smallest lossy width, or of the only one.

    Its loss is far above rounding, and yet small enough for the second order to hold.
    """
    widths = sorted({f.bits for f in formats if not f.is_exact} or {f.bits for f in formats})
    width = widths[min(1, len(widths) - 1)]
    return next(i for i, f in enumerate(formats) if f.bits == width)


def output_errors(
    attention: Attention, plan: CachePlan, index: int, which: Which, formats: tuple[KVFormat, ...], rope: Rope,
    tensors: Mapping[str, Tensor],
) -> list[float]:  # fmt: skip
    """Squared relative error of one layer's attention output for each candidate format of one tensor.

    The layer reads packed and exact tokens as decoding does; only the second half of the queries counts. The other
    tensor stays exact, and the layer's inputs are the exact model's: errors do not accumulate.
    """
    tokens = attention.key.shape[2]
    positions = torch.arange(tokens, device=attention.key.device)
    queries = positions[tokens // 2 :]
    heads = attention.key.shape[1]
    query = attention.query[:, :, tokens // 2 :].unflatten(1, (heads, -1)).float()
    key, value = attention.key.float(), attention.value.float()
    scores = torch.einsum("bhgtd,bhsd->bhgts", query, key) * attention.scaling

    def layer_with(fmt: KVFormat) -> PackedLayer:
        changed = plan.with_layer(index, plan.layers[index].with_format(which, fmt))
        return PackedLayer(changed, index, rope=rope, tensors=tensors, device=key.device)

    probe = layer_with(next((f for f in formats if not f.is_exact), formats[0]))  # exact layers see no packed token
    packed = visible(positions, queries, probe, "packed")
    seen = packed | visible(positions, queries, probe, "exact") | visible(positions, queries, probe, "sinks")
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    norm = torch.einsum("bhgts,bhsd->bhgtd", weights, value).square().sum()
    out = []
    for fmt in formats:
        codec = layer_with(fmt).codec
        exact = (key if which == "k" else value).to(codec.exact_dtype)
        padded = torch.nn.functional.pad(exact, (0, 0, 0, -tokens % plan.block_size))
        slots = torch.arange(padded.shape[2], device=key.device)
        rebuilt = codec.decode(which, codec.encode(which, padded, slots), slots)[:, :, :tokens].float()
        if which == "v":
            delta = torch.einsum("bhgts,bhsd->bhgtd", weights * packed, rebuilt - value)
        else:
            mixed = torch.einsum("bhgtd,bhsd->bhgts", query, rebuilt) * attention.scaling
            mixed = torch.where(packed, mixed, scores).masked_fill(~seen, -math.inf).softmax(-1)
            delta = torch.einsum("bhgts,bhsd->bhgtd", mixed - weights, value)
        out.append(float(delta.square().sum() / norm))
    return out


def carry_over(error: list[float], at: int, kl: float) -> list[float]:
    """Extend the KL measured at one format to all, in proportion to their squared output error.

    KL is of second order in a small perturbation of the output, and so is the squared error.
    """
    return [max(kl, MIN_KL) * e / max(error[at], 1e-30) for e in error]


def mean_kl(reference: Tensor, log_probs: Tensor) -> float:
    """Mean over tokens of KL(reference‖other), in nats; both are [..., vocabulary] log-probabilities."""
    return float((reference.exp() * (reference - log_probs)).sum(-1).mean())


class Probe:
    """A model and a few windows on which what a choice costs is measured end to end.

    Parameters
    ----------
    model
        With attention ``kvcli``.
    ids
        [batch, tokens]; the second half of each window is scored.
    rope, tensors
        What the candidates' codecs need.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, rope: Rope, tensors: Mapping[str, Tensor]) -> None:
        self.model, self.ids, self.rope, self.tensors = model, ids, rope, tensors

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of the scored half from the final norm's output."""
        logits: Tensor = self.model.lm_head(hidden[:, hidden.shape[1] // 2 :])
        return logits.float().log_softmax(-1)

    def reference(self, plan: CachePlan) -> Tensor:
        """Log-probabilities of the exact model."""
        return self.log_probs(self._run(plain_cache(plan)))

    def _run(self, cache: Cache) -> Tensor:
        return run_layers(self.model, self.model.model.embed_tokens(self.ids), cache, 0)

    def kl_of_layer(self, plan: CachePlan, index: int, hidden: Tensor, reference: Tensor) -> float:
        """KL when one layer alone is stored as ``plan`` says; ``hidden`` is that layer's input."""
        batch, tokens = self.ids.shape
        cache = plain_cache(plan)
        cache.layers[index] = StoredLayer(
            PackedLayer(plan, index, batch_size=batch, capacity=tokens, rope=self.rope, tensors=self.tensors)
        )
        return mean_kl(reference, self.log_probs(run_layers(self.model, hidden, cache, index)))

    def kl_of(self, plan: CachePlan, reference: Tensor) -> float:
        """KL of a whole plan."""
        batch, tokens = self.ids.shape
        cache = PackedCache(plan, batch_size=batch, capacity=tokens, rope=self.rope, tensors=self.tensors)
        return mean_kl(reference, self.log_probs(self._run(cache)))


def measure_layers(
    probe: Probe, space: SearchSpace, geometry: list[LayerPlan], dtype: str, step: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Measure every layer's errors and its KL at one format, and carry the KL over.

    Returns ``error``, ``kl`` and ``measured`` of :class:`Sensitivity`. ``step`` is called once a layer.
    """
    exact = KVFormat.exact()
    plain = space.plan([space.layer(x, exact, exact) for x in geometry], BASE, dtype)
    reference = probe.reference(plain)
    formats: dict[Which, tuple[KVFormat, ...]] = {"k": space.k, "v": space.v}
    at = {which: anchor(formats[which]) for which in TENSORS}
    error: dict[Which, list[list[float]]] = {"k": [], "v": []}
    kl: dict[Which, list[list[float]]] = {"k": [], "v": []}
    measured: dict[Which, dict[str, Any]] = {w: {"format": formats[w][at[w]].to_json(), "kl": []} for w in TENSORS}
    for i, hidden, attention in layer_inputs(probe.model, plain, probe.ids):
        for which in TENSORS:
            candidates = formats[which]
            block = max([BASE.block_size, *(f.group for f in candidates if f.axis == "channel" and not f.is_exact)])
            base = replace(plain, block_size=block)
            errors = output_errors(attention, base, i, which, candidates, probe.rope, probe.tensors)
            plan = base.with_layer(i, plain.layers[i].with_format(which, candidates[at[which]]))
            found = probe.kl_of_layer(plan, i, hidden, reference)
            measured[which]["kl"].append(found)
            error[which].append(errors)
            kl[which].append(carry_over(errors, at[which], found))
        step()
    return {"error": error, "kl": kl, "measured": measured}


def measure_settings(
    probe: Probe, space: SearchSpace, geometry: list[LayerPlan], dtype: str, step: Callable[[], None] = lambda: None
) -> dict[Setting, float]:
    """Measure how sinks, window and page size change the loss of a uniform plan, relative to :data:`BASE`.

    Sinks are taken to act independently of the exact tail (window and page), so each is measured with the other at its
    base. The uniform plan stores everything in the formats measured end to end. ``step`` is called once a measurement.
    """
    base = BASE if BASE.block_size in space.block_sizes else replace(BASE, block_size=min(space.block_sizes))
    # pages are powers of two, so what fits the smallest fits them all
    k, v = (tuple(f for f in formats if fits(f, min(space.block_sizes))) for formats in (space.k, space.v))
    layers = [space.layer(x, k[anchor(k)], v[anchor(v)]) for x in geometry]
    reference = probe.reference(space.plan(layers, base, dtype))
    known: dict[Setting, float] = {}

    def kl(setting: Setting) -> float:
        if setting not in known:
            known[setting] = max(probe.kl_of(space.plan(layers, setting, dtype), reference), MIN_KL)
            step()
        return known[setting]

    out = {}
    for setting in space.settings():
        tail = kl(replace(base, block_size=setting.block_size, residual_window=setting.residual_window))
        sinks = kl(replace(base, sink_tokens=setting.sink_tokens))
        out[setting] = tail / kl(base) * sinks / kl(base)
    return out
