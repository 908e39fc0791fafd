"""Attention where layers are predicted from earlier ones: each is rebuilt, in order, at every pass.

After AQUA-KV (Shutova et al., 2025, arXiv:2501.19392). Pages hold residuals. The kernels decode them, with the
predictor's bias, into keys before RoPE and values side by side, and matrix products add what the earlier layers tell,
in place. What a layer was rebuilt to is kept until the last layer that reads it has done so, within one pass;
everything else is made and used in segments. Memory beside the cache is that of as many rebuilt layers as are read at
a time, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcli.plan import CachePlan
from kvcli.quant import linear_maps
from kvcli.runtime.native_cache import NativeCache
from kvcli.runtime.prefill import ChunkAttention

GROWTH = 256  # slots by which the memory of rebuilt layers grows, at least


def rebuilds(plan: CachePlan) -> bool:
    """Whether some layer is predicted from earlier ones, so that codes alone do not tell what it holds."""
    return any(x.predictor is not None and not x.predictor.is_absorbed(i) for i, x in enumerate(plan.layers))


@dataclass(frozen=True)
class Product:
    """What one layer's columns add to another's.

    Attributes
    ----------
    layer
        Whose columns are read.
    inputs, outputs
        Which columns: keys come first, then values.
    weight
        float32 [inputs, outputs].
    """

    layer: int
    inputs: slice
    outputs: slice
    weight: Tensor

    def add(self, read: Tensor, to: Tensor) -> None:
        """Add to columns ``to`` [tokens, 2 * width] what columns ``read`` tell."""
        to[:, self.outputs].addmm_(read[:, self.inputs], self.weight)


def products(plan: CachePlan, index: int, tensors: dict[str, Tensor]) -> list[Product]:
    """Return one layer's products in the order in which they have to be added: those of its own keys come last."""
    layer, maps = plan.layers[index], linear_maps.of_layer(plan, index, tensors)
    weights: dict[int, Tensor] = {}
    for which, found in maps.items():
        linear = layer.predictor.of(which) if layer.predictor is not None else None
        assert linear is not None
        parts = found.weight.t().split([plan.layers[x.layer].width for x in linear.inputs])
        for source, part in zip(linear.inputs, parts, strict=True):
            width = plan.layers[source.layer].width
            whole = weights.setdefault(source.layer, part.new_zeros(2 * width, 2 * layer.width))
            at = _columns(source.which, width)
            whole[at, _columns(which, layer.width)] = part
    out = []
    for read, whole in sorted(weights.items()):  # keys and values that are read and told together are one product
        rows, columns = whole.any(1).nonzero().flatten(), whole.any(0).nonzero().flatten()
        if len(rows):
            a, b = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
            out.append(Product(read, a, b, whole[a, b].contiguous()))
    return out


def _columns(which: str, width: int) -> slice:
    return slice(0, width) if which == "k" else slice(width, 2 * width)


class RebuildingAttention(ChunkAttention):
    """A :class:`ChunkAttention` for plans that :func:`rebuilds` says yes to."""

    def __init__(self, cache: NativeCache, chunk: int, dtype: torch.dtype) -> None:
        super().__init__(cache, chunk, dtype)
        plan = cache.plan
        self._products: dict[int, list[Product]] = {}
        self._last_reader: dict[int, int] = {}
        for i, layer in enumerate(plan.layers):
            own = layer.predictor is None or layer.predictor.is_absorbed(i)  # what the kernels add by themselves
            self._products[i] = [] if own else products(plan, i, cache.tensors)
            self._last_reader |= {x.layer: i for x in self._products[i] if x.layer != i}
        width = max(x.width for x in plan.layers)
        slots = self._scratch.shape[1] // width
        self._columns = torch.empty(slots * 2 * width, dtype=torch.float32, device=cache.device)
        # by layer and sequence: the first slot, the columns, and the memory that they lie in
        self._kept: dict[tuple[int, int], tuple[int, Tensor, Tensor]] = {}
        self._spare: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes allocated for expanded slots and rebuilt layers."""
        kept = [*self._spare, *(x[2] for x in self._kept.values())]
        return super().nbytes + self._columns.nbytes + sum(x.nbytes for x in kept)

    def begin(self, positions: Tensor) -> None:
        """Start a pass: forget the masks, and what a pass that failed left behind."""
        super().begin(positions)
        for key in list(self._kept):
            self._release(*key)

    def __call__(self, index: int, row: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """As :meth:`ChunkAttention.__call__`; layers must be called in order."""
        if index in self._last_reader:
            self._keep(index, row, q.shape[0])
        super().__call__(index, row, q, k, v, out)
        for source in {x.layer for x in self._products[index]}:
            if self._last_reader.get(source) == index:
                self._release(source, row)

    def _keep(self, index: int, row: int, tokens: int) -> None:
        """Make room for what a layer will be rebuilt to: all slots that a query of the pass sees packed."""
        plan, start = self.cache.plan, self.cache.host_lengths[row]
        layer, boundary = plan.layers[index], int(plan.boundary(index, start))
        first = 0 if layer.window is None else min(max(0, start + 1 - layer.window), boundary)
        count = int(plan.boundary(index, start + tokens)) - first
        need = count * 2 * layer.width
        memory = next((x for x in self._spare if len(x) >= need), None)
        if memory is None:  # with room for the next steps
            room = need + 2 * layer.width * max(GROWTH, count // 8)
            memory = torch.empty(room, dtype=torch.float32, device=self.cache.device)
            del self._spare[:1]
        else:
            self._spare = [x for x in self._spare if x is not memory]
        self._kept[index, row] = (first, memory[:need].view(count, 2 * layer.width), memory)

    def _release(self, index: int, row: int) -> None:
        self._spare.append(self._kept.pop((index, row))[2])

    def _add(self, index: int, row: int, first: int, columns: Tensor) -> None:
        """Add to decoded columns of slots ``first`` … what other layers and the layer's own keys tell."""
        for x in self._products[index]:
            if x.layer == index:
                x.add(columns, columns)
            else:
                begin, read, _ = self._kept[x.layer, row]
                x.add(read[first - begin : first - begin + len(columns)], columns)

    def _decode(self, index: int, row: int, first: int, columns: Tensor) -> None:
        """Decode slots ``first`` … into columns [slots, 2 * width]: residuals and biases, keys before RoPE."""
        layer = self.cache.plan.layers[index]
        k, v = columns.view(len(columns), 2, layer.num_kv_heads, layer.head_dim).permute(1, 2, 0, 3)
        self.cache.expand_into(index, row, first, k, v, before_rope=True)

    def _append(self, index: int, row: int, k: Tensor, v: Tensor, before: int) -> None:
        """Append tokens; what is packed of them is packed less its prediction, values after keys."""
        cache, plan = self.cache, self.cache.plan
        first, stop = (int(plan.boundary(index, n)) for n in (before, before + len(k)))
        if stop <= first or not self._products[index]:
            cache.append_chunk(index, row, k, v, before=before)
            return
        width = plan.layers[index].width
        bias = cache.biases(index)
        predicted = bias.repeat(stop - first, 1)
        for x in self._products[index]:
            if x.layer != index:
                begin, read, _ = self._kept[x.layer, row]
                x.add(read[first - begin : stop - begin], predicted)
        keys = predicted[:, :width].contiguous()
        cache.append_chunk(index, row, k, None, before=before, k_predicted=keys)
        decoded = torch.empty_like(predicted)
        self._decode(index, row, first, decoded)
        # expanding added the bias already
        predicted[:, :width] += decoded[:, :width] - bias[:width]
        for x in self._products[index]:
            if x.layer == index:
                x.add(predicted, predicted)
        values = predicted[:, width:].contiguous()
        cache.append_chunk(index, row, None, v, before=before, v_predicted=values)

    def _expand(self, index: int, row: int, first: int, stop: int, at: int = 0, room: int = 0) -> tuple[Tensor, Tensor]:
        """Rebuild slots; see :meth:`ChunkAttention._expand`."""
        kept = self._kept.get((index, row))
        if kept is None and not self._products[index]:
            return super()._expand(index, row, first, stop, at, room)
        layer, cache, count = self.cache.plan.layers[index], self.cache, max(0, stop - first)
        heads, dim, room = layer.num_kv_heads, layer.head_dim, room or count
        k, v = (x[: heads * room * dim].view(heads, room, dim) for x in self._scratch)
        if not count:
            return k, v
        columns = self._columns[: count * 2 * layer.width].view(count, -1)
        if kept is not None:
            columns = kept[1][first - kept[0] : stop - kept[0]]
        self._decode(index, row, first, columns)
        self._add(index, row, first, columns)
        # [slots, 2, heads, d] to [heads, slots, d], keys after RoPE
        flat = columns.view(count, 2, heads, 2, dim // 2)
        cos, sin = cache.rope_table[first:stop, None].chunk(2, -1)
        a, b = flat[:, 0, :, 0], flat[:, 0, :, 1]
        to = k[:, at : at + count].unflatten(-1, (2, dim // 2)).transpose(0, 1)
        # in float32, and rounded once to what is computed in
        torch.addcmul(a * cos, b, sin, value=-1, out=to[:, :, 0])
        torch.addcmul(b * cos, a, sin, out=to[:, :, 1])
        v[:, at : at + count] = flat[:, 1].flatten(-2).transpose(0, 1)
        if first < cache.plan.sinks(index):
            sinks = cache.layers[index].sinks[row, :, :, first:stop]
            for x, exact in zip((k, v), sinks, strict=True):
                x[:, at : at + exact.shape[1]] = exact
        return k, v
