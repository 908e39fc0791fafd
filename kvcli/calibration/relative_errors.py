"""The relative errors of KVTuner: what a pair of formats does to a layer's keys, values, weights and output.

After Li et al., arXiv:2502.04420, whose search (:mod:`kvcli.calibration.kvtuner`) starts from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kvcli.calibration.capture import Attention, layer_inputs
from kvcli.calibration.sensitivity import TENSORS, Probe, Which
from kvcli.calibration.space import SearchSpace, Setting, fits
from kvcli.errors import InputError
from kvcli.models.architectures import Rope
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.attention import visible
from kvcli.runtime.packed_layer import PackedLayer

Pair: TypeAlias = tuple[int, int]  # of the space's formats: which of the keys', which of the values'

SCORE_BYTES = 2**25  # of one matrix of scores; about six are held at once
TINY = 1e-30  # what is zero throughout has no error, and no relative one either


@dataclass(frozen=True)
class RelativeErrors:
    """The paper's four errors of every layer and pair of formats.

    Attributes
    ----------
    setting
        Page size, sinks and window under which they were measured.
    pairs
        Which formats of the space.
    key, value, attention, output
        e_k, e_v, e_a and e_o, each ``[layer][pair]``.
    """

    setting: Setting
    pairs: list[Pair]
    key: list[list[float]]
    value: list[list[float]]
    attention: list[list[float]]
    output: list[list[float]]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> RelativeErrors:
        """Rebuild from :meth:`to_json`."""
        return cls(**{**obj, "setting": Setting(**obj["setting"]), "pairs": [(k, v) for k, v in obj["pairs"]]})


def pairs_of(space: SearchSpace, setting: Setting) -> list[Pair]:
    """Return every pair of a key's and a value's format that pages of this setting hold."""
    k, v = ([i for i, f in enumerate(x) if fits(f, setting.block_size)] for x in (space.k, space.v))
    return [(a, b) for a in k for b in v]


def measure(
    probe: Probe, space: SearchSpace, geometry: list[LayerPlan], setting: Setting, dtype: str,
    step: Callable[[], None] = lambda: None,
) -> RelativeErrors:  # fmt: skip
    """Measure e_k, e_v, e_a and e_o for every layer and pair.

    The queries are those of the second half of every window, each reading the cache as decoding reads it: what the
    setting leaves packed is quantised, the rest is exact. Every layer's inputs are the exact model's, so errors do not
    accumulate. One layer of one window is held at a time. ``step`` is called once a layer and window.

    Raises
    ------
    InputError
        If the windows are too short for anything to be read packed.
    """
    exact = KVFormat.exact()
    plan = space.plan([space.layer(x, exact, exact) for x in geometry], setting, dtype)
    pairs = pairs_of(space, setting)
    total = torch.zeros(4, len(geometry), len(pairs), dtype=torch.float64)
    for window in probe.ids:
        for i, _, seen in layer_inputs(probe.model, plan, window[None]):
            layers = [space.layer(geometry[i], space.k[k], space.v[v]) for k, v in pairs]
            total[:, i] += relative_errors(seen, plan, i, layers, probe.rope, probe.tensors)
            step()
    return RelativeErrors(setting, pairs, *(total / len(probe.ids)).tolist())


def relative_errors(
    attention: Attention, plan: CachePlan, index: int, layers: Sequence[LayerPlan], rope: Rope,
    tensors: Mapping[str, Tensor],
) -> Tensor:  # fmt: skip
    """Return e_k, e_v, e_a and e_o, float64 [4, layers], of one layer stored in each of several ways.

    With K̂ and V̂ what the cache returns, a and o the attention weights and output on the exact tensors, â and ô on
    what is read:

    - e_k = mean |K - K̂| / |K| and e_v = mean |V - V̂| / |V|, over every scalar that some query reads packed;
    - e_a = mean |a - â|, over every query and token it sees;
    - e_o = mean |o - ô| / |o|, over every scalar of every query's output.

    The division is guarded: |x| below the mean of |x| counts as the mean. Plain relative errors have no mean where
    values near zero are as likely as others. So guarded, the errors are as large as those the paper prints, for which
    the radius of its clustering was chosen.

    Parameters
    ----------
    attention
        Of one window: batch 1.
    plan, index
        Page size, sinks and window, and which layer this is.
    layers
        The layer with each pair of formats.
    rope, tensors
        What their codecs need.

    Raises
    ------
    InputError
        If no query reads anything packed.
    """
    exact = _Exact(attention)
    positions = exact.positions
    stores = [PackedLayer(plan.with_layer(index, x), index, rope=rope, tensors=tensors, device=positions.device)
              for x in layers]  # fmt: skip
    rebuilt = {(w, getattr(s.plan, w)): _as_stored(s, w, getattr(exact, w)) for s in stores for w in TENSORS}
    # which tokens are read packed depends on whether pages are filled token by token; â depends on that and on K
    alike: dict[tuple[bool, KVFormat], list[int]] = {}
    for i, store in enumerate(stores):
        alike.setdefault((store.cache_plan.is_portable(index), store.plan.k), []).append(i)

    chunks = exact.chunks()
    outputs = [exact.scores(queries, exact.k, stores[0]).softmax(-1) @ exact.v[:, None] for queries in chunks]
    mean_output = torch.cat(outputs, dim=2).abs().mean()
    errors = torch.zeros(4, len(layers), dtype=torch.float64)
    read = {portable: torch.zeros_like(positions, dtype=torch.bool) for portable, _ in alike}
    entries = 0
    for queries, output in zip(chunks, outputs, strict=True):
        scores = exact.scores(queries, exact.k, stores[0])
        weights = scores.softmax(-1)
        entries += int(scores.isfinite().sum())
        for (portable, k), members in alike.items():
            packed = visible(positions, queries, stores[members[0]], "packed")
            read[portable] |= packed.any(0)
            mixed = torch.where(packed, exact.scores(queries, rebuilt["k", k], stores[0]), scores).softmax(-1)
            errors[2, members] += float((mixed - weights).abs().sum())
            near = mixed.masked_fill(packed, 0) @ exact.v[:, None]
            mixed.masked_fill_(~packed, 0)
            for i in members:
                found = near + mixed @ rebuilt["v", stores[i].plan.v][:, None]
                errors[3, i] += float(_relative(found, output, mean_output).sum())
    errors[2] /= entries
    errors[3] /= sum(x.numel() for x in outputs)

    for i, store in enumerate(stores):
        slots = read[store.cache_plan.is_portable(index)]
        if not slots.any():
            raise InputError(f"windows of {len(positions)} tokens are too short: nothing in them is read packed.")
        for row, which in enumerate(TENSORS):
            x = getattr(exact, which)[:, slots]
            found = rebuilt[which, getattr(store.plan, which)][:, slots]
            errors[row, i] = float(_relative(found, x, x.abs().mean()).mean())
    return errors


class _Exact:
    """A layer's exact queries, keys and values of one window, in float32.

    Attributes
    ----------
    query
        [kv heads, group, tokens, head_dim].
    k, v
        [kv heads, tokens, head_dim].
    """

    def __init__(self, attention: Attention) -> None:
        self.k, self.v = attention.key[0].float(), attention.value[0].float()
        self.query = attention.query[0].unflatten(0, (len(self.k), -1)).float()
        self.scaling = attention.scaling
        self.positions = torch.arange(self.k.shape[1], device=self.k.device)

    def chunks(self) -> tuple[Tensor, ...]:
        """Positions of the queries that count, the second half, so many at once as bounds a matrix of scores."""
        tokens = len(self.positions)
        heads = self.query.shape[0] * self.query.shape[1]
        chunks: tuple[Tensor, ...] = self.positions[tokens // 2 :].split(max(1, SCORE_BYTES // (4 * heads * tokens)))
        return chunks

    def scores(self, queries: Tensor, keys: Tensor, layer: PackedLayer) -> Tensor:
        """Scores of some queries, [kv heads, group, queries, tokens]; -inf where the layer lets them see nothing."""
        parts = [visible(self.positions, queries, layer, part) for part in ("packed", "exact", "sinks")]
        scores = torch.einsum("hgtd,hsd->hgts", self.query[:, :, queries], keys) * self.scaling
        return scores.masked_fill_(~torch.stack(parts).any(0), -math.inf)


def _relative(found: Tensor, exact: Tensor, least: Tensor) -> Tensor:
    """Return |x - x̂| / max(|x|, least), elementwise."""
    return (found - exact).abs() / exact.abs().clamp(min=least.clamp(min=TINY))


def _as_stored(store: PackedLayer, which: Which, x: Tensor) -> Tensor:
    """Return [kv heads, tokens, head_dim] as the layer's pages give it back, float32."""
    tokens = x.shape[1]
    padded = torch.nn.functional.pad(x.to(store.codec.exact_dtype), (0, 0, 0, -tokens % store.layout.block_size))
    slots = torch.arange(padded.shape[1], device=x.device)
    return store.codec.decode(which, store.codec.encode(which, padded, slots), slots)[:, :tokens].float()
