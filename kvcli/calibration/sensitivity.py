"""Sensitivity of a model to how each layer's keys and values are stored, and to what all layers share.

After KVTuner (Li et al., 2025, arXiv:2502.04420): sensitivities are measured layer by layer on captured attention.
Departure: the loss is the KL divergence of the model's output distribution, measured end to end for one format per
layer and tensor, and carried over to the other formats by their attention output error.

Everything is measured by functions of a probe and a task, :func:`measure_layer` and :func:`measure_plan`, that return
plain JSON: tasks do not depend on one another, and may run in any order and anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvcli.calibration.capture import Attention, OnePassCache, device_of, embed, layer_inputs, plain_cache, run_layers
from kvcli.calibration.space import SearchSpace, Setting, fits
from kvcli.models.architectures import Rope
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.attention import visible
from kvcli.runtime.packed_cache import StoredLayer
from kvcli.runtime.packed_layer import PackedLayer

Which = Literal["k", "v"]
TENSORS: tuple[Which, Which] = ("k", "v")
# Under which layers are compared. Without an exact window, layers that look at their neighbours would seem to need the
# bits, which they do not behind one.
BASE = Setting(block_size=16, sink_tokens=4, residual_window=32)
MIN_KL = 1e-12  # nats; below this a measurement is rounding
QUERIES = 64  # whose scores are held at once
PARTS = 16
ROWS = 128  # tokens of a window whose distributions are compared at once


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
        Per setting, what it multiplies the loss by, relative to :func:`base_setting`.
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
    heads = attention.key.shape[1]
    key, value = attention.key.float(), attention.value.float()

    def layer_with(fmt: KVFormat) -> PackedLayer:
        changed = plan.with_layer(index, plan.layers[index].with_format(which, fmt))
        return PackedLayer(changed, index, rope=rope, tensors=tensors, device=key.device)

    rebuilt = []
    for fmt in formats:
        codec = layer_with(fmt).codec
        exact = (key if which == "k" else value).to(codec.exact_dtype)
        padded = torch.nn.functional.pad(exact, (0, 0, 0, -tokens % plan.block_size))
        slots = torch.arange(padded.shape[2], device=key.device)
        rebuilt.append(codec.decode(which, codec.encode(which, padded, slots), slots)[:, :, :tokens].float())
    probe = layer_with(next((f for f in formats if not f.is_exact), formats[0]))  # exact layers see no packed token
    norm, wrong = 0.0, [0.0] * len(formats)
    for queries in positions[tokens // 2 :].split(QUERIES):
        query = attention.query[:, :, queries].unflatten(1, (heads, -1)).float()
        packed = visible(positions, queries, probe, "packed")
        seen = packed | visible(positions, queries, probe, "exact") | visible(positions, queries, probe, "sinks")
        scores = torch.einsum("bhgtd,bhsd->bhgts", query, key) * attention.scaling
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        norm += float(torch.einsum("bhgts,bhsd->bhgtd", weights, value).square().sum())
        for i, stored in enumerate(rebuilt):
            if which == "v":
                delta = torch.einsum("bhgts,bhsd->bhgtd", weights * packed, stored - value)
            else:
                mixed = torch.einsum("bhgtd,bhsd->bhgts", query, stored) * attention.scaling
                mixed = torch.where(packed, mixed, scores).masked_fill(~seen, -math.inf).softmax(-1)
                delta = torch.einsum("bhgts,bhsd->bhgtd", mixed - weights, value)
            wrong[i] += float(delta.square().sum())
    return [x / norm for x in wrong]


def carry_over(error: list[float], at: int, kl: float) -> list[float]:
    """Extend the KL measured at one format to all, in proportion to their squared output error.

    KL is of second order in a small perturbation of the output, and so is the squared error.
    """
    return [max(kl, MIN_KL) * e / max(error[at], 1e-30) for e in error]


@dataclass(frozen=True)
class Cost:
    """What a choice costs, mean over the scored tokens, in nats.

    Attributes
    ----------
    kl
        KL(reference‖other).
    delta_nll
        By how much the loss on the text itself grows: the logarithm of how much perplexity is multiplied by.
    parts
        The KL in each of :data:`PARTS` stretches of the text, which tell a difference from noise.
    """

    kl: float
    delta_nll: float
    parts: list[float] = field(default_factory=list)

    def is_below(self, other: Cost) -> bool:
        """Whether the KL is lower by more than two standard errors of the difference, on the same text."""
        differences = [b - a for a, b in zip(self.parts, other.parts, strict=True)]
        return fmean(differences) > 2 * stdev(differences) / math.sqrt(len(differences))


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
        self._reference: list[Tensor] = []  # shared with the probes of other tensors, whoever needs it first
        self._walk: Iterator[tuple[int, Tensor, Attention]] = iter(())
        self._next = math.inf

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what can be computed again: a probe may be sent to another process."""
        return {**vars(self), "_reference": [], "_walk": iter(()), "_next": math.inf}

    def using(self, tensors: Mapping[str, Tensor]) -> Probe:
        """Return the same probe for codecs that need other tensors; the reference is not computed again."""
        other = Probe(self.model, self.ids, self.rope, tensors)
        other._reference = self._reference
        return other

    @property
    def scored_tokens(self) -> int:
        """How many tokens are scored."""
        return self._scored(self.ids).numel()

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities from the final norm's output, [..., vocabulary] in float32."""
        # torch batches the product of a slice, which is slower
        logits: Tensor = self.model.lm_head(hidden.contiguous())
        return logits.float().log_softmax(-1)

    def reference(self, plan: CachePlan) -> Tensor:
        """Log-probabilities of the exact model on the scored half; of the plan only the geometry is read."""
        if not self._reference:
            self._reference.append(self.log_probs(self._scored(self._run(plain_cache(plan)))))
        return self._reference[0]

    def _scored(self, hidden: Tensor) -> Tensor:
        return hidden[:, hidden.shape[1] // 2 :]

    def _run(self, cache: Cache) -> Tensor:
        return run_layers(self.model, embed(self.model, self.ids), cache, 0)

    def cost(self, plan: CachePlan, hidden: Tensor) -> Cost:
        """Compare the exact model's distributions with those of a final norm's output, a few tokens at a time."""
        nll, kl = 0.0, []
        targets = self._scored(self.ids)
        rows = zip(self.reference(plan).split(ROWS, 1), self._scored(hidden).split(ROWS, 1), strict=True)
        for i, (p, x) in enumerate(rows):
            q = self.log_probs(x)
            kl.append((p.exp() * (p - q)).sum(-1).double())
            came = targets[:, i * ROWS + 1 : (i + 1) * ROWS + 1, None].to(q.device)  # the last token predicts nothing
            here = [y[:, : came.shape[1]].gather(-1, came).double().sum() for y in (p, q)]
            nll += float(here[0] - here[1])
        each = torch.cat(kl, 1).flatten()
        parts = [float(x.mean()) for x in each.tensor_split(min(PARTS, len(each)))]
        return Cost(float(each.mean()), nll / max(1, targets.numel() - len(targets)), parts)

    def inputs_of(self, plan: CachePlan, index: int) -> tuple[Tensor, Attention]:
        """Return a layer's input in the exact model, and its attention; cheap when layers are asked for in order."""
        if index < self._next:
            self._walk = layer_inputs(self.model, plan, self.ids)
        for at, hidden, attention in self._walk:
            self._next = at + 1
            if at == index:
                return hidden, attention
        raise IndexError(f"the model has no layer {index}")

    def cost_of_layer(self, plan: CachePlan, index: int, hidden: Tensor) -> Cost:
        """Cost when one layer alone is stored as ``plan`` says; ``hidden`` is that layer's input."""
        batch, tokens = self.ids.shape
        cache = plain_cache(plan)
        cache.layers[index] = StoredLayer(
            PackedLayer(
                plan, index, batch_size=batch, capacity=tokens, rope=self.rope, tensors=self.tensors,
                device=hidden.device,
            )
        )  # fmt: skip
        return self.cost(plan, run_layers(self.model, hidden, cache, index))

    def cost_of(self, plan: CachePlan) -> Cost:
        """Cost of a whole plan."""
        batch, tokens = self.ids.shape
        stored = [
            StoredLayer(
                PackedLayer(
                    plan, i, batch_size=batch, capacity=tokens, rope=self.rope, tensors=self.tensors,
                    device=device_of(layer),
                )
            )
            for i, layer in enumerate(self.model.model.layers)
        ]  # fmt: skip
        for x in stored:
            x.store.connect([y.store for y in stored])
        return self.cost(plan, self._run(OnePassCache(list(stored))))


def measure_plan(probe: Probe, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a whole plan, as plain JSON, costs end to end: the fields of :class:`Cost`."""
    return asdict(probe.cost_of(CachePlan.from_json(dict(plan))))


def measure_layer(
    probe: Probe, space: SearchSpace, geometry: list[LayerPlan], dtype: str, index: int
) -> dict[str, dict[Which, Any]]:
    """Measure one layer alone, for its keys and for its values.

    Returns ``error``, of every format as by :func:`output_errors`, and of the one format of :func:`anchor` the fields
    of :class:`Cost`, each for ``k`` and ``v``.
    """
    exact = KVFormat.exact()
    plain = space.plan([space.layer(x, exact, exact) for x in geometry], base_setting(space, geometry), dtype)
    out: dict[str, dict[Which, Any]] = {"error": {}, "kl": {}, "delta_nll": {}}
    hidden, attention = probe.inputs_of(plain, index)
    formats: dict[Which, tuple[KVFormat, ...]] = {"k": space.k, "v": space.v}
    for which, candidates in formats.items():
        block = max([BASE.block_size, *(f.group for f in candidates if f.axis == "channel" and not f.is_exact)])
        base = replace(plain, block_size=block)
        out["error"][which] = output_errors(
            attention, base, index, which, candidates, probe.rope, probe.tensors
        )  # fmt: skip
        layer = plain.layers[index].with_format(which, candidates[anchor(candidates)])
        found = probe.cost_of_layer(base.with_layer(index, layer), index, hidden)
        out["kl"][which], out["delta_nll"][which] = found.kl, found.delta_nll
    return out


def layer_costs(space: SearchSpace, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return ``error``, ``kl`` and ``measured`` of :class:`Sensitivity` from every layer's :func:`measure_layer`."""
    formats: dict[Which, tuple[KVFormat, ...]] = {"k": space.k, "v": space.v}
    at = {which: anchor(x) for which, x in formats.items()}
    error = {which: [x["error"][which] for x in layers] for which in TENSORS}
    return {
        "error": error,
        "kl": {w: [carry_over(e, at[w], x["kl"][w]) for e, x in zip(error[w], layers, strict=True)] for w in TENSORS},
        "measured": {
            w: {
                "format": formats[w][at[w]].to_json(),
                "kl": [x["kl"][w] for x in layers], "delta_nll": [x["delta_nll"][w] for x in layers],
            }
            for w in TENSORS
        },
    }  # fmt: skip


def setting_plans(space: SearchSpace, geometry: list[LayerPlan], dtype: str) -> dict[Setting, CachePlan]:
    """Return the uniform plans whose costs say what sinks, window and page size do.

    Sinks are taken to act independently of the exact tail (window and page), so each is measured with the other as in
    the first setting, :func:`base_setting`. Everything is stored in the formats that layers are measured with.
    """
    # pages are powers of two, so what fits the smallest fits them all
    k, v = (tuple(f for f in formats if fits(f, min(space.block_sizes))) for formats in (space.k, space.v))
    layers = [space.layer(x, k[anchor(k)], v[anchor(v)]) for x in geometry]
    base = base_setting(space, geometry)
    wanted = [base]
    for x in space.settings():
        wanted.append(replace(base, block_size=x.block_size, residual_window=x.residual_window))
        wanted.append(replace(base, sink_tokens=x.sink_tokens))
    return {x: space.plan(layers, x, dtype) for x in wanted}


def base_setting(space: SearchSpace, geometry: Sequence[LayerPlan]) -> Setting:
    """Return the setting under which layers are compared: :data:`BASE`, as far as the space and the model have it.

    The window is the widest candidate up to that of :data:`BASE`, or to a quarter of the narrowest sliding layer, which
    would see nothing packed behind a wider one.
    """
    block = BASE.block_size if BASE.block_size in space.block_sizes else min(space.block_sizes)
    widest = min([BASE.residual_window, *(x.window // 4 for x in geometry if x.window is not None)])
    window = max((x for x in space.residual_windows if x <= widest), default=min(space.residual_windows))
    return Setting(block, BASE.sink_tokens, window)


def setting_ratios(
    space: SearchSpace, geometry: Sequence[LayerPlan], kl: Mapping[Setting, float]
) -> dict[Setting, float]:  # fmt: skip
    """Return what each setting multiplies the loss by, relative to the base, from the KL of the plans measured."""
    base, at = base_setting(space, geometry), {setting: max(x, MIN_KL) for setting, x in kl.items()}
    out = {}
    for x in space.settings():
        tail = at[replace(base, block_size=x.block_size, residual_window=x.residual_window)]
        out[x] = tail / at[base] * at[replace(base, sink_tokens=x.sink_tokens)] / at[base]
    return out
