"""AQUA-KV: keys and values predicted from what is already reconstructed, so that only residuals need bits.

After Shutova et al., 2025 (arXiv:2501.19392): linear predictors with a bias, ridge regression in closed form, keys
before RoPE (after any QK-norm), all heads side by side. Departures:

- Which tensors a prediction reads is part of the plan (:func:`design`). The paper's are a layer's keys from the keys of
  the layer before, and its values from its own keys and the values before. Ours read keys and values (``both``) of
  several earlier layers (``depth``): together they tell more of the residual stream that this layer's are made from.
- ``absorbed`` predicts values from their own layer's keys alone: then attention can be computed from codes, and the
  weight applied once to the sum over them.
- The ridge is chosen on held-out text, see :func:`kvcli.calibration.moments.ridge_regression`.
- :func:`fit_in_order` is the paper's way, on reconstructions layer by layer. :func:`fit` needs no model: it solves from
  the exact model's moments, with the error of quantisation added as noise that is white within a head, for that is
  where a rotation spreads it. Leaving the noise out is no option: keys have directions of hardly any variance, which
  it fills, and predictors of exact keys weigh those directions most.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvcli.calibration.capture import Attention, PlainLayer, embed, layer_inputs, plain_cache, run_layer
from kvcli.calibration.moments import Moments, Solution, ridge_regression
from kvcli.errors import UsageError
from kvcli.models.loading import LoadedModel
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.quant.linear_maps import factored, store
from kvcli.quant.prediction import Linear, Predictor, Source, Which
from kvcli.quant.quantizer import dequantize, quantize
from kvcli.runtime.codec import Codec

Mode = Literal["none", "absorbed", "always"]
MODES: tuple[Mode, ...] = ("none", "absorbed", "always")
WHICH: tuple[Which, Which] = ("k", "v")
DEPTH = 2  # two layers' keys and values are wider than the residual stream of most models
SKIP = 4  # first tokens of a window, which are unlike all others and which plans keep exact
HELD_OUT = 8  # of so many windows one chooses the ridge


def design(
    layers: Sequence[LayerPlan], mode: Mode, *, depth: int = DEPTH, back: int = 1, star: bool = False,
    both: bool = True, bits: int = 16, rank: int | None = None, early: Collection[int] = (),
) -> list[LayerPlan]:  # fmt: skip
    """Return layers with their predictors.

    Parameters
    ----------
    layers
        In order; tensors in exact formats are left alone, and so are other kinds of layers.
    mode
        ``none``; ``absorbed``, values from their own keys; ``always``, keys from the anchors, values from their own
        keys and the anchors.
    depth
        How many earlier layers of the same kind are read: the anchor and those before it.
    back
        How far back, among layers of the same kind, the anchor is. A layer without one has its values absorbed.
    star
        Instead of a chain, every ``back``-th layer is the anchor of those until the next, and has none itself.
    both
        Whether keys and values of the anchors are read, or only their keys for keys and their values for values.
    bits, rank
        How predictors are stored.
    early
        Layers that pack a token at once, and so read none that wait for a block: a plan's portable ones.

    Raises
    ------
    UsageError
        If there is no such mode, or ``back`` or ``depth`` is not positive.
    """
    if mode not in MODES:
        raise UsageError(f"--adapters {mode} is not one of {', '.join(MODES)}.")
    if back < 1 or depth < 1:
        raise UsageError("an anchor is at least one layer back, and at least one layer is read.")
    seen: dict[tuple[object, ...], list[int]] = {}
    out = []
    for i, layer in enumerate(layers):
        alike = seen.setdefault((layer.kind, layer.window), [])
        step = len(alike) % back if star else back
        stop = max(0, len(alike) - step + 1) if step and mode == "always" else 0
        anchors = [x for x in alike[max(0, stop - depth) : stop][::-1] if i not in early or x in early]
        alike.append(i)
        k = [Source(a, w) for a in anchors for w in WHICH if both or w == "k"]
        v = [Source(i, "k"), *(Source(a, w) for a in anchors for w in WHICH if both or w == "v")]
        out.append(
            replace(
                layer,
                predictor=None if mode == "none" else _predictor(layer, k, v, bits=bits, rank=rank),
                rope="before" if mode == "always" else layer.rope,
            )
        )
    return out


def _predictor(
    layer: LayerPlan, k: list[Source], v: list[Source], *, bits: int, rank: int | None
) -> Predictor | None:  # fmt: skip
    def linear(which: Which, inputs: list[Source]) -> Linear | None:
        if not inputs or (layer.k if which == "k" else layer.v).is_exact:
            return None
        return Linear(tuple(inputs), bits=bits, rank=None if rank is None else min(rank, layer.width))

    found = Predictor(linear("k", k), linear("v", v))
    return None if found == Predictor() else found


# --- statistics ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """The exact model's moments on two texts: what predictors are fitted to, and what the ridge is chosen on."""

    train: Moments
    held_out: Moments


def _pairs(plan: CachePlan) -> dict[int, list[tuple[str, str]]]:
    """Return by layer the products that fitting the plan's predictors needs, each listed with the later layer."""
    out: dict[int, list[tuple[str, str]]] = {i: [] for i in range(len(plan.layers))}
    known = set()
    for target, linear in predictions(plan):
        sources = sorted({*linear.inputs, target})
        for i, a in enumerate(sources):
            for b in sources[i:]:
                if (a, b) not in known:
                    known.add((a, b))
                    out[b.layer].append((str(a), str(b)))
    return out


def predictions(plan: CachePlan) -> Iterator[tuple[Source, Linear]]:
    """Yield what is predicted, in the order in which it is reconstructed."""
    for i, layer in enumerate(plan.layers):
        if layer.predictor is not None:
            for which, linear in (("k", layer.predictor.k), ("v", layer.predictor.v)):
                if linear is not None:
                    yield Source(i, "k" if which == "k" else "v"), linear


def _last_reads(plan: CachePlan) -> dict[int, int]:
    """Return, for every layer that is read, the last layer that reads it."""
    return {x.layer: target.layer for target, linear in predictions(plan) for x in linear.inputs}


def _flat(loaded: LoadedModel, seen: Attention) -> dict[Which, Tensor]:
    """Return one window's keys before RoPE and values, [tokens, width] float32."""
    positions = torch.arange(seen.key.shape[2], device=seen.key.device)
    k = loaded.rope.to(seen.key.device).unrotate(seen.key, positions)
    return {"k": k[0].transpose(0, 1).flatten(1), "v": seen.value[0].float().transpose(0, 1).flatten(1)}


def split(windows: int, tokens: int) -> list[list[tuple[bool, slice]]]:
    """Return, for every window, which tokens train and which are held out: [(is held out, tokens)].

    One window in :data:`HELD_OUT` is held out, the second, tenth, …; of a single window, its end.
    """
    skip = min(SKIP, tokens // 2)
    if windows > 1:
        return [[(i % HELD_OUT == 1, slice(skip, tokens))] for i in range(windows)]
    border = tokens - max(1, (tokens - skip) // HELD_OUT)
    return [[(False, slice(skip, border)), (True, slice(border, tokens))]]


@torch.no_grad()
def statistics(
    loaded: LoadedModel, plan: CachePlan, ids: Tensor, step: Callable[[], None] = lambda: None
) -> Statistics:  # fmt: skip
    """Stream windows through the exact model and sum up what fitting the plan's predictors needs.

    Parameters
    ----------
    loaded
        The model, its attention switched to ``kvcli``.
    plan
        Of it only geometry and predictors matter.
    ids
        [windows, tokens].
    step
        Called once a window.
    """
    exact, pairs, last = plan.as_exact(), _pairs(plan), _last_reads(plan)
    found = Statistics(Moments(), Moments())
    parts: dict[tuple[int, bool], Moments] = {}
    for window, use in zip(ids, split(*ids.shape), strict=True):
        held: dict[str, Tensor] = {}
        for i, _, seen in layer_inputs(loaded.model, exact, window[None]):
            if pairs[i] or i in last:
                held |= {f"{i}.{w}": x for w, x in _flat(loaded, seen).items()}
                for is_held_out, tokens in use:
                    wanted = {name: x[tokens].cpu() for name, x in held.items() if _names(pairs[i], name)}
                    if wanted:
                        parts.setdefault((i, is_held_out), Moments()).add(wanted, pairs[i])
            held = {name: x for name, x in held.items() if last.get(int(name.split(".")[0]), -1) > i}
        step()
    for (_, is_held_out), part in parts.items():
        total = found.held_out if is_held_out else found.train
        total.count = part.count
        total.sums |= part.sums
        total.products |= part.products
    return found


def _names(pairs: list[tuple[str, str]], name: str) -> bool:
    return any(name in pair for pair in pairs)


# --- fitting ------------------------------------------------------------------------------------------------------


@dataclass
class Fitted:
    """Predictors, and how well they predict.

    Attributes
    ----------
    tensors
        ``layer.{i}.{k|v}.predictor.…``.
    left
        By tensor (``3.v``), the share of variance that is left on held-out text, from exact inputs or, fitted in order,
        from reconstructions.
    ridge
        By tensor, the ridge that was chosen.
    """

    tensors: dict[str, Tensor]
    left: dict[str, float]
    ridge: dict[str, float]

    def keep(self, target: Source, linear: Linear, found: Solution, inputs: Tensor) -> dict[str, Tensor]:
        """Store one solution as the plan says; ``inputs`` is the covariance of what it reads."""
        parts = {"weight": found.weight}
        if linear.rank is not None:
            left, right = factored(found.weight, linear.rank, inputs)
            parts = {"left": left, "right": right}
        prefix = f"layer.{target.layer}.{target.which}.predictor."
        kept = {prefix + name: x.cpu() for name, x in store(linear, parts, found.bias).items()}
        self.tensors |= kept
        self.left[str(target)], self.ridge[str(target)] = found.left, found.ridge
        return kept


@cache
def distortion(fmt: KVFormat) -> float:
    """Return the share of a normal variable's variance that a format loses."""
    if fmt.is_exact:
        return 0.0
    shape = (1, 1024, 4 * fmt.group) if fmt.axis == "token" else (1, 64 * fmt.group, 64)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return float((x - dequantize(quantize(x, fmt), fmt)).square().sum() / x.square().sum())


def noise(layer: LayerPlan, which: str, power: Tensor) -> Tensor:
    """Return the variances [width] of what quantising adds to a tensor, from the power of what is quantised, [width].

    Channels that share a scale share the error too, and all of a head where it is rotated.
    """
    fmt: KVFormat = layer.k if which == "k" else layer.v
    heads = power.view(layer.num_kv_heads, layer.head_dim)
    if not fmt.is_exact and fmt.axis == "token":
        group = layer.head_dim if layer.transform != "none" else fmt.group
        heads = heads.unflatten(1, (-1, group)).mean(-1, keepdim=True).expand(-1, -1, group)
    return distortion(fmt) * heads.flatten()


def fit(plan: CachePlan, found: Statistics, ridges: Mapping[str, float] | None = None) -> Fitted:
    """Fit every predictor of a plan in closed form, and without the model: for any bits, from the same moments.

    ``ridges`` are those of an earlier fit, by tensor; then nothing is held out.
    """
    out = Fitted({}, {}, {})
    wanted = dict(predictions(plan))
    read = {x for linear in wanted.values() for x in linear.inputs}
    errors: dict[Source, Tensor] = {}
    for target in sorted(read | wanted.keys()):
        name, layer, linear = str(target), plan.layers[target.layer], wanted.get(target)
        if linear is not None:
            names = [str(x) for x in linear.inputs]
            added = torch.cat([errors[x] for x in linear.inputs])
            ridge = None if ridges is None else ridges[name]
            solution = ridge_regression(found.train, found.held_out, names, name, added, ridge)
            out.keep(target, linear, solution, found.train.covariance(names, names) + added.diag())
            power = solution.residual
        else:
            power = found.train.covariance([name], [name]).diagonal()
            if not layer.center:
                power = power + found.train.mean([name]).square()
        errors[target] = noise(layer, target.which, power)
    return out


@torch.no_grad()
def fit_in_order(
    loaded: LoadedModel, plan: CachePlan, ids: Tensor, means: Mapping[str, Tensor],
    step: Callable[[], None] = lambda: None,
) -> Fitted:  # fmt: skip
    """Fit every predictor on reconstructions of what it reads, layer by layer, at the plan's bits.

    Hidden states are the unquantised model's. All windows of the layers that are still read are in memory at once.

    Parameters
    ----------
    loaded
        The model, its attention switched to ``kvcli``.
    plan
        With formats and predictors.
    ids
        [windows, tokens].
    means
        ``layer.{i}.{k|v}.mean`` of centred layers.
    step
        Called once a layer.
    """
    out = Fitted({}, {}, {})
    last, exact = _last_reads(plan), plan.as_exact()
    hidden = [embed(loaded.model, window[None]) for window in ids]
    rebuilt: list[dict[Source, Tensor]] = [{} for _ in ids]
    for i, layer in enumerate(plan.layers):
        seen: list[Attention] = []
        for w, x in enumerate(hidden):
            cache = plain_cache(exact)
            cache.layers[i] = PlainLayer(layer.window, seen.append)
            hidden[w] = run_layer(loaded.model, x, cache, i)
        flats = [_flat(loaded, x) for x in seen]
        for which in ("k", "v"):
            target = Source(i, "k" if which == "k" else "v")
            linear = None if layer.predictor is None else layer.predictor.of(which)
            if linear is not None:
                _fit_one(out, linear, target, flats, rebuilt, tuple(ids.shape))
            if i in last:
                codec = _codec_of(plan, i, loaded, {**means, **out.tensors}, which)
                for attention, past in zip(seen, rebuilt, strict=True):
                    past[target] = _reconstruct(codec, target.which, attention, linear, past, plan.block_size)
        for past in rebuilt:
            for source in [x for x in past if last[x.layer] <= i]:
                del past[source]
        step()
    return out


def _fit_one(
    out: Fitted, linear: Linear, target: Source, flats: list[dict[Which, Tensor]], rebuilt: list[dict[Source, Tensor]],
    shape: tuple[int, ...],
) -> None:  # fmt: skip
    names, pairs = _local_pairs(linear)
    parts = {False: Moments(), True: Moments()}
    for flat, past, use in zip(flats, rebuilt, split(*shape), strict=True):
        for is_held_out, tokens in use:
            here = {name: past[x][tokens].cpu() for name, x in zip(names, linear.inputs, strict=True)}
            parts[is_held_out].add({**here, "target": flat[target.which][tokens].cpu()}, pairs)
    solution = ridge_regression(parts[False], parts[True], names, "target")
    out.keep(target, linear, solution, parts[False].covariance(names, names))


def _local_pairs(linear: Linear) -> tuple[list[str], list[tuple[str, str]]]:
    names = [str(x) for x in linear.inputs]
    every = [*names, "target"]
    return names, [(a, b) for i, a in enumerate(every) for b in every[i:]]


def _codec_of(plan: CachePlan, index: int, loaded: LoadedModel, tensors: Mapping[str, Tensor], which: str) -> Codec:
    """Return the codec of one layer; for keys one that leaves values alone, whose predictor has yet to be fitted."""
    layer = plan.layers[index]
    if which == "k" and layer.predicts("v"):
        predictor = None if layer.predictor is None or layer.predictor.k is None else Predictor(k=layer.predictor.k)
        plan = plan.with_layer(index, replace(layer, v=KVFormat.exact(), predictor=predictor))
    return Codec(plan, index, loaded.rope, tensors)


def _reconstruct(
    codec: Codec, which: Which, seen: Attention, linear: Linear | None, past: Mapping[Source, Tensor], block: int
) -> Tensor:
    """Return what pages would decode to, as predictors see it: [tokens, width] float32, keys before RoPE."""
    x = (seen.key if which == "k" else seen.value)[0].to(codec.exact_dtype)
    tokens = x.shape[1]
    padding = -tokens % block
    slots = torch.arange(tokens + padding, device=x.device)
    predicted = None
    if linear is not None:
        flat = codec.maps[which](torch.cat([past[source] for source in linear.inputs], 1))
        predicted = pad(flat.unflatten(1, (x.shape[0], -1)).transpose(0, 1), (0, 0, 0, padding))
    sections = codec.encode(which, pad(x, (0, 0, 0, padding)), slots, predicted)
    y = codec.decode(which, sections, slots, predicted)[:, :tokens]
    y = codec.before_rope(y, slots[:tokens]) if which == "k" else y.float()
    return y.transpose(0, 1).flatten(1)
