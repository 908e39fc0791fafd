"""Pages packed again, by a plan that predicts each layer from the ones before, and back.

After AQUA-KV (Shutova et al., 2025, arXiv:2501.19392), which reconstructs at every step; here a page is packed so when
nobody reads it, and expanded once when somebody does. What is packed are reconstructions, so that a page that went
through here has lost twice. A prediction reads earlier layers of the same token and no other token: a page stands for
itself, whatever is before or behind it, except that RoPE asks where it lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvcli.errors import InputError
from kvcli.models.architectures import Rope
from kvcli.plan import CachePlan
from kvcli.runtime.native_cache import NativeCache
from kvcli.runtime.rebuilding import Product, products

ROOM = 512  # tokens that are packed, or expanded, at once


class Pages(NativeCache):
    """Whole pages of one sequence, wherever they lie: to decode and to encode, not to attend to.

    Parameters
    ----------
    plan, geometry
        As of a :class:`NativeCache`. Pages are what they are under the plan; nothing lies beside them.
    room
        Pages that are allocated, the same of every layer.
    capacity
        Tokens of the longest sequence.
    settings
        What else a :class:`NativeCache` takes.
    """

    def __init__(self, plan: CachePlan, geometry: Any, *, room: int, capacity: int, **settings: Any) -> None:
        self._room = room
        # With a sink every coded layer writes whole pages, whatever its formats; the sink itself is never read.
        bare = replace(plan, residual_window=0, sink_tokens=1)
        super().__init__(bare, geometry, capacity=capacity, batch_size=1, **settings)

    def _pool(self, index: int) -> int:
        return self._room

    def _tables(self, index: int) -> Tensor:
        if not index:
            self._table = torch.full((1, -(-self.capacity // self.plan.block_size)), -1, dtype=torch.int32)
        return self._table

    def place(self, first: int, pages: Sequence[int]) -> None:
        """Say which pages hold the sequence's blocks from ``first`` on; it has no others."""
        self._table.fill_(-1)
        self._table[0, first : first + len(pages)] = torch.tensor(pages, dtype=torch.int32)


class Repacker:
    """Packs pages of a pool by a second plan, and back; not for several threads.

    Parameters
    ----------
    pool
        The pages that sequences run on, of a plan that predicts at most values from their own keys.
    plan, tensors
        The second plan, of the same layers and pages, and its tensors.
    rope
        The model's rotary embedding.
    room
        Tokens that are packed or expanded at once.

    Raises
    ------
    InputError
        If the two plans do not cut sequences alike, or a tensor is missing.
    """

    def __init__(
        self, pool: NativeCache, plan: CachePlan, tensors: Mapping[str, Tensor], *, rope: Rope, room: int = ROOM
    ) -> None:
        if not pool.plan.shares_pages_with(plan):
            raise InputError("the capacity plan is not for the plan's layers, pages, sinks and window.")
        shared: dict[str, Any] = {"rope": rope, "capacity": pool.capacity, "library": pool.library}
        shared["threads"] = pool.exec.threads
        self.plan, self._rope = plan, rope
        self._blocks = max(1, room // plan.block_size)
        self._running = Pages(pool.plan, pool.geometry, room=1, tensors=pool.tensors, **shared)
        for mine, theirs in zip(self._running.layers, pool.layers, strict=True):
            mine.pages = theirs.pages
        self._dense = Pages(plan, pool.geometry, room=self._blocks, tensors=tensors, **shared)
        self._products: list[list[Product]] = []
        self._last_reader: dict[int, int] = {}
        for i, layer in enumerate(plan.layers):
            own = layer.predictor is None or layer.predictor.is_absorbed(i)  # what the kernels add by themselves
            self._products.append([] if own else products(plan, i, self._dense.tensors))
            self._last_reader |= {x.layer: i for x in self._products[i] if x.layer != i}
        self._biases = [self._dense.biases(i) for i in range(len(plan.layers))]
        self._sizes = [x.pages.shape[1] for x in self._dense.layers]

    @property
    def page_bytes(self) -> int:
        """Bytes of a packed page, all layers."""
        return sum(self._sizes)

    def demote(self, first: int, pages: Sequence[int]) -> list[Tensor]:
        """Pack the pages of consecutive blocks, the first of which is block ``first`` of its sequence.

        Returns
        -------
        list
            For each page uint8 [page_bytes], the layers side by side. The pool is left as it is.
        """
        out: list[Tensor] = []
        for at in range(0, len(pages), self._blocks):
            out += self._demote(first + at, pages[at : at + self._blocks])
        return out

    def promote(self, first: int, packed: Sequence[Tensor], pages: Sequence[int]) -> None:
        """Write what :meth:`demote` returned for blocks ``first`` … into pages of the pool."""
        for at in range(0, len(pages), self._blocks):
            self._promote(first + at, packed[at : at + self._blocks], pages[at : at + self._blocks])

    # --- inside -------------------------------------------------------------------------------------------------

    def _demote(self, first: int, pages: Sequence[int]) -> list[Tensor]:
        size = self.plan.block_size
        start, count = first * size, len(pages) * size
        self._running.place(first, pages)
        self._dense.place(first, range(len(pages)))
        kept: dict[int, Tensor] = {}
        for i in range(len(self.plan.layers)):
            k, v = self._running.expand(i, 0, start, count, torch.float32, with_sinks=False)
            kept[i] = self._pack(i, start, k.transpose(0, 1), v.transpose(0, 1), kept)
            self._forget(i, kept)
        rows = torch.cat([x.pages[: len(pages)] for x in self._dense.layers], 1)
        return [row.clone() for row in rows]  # each lives as long as it is wanted

    def _promote(self, first: int, packed: Sequence[Tensor], pages: Sequence[int]) -> None:
        size = self.plan.block_size
        start, count = first * size, len(pages) * size
        self._running.place(first, pages)
        self._dense.place(first, range(len(pages)))
        for store, part in zip(self._dense.layers, torch.stack(list(packed)).split(self._sizes, 1), strict=True):
            store.pages[: len(pages)] = part
        positions = torch.arange(start, start + count)[:, None]
        kept: dict[int, Tensor] = {}
        for i, layer in enumerate(self.plan.layers):
            columns = kept[i] = self._decode(i, start, count)
            for x in self._products[i]:
                x.add(kept[x.layer], columns)
            k, v = columns.view(count, 2, layer.num_kv_heads, layer.head_dim).unbind(1)
            self._running.append_chunk(i, 0, self._rope.rotate(k, positions), v, before=start)
            self._forget(i, kept)

    def _decode(self, index: int, start: int, count: int) -> Tensor:
        """Decode slots of packed pages: residuals and biases, keys before RoPE, float32 [count, 2 * width]."""
        layer = self.plan.layers[index]
        columns = torch.empty(count, 2 * layer.width)
        k, v = columns.view(count, 2, layer.num_kv_heads, layer.head_dim).permute(1, 2, 0, 3)
        self._dense.expand_into(index, 0, start, k, v, with_sinks=False, before_rope=True)
        return columns

    def _pack(self, index: int, start: int, k: Tensor, v: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
        """Pack one layer's keys after RoPE and values, [tokens, heads, d]; return what they will be expanded to."""
        if not self._products[index]:
            self._dense.append_chunk(index, 0, k, v, before=start)
            return self._decode(index, start, len(k))
        width, bias = self.plan.layers[index].width, self._biases[index]
        columns = bias.repeat(len(k), 1)
        own = [x for x in self._products[index] if x.layer == index]
        for x in self._products[index]:
            if x.layer != index:
                x.add(kept[x.layer], columns)
        # what decoding adds is the bias and the residual, and the bias is there already
        predicted = columns[:, :width].contiguous()
        self._dense.append_chunk(index, 0, k, None, before=start, k_predicted=predicted)
        columns[:, :width] += self._decode(index, start, len(k))[:, :width] - bias[:width]
        for x in own:
            x.add(columns, columns)
        predicted = columns[:, width:].contiguous()
        self._dense.append_chunk(index, 0, None, v, before=start, v_predicted=predicted)
        columns[:, width:] += self._decode(index, start, len(k))[:, width:] - bias[width:]
        return columns

    def _forget(self, index: int, kept: dict[int, Tensor]) -> None:
        """Drop what no layer after this one reads."""
        for layer in [x for x in kept if self._last_reader.get(x, -1) <= index]:
            del kept[layer]
