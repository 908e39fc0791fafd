"""Paged, packed storage of one layer: pages of codes, and beside them the exact sinks and the exact tail.

Geometry and visibility are those of :class:`kvcli.plan.CachePlan`: page i holds slots i*B … (i+1)*B - 1, a query that
makes the sequence n tokens long reads slots below ``boundary(n)`` from pages and the rest, and the sinks, exactly.
No decoded copy is kept unless one is asked for: :meth:`PackedLayer.read` decodes anew at every call, and what later
layers are predicted from lives until the last of them has read it, within one pass of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvcli.errors import KvcliError
from kvcli.models.architectures import Rope
from kvcli.plan import CachePlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.codec import Codec

N = TypeVar("N", int, Tensor)


class Rebuilt(NamedTuple):
    """What a layer decoded in the present pass, for layers that are predicted from it.

    Attributes
    ----------
    length
        Tokens the sequence had.
    first
        Slot of the first token.
    k, v
        [tokens, width] float32, all heads side by side, keys before RoPE.
    """

    length: int
    first: int
    k: Tensor
    v: Tensor


class PackedLayer:
    """Pages, block tables, sinks and tails of one layer for a batch of sequences of unequal length.

    Parameters
    ----------
    plan, index, rope, tensors
        As for :class:`Codec`.
    batch_size, capacity
        Sequences, and tokens each for which pages are allocated at once.
    device
        Where everything lies.
    keep_decoded
        Decode each page once and hold on to the result, which :attr:`nbytes` does not count: the same numbers, sooner.
        Layers that are predicted from others, or others from them, decode anew all the same.

    Attributes
    ----------
    pages
        [pool, num_kv_heads, head_bytes] uint8.
    block_tables
        Per sequence, the pool index of each logical page; -1 for pages that fell behind a sliding window.
    lengths
        Tokens each sequence has seen.
    tail
        [2, batch, num_kv_heads, W + B - 1, head_dim]: exact keys and values from ``boundary(length)`` on.
    sinks
        [2, batch, num_kv_heads, sink_tokens, head_dim]: exact keys and values of the first tokens.
    """

    def __init__(
        self,
        plan: CachePlan,
        index: int,
        *,
        batch_size: int = 1,
        capacity: int = 0,
        rope: Rope | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        device: torch.device | str = "cpu",
        keep_decoded: bool = False,
    ) -> None:
        self.cache_plan, self.index = plan, index
        self.plan = plan.layers[index]
        self.layout = self.plan.layout(plan.block_size)
        self.codec = Codec(plan, index, rope, {k: v.to(device) for k, v in (tensors or {}).items()})
        heads, dim, exact = self.plan.num_kv_heads, self.plan.head_dim, self.codec.exact_dtype
        self._reserved = pool = plan.num_pages(index, capacity) * batch_size
        self.pages = torch.zeros(pool, heads, self.layout.head_bytes, dtype=torch.uint8, device=device)
        self.tail = torch.zeros(2, batch_size, heads, plan.tail(index), dim, dtype=exact, device=device)
        self.sinks = torch.zeros(2, batch_size, heads, plan.sinks(index), dim, dtype=exact, device=device)
        self.lengths = [0] * batch_size
        self._sources: dict[int, PackedLayer] = {}
        self._last_reader = -1
        self._rebuilt: dict[int, Rebuilt] = {}
        self._keep = keep_decoded
        self._kept: dict[int, tuple[int, Tensor, Tensor]] = {}  # first slot, keys and values of a sequence
        self.block_tables: list[list[int]] = [[] for _ in range(batch_size)]
        self._free = list(range(pool - 1, -1, -1))

    def connect(self, layers: Sequence[PackedLayer]) -> None:
        """Let the layer read those it is predicted from: ``layers`` are all of the cache, in order."""
        for x in self.plan.predictor.sources() if self.plan.predictor is not None else ():
            if x.layer != self.index:
                self._sources[x.layer] = source = layers[x.layer]
                source._last_reader = max(source._last_reader, self.index)

    @property
    def nbytes(self) -> int:
        """Bytes really allocated for sequences: pages, sinks and tail."""
        return self.pages.nbytes + self.tail.nbytes + self.sinks.nbytes

    def boundary(self, n: N) -> N:
        """First exactly read slot of a sequence of ``n`` tokens; ``n`` may be an integer tensor."""
        return self.cache_plan.boundary(self.index, n)

    # --- writing ------------------------------------------------------------------------------------------------

    def exact(self, row: int, k: Tensor, v: Tensor) -> Tensor:
        """Return exact keys and values from the sequence's current boundary on, new tokens included.

        k, v are [num_kv_heads, new, head_dim] after RoPE; the result is [2, num_kv_heads, tokens, head_dim] in the
        exact dtype, its first token at slot ``boundary(length)``.
        """
        kept = self.lengths[row] - self.boundary(self.lengths[row])
        new = torch.stack((k, v)).to(self.codec.exact_dtype)
        return torch.cat((self.tail[:, row, :, :kept], new), dim=2)

    def append(self, row: int, exact: Tensor) -> None:
        """Pack what leaves the window and keep the rest: ``exact`` is :meth:`exact`'s result for the new tokens."""
        exact = exact.detach()  # storage keeps no graph alive
        old = self.boundary(self.lengths[row])
        n = old + exact.shape[2]
        new = self.boundary(n)
        num_sinks = self.sinks.shape[3]
        if self.lengths[row] < num_sinks:  # sinks are still in the tail, or new, for as long as they are incomplete
            part = exact[:, :, : num_sinks - old]
            self.sinks[:, row, :, old : old + part.shape[2]] = part
        if new > old:
            self._write(row, exact[:, :, : new - old], old)
        self.tail[:, row, :, : n - new] = exact[:, :, new - old :]
        self.lengths[row] = n

    def release(self, row: int) -> None:
        """Give back what no later query of the sequence can see: pages behind a sliding window.

        What was decoded for the layers that are predicted from others goes once the last of them has read it.
        """
        for source in self._sources.values():
            if source._last_reader == self.index:
                source._rebuilt.pop(row, None)
        table = self.block_tables[row]
        gone = min(self.cache_plan.first_page(self.index, self.lengths[row]), len(table))
        freed = [page for page in table[:gone] if page >= 0]
        table[:gone] = [-1] * gone
        self._free += freed
        in_use = sum(page >= 0 for t in self.block_tables for page in t)
        if freed and self.pages.shape[0] > max(self._reserved, in_use):  # a long prefill held more for a while
            self.reorder(list(range(len(self.lengths))))

    def _allocate(self, count: int) -> list[int]:
        missing = count - len(self._free)
        if missing > 0:  # exactly what is needed: allocated bytes stay what the plan counts
            start = self.pages.shape[0]
            self.pages = torch.cat((self.pages, self.pages.new_zeros(missing, *self.pages.shape[1:])))
            self._free = [*range(start + missing - 1, start - 1, -1), *self._free]
        return [self._free.pop() for _ in range(count)]

    def _write(self, row: int, exact: Tensor, first: int) -> None:
        """Encode [2, num_kv_heads, tokens, head_dim] into the slots from ``first`` on."""
        block, tokens = self.layout.block_size, exact.shape[2]
        table = self.block_tables[row]
        table += self._allocate(-(-(first + tokens) // block) - len(table))
        slots = torch.arange(first, first + tokens, device=exact.device)
        pool = torch.tensor(table, device=exact.device)[slots // block]
        own: Tensor | None = None
        for which, x in zip("kv", exact, strict=True):
            fmt: KVFormat = getattr(self.plan, which)
            predicted = self._predicted(which, row, first, tokens, own)
            sections = self.codec.encode(which, x, slots, predicted)
            if which == "k" and "v" in self.codec.maps:
                own = self._flat(which, self.codec.decode(which, sections, slots, predicted), slots)
            for name, data in zip(("codes", "scales", "zeros"), sections, strict=True):
                where = self.pages[..., self.layout.sections[f"{which}_{name}"]]
                if fmt.is_token_wise:
                    where = where.unflatten(-1, (block, -1)) if where.shape[-1] else where
                    if where.shape[-1]:
                        where[pool, :, slots % block] = data.unflatten(-1, (tokens, -1)).transpose(0, 1)
                elif where.shape[-1]:  # a scale spans tokens, so only whole pages are written
                    where[pool[::block]] = data.unflatten(-1, (tokens // block, -1)).transpose(0, 1)

    # --- reading ------------------------------------------------------------------------------------------------

    def read(self, row: int, stop: int | None = None) -> tuple[Tensor, Tensor, int]:
        """Decode the sequence's pages.

        Returns
        -------
        tuple
            Keys after RoPE and values, [num_kv_heads, tokens, head_dim], and the slot of their first token. Tokens end
            at ``stop``, by default at the boundary of the present length.
        """
        stop = self.boundary(self.lengths[row]) if stop is None else stop
        block, table = self.layout.block_size, self.block_tables[row]
        first = block * next((i for i, page in enumerate(table) if page >= 0), len(table))
        if first >= stop:
            nothing = self.tail[0, row, :, :0]
            return nothing, nothing, first
        if not self._keep or self._sources or self._last_reader > self.index:
            return *self._decode(row, first, stop), first
        if row in self._kept:
            begin, k, v = self._kept[row]
            full = (begin + k.shape[1]) // block * block  # a page that was not full is decoded again
            k, v = k[:, first - begin : full - begin], v[:, first - begin : full - begin]
            if full < stop:
                new_k, new_v = self._decode(row, max(first, full), stop)
                k, v = torch.cat((k, new_k), 1), torch.cat((v, new_v), 1)
        else:
            k, v = self._decode(row, first, stop)
        self._kept[row] = first, k, v
        return k, v, first

    def _decode(self, row: int, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Decode the slots from ``first``, where a page begins, to ``stop``."""
        block, table = self.layout.block_size, self.block_tables[row]
        held = table[first // block : -(-stop // block)]
        pages = self.pages[torch.tensor(held, dtype=torch.long, device=self.pages.device)]
        slots = torch.arange(first, first + len(pages) * block, device=self.pages.device)
        count = stop - first
        decoded: list[Tensor] = []
        flat: list[Tensor] = []
        for which in "kv":
            sections = [
                # [pages, heads, bytes] to [heads, pages * bytes]: tokens in slot order
                pages[..., self.layout.sections[f"{which}_{name}"]].transpose(0, 1).flatten(1)
                for name in ("codes", "scales", "zeros")
            ]
            predicted = self._predicted(which, row, first, count, flat[0] if flat else None)
            if predicted is not None:  # what a page has yet to hold is predicted as nothing
                predicted = pad(predicted, (0, 0, 0, len(slots) - count))
            x = self.codec.decode(which, (sections[0], sections[1], sections[2]), slots, predicted)[:, :count]
            decoded.append(x)
            if self._last_reader > self.index or "v" in self.codec.maps:
                flat.append(self._flat(which, x, slots[:count]))
        if self._last_reader > self.index:
            self._rebuilt[row] = Rebuilt(self.lengths[row], first, *flat)
        return decoded[0], decoded[1]

    # --- predicting ---------------------------------------------------------------------------------------------

    def _flat(self, which: str, x: Tensor, slots: Tensor) -> Tensor:
        """Return decoded keys or values as predictors see them: [tokens, width] float32, keys before RoPE."""
        x = self.codec.before_rope(x, slots) if which == "k" else x.to(torch.float32)
        return x.transpose(0, 1).flatten(1)

    def _predicted(self, which: str, row: int, first: int, count: int, keys: Tensor | None) -> Tensor | None:
        """Predict ``count`` tokens from slot ``first`` on: [num_kv_heads, count, head_dim] float32, keys before RoPE.

        ``keys`` are the layer's own decoded keys, for values. None where there is no predictor.
        """
        if which not in self.codec.maps:
            return None
        linear = self.plan.predictor.of(which) if self.plan.predictor is not None else None
        assert linear is not None
        parts = []
        for x in linear.inputs:
            if x.layer == self.index:
                assert keys is not None
                parts.append(keys[:count])
            else:
                parts.append(getattr(self._source(x.layer, row, first, count), x.which))
        flat = self.codec.maps[which](torch.cat(parts, 1))
        predicted: Tensor = flat.unflatten(1, (self.plan.num_kv_heads, -1)).transpose(0, 1)
        return predicted

    def _source(self, index: int, row: int, first: int, count: int) -> Rebuilt:
        """Return what layer ``index`` decodes to in ``count`` slots from ``first`` on."""
        if index not in self._sources:
            raise KvcliError(f"layer {self.index} is predicted from layer {index}, to which it is not connected.")
        source = self._sources[index]
        found = source._rebuilt.get(row)
        if found is None or found.length != source.lengths[row] or found.first + len(found.k) < first + count:
            source.read(row, first + count)
            found = source._rebuilt[row]
        part = slice(first - found.first, first - found.first + count)
        return Rebuilt(found.length, first, found.k[part], found.v[part])

    def reorder(self, rows: list[int]) -> None:
        """Let sequence i continue what sequence ``rows[i]`` held (beam search); pages are copied, not shared."""
        pages: list[int] = []
        tables: list[list[int]] = []
        for row in rows:
            base = len(pages)
            kept = [p for p in self.block_tables[row] if p >= 0]
            pages += kept
            dropped = len(self.block_tables[row]) - len(kept)
            tables.append([-1] * dropped + list(range(base, base + len(kept))))
        spare = max(0, self._reserved - len(pages))
        picked = self.pages[torch.tensor(pages, dtype=torch.long, device=self.pages.device)]
        self.pages = torch.cat((picked, self.pages.new_zeros(spare, *self.pages.shape[1:])))
        self._free = list(range(len(pages) + spare - 1, len(pages) - 1, -1))
        self.block_tables = tables
        self._kept = {i: self._kept[r] for i, r in enumerate(rows) if r in self._kept}
        self.lengths = [self.lengths[r] for r in rows]
        self.tail, self.sinks = self.tail[:, rows], self.sinks[:, rows]
