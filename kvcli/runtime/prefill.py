"""Dense attention of a chunk of one sequence: what prefill does instead of decoding token by token.

Every query sees what it would see in decoding (DESIGN: visibility). Slots below the first query's boundary are packed
for the whole chunk and need no mask: the far part, in segments of bounded size. Around the boundary, and from there on,
each query sees something else: the near part, in blocks of queries with a mask. Log-sum-exps put the parts together.
On a CPU a kernel of our own takes the near part, and the far part too as long as it is one segment.
"""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from kvcli.runtime import kvrt
from kvcli.runtime.native_cache import NativeCache

SEGMENT = 4096  # far slots expanded at a time: bounds memory, whatever the context
QUERY_BLOCK = 128  # queries of one mask


class ChunkAttention:
    """Appends chunks to one sequence of a cache and attends from them.

    Parameters
    ----------
    cache
        The storage; changed in place.
    chunk
        The most tokens of a chunk.
    dtype
        What to compute in.
    """

    def __init__(self, cache: NativeCache, chunk: int, dtype: torch.dtype) -> None:
        self.cache, self.dtype = cache, dtype
        # Scratch of the layer that needs most: a segment of the far part, or what is near a chunk.
        need = 0
        for layer in cache.plan.layers:
            near = chunk + 2 * cache.plan.block_size + (min(layer.window, cache.capacity) if layer.window else 0)
            room = max(near, 0 if layer.window else min(SEGMENT, cache.capacity))
            need = max(need, layer.num_kv_heads * layer.head_dim * room)
        self._native = (
            cache.library.kind == "cpu"
            and dtype == torch.float32
            and all(x.head_dim % 16 == 0 for x in cache.plan.layers)
        )
        self._scratch = torch.empty(2, need, dtype=dtype, device=cache.device)
        self._masks: dict[tuple[int, ...], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes allocated for expanded slots."""
        return self._scratch.nbytes

    def begin(self, positions: Tensor) -> None:
        """Start a chunk, whose slots are ``positions``: forget the masks of the one before."""
        self._masks.clear()

    def __call__(self, index: int, row: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Append a chunk to sequence ``row`` in layer ``index``, and attend from it.

        The cache's length stays as it was before the chunk until all layers have appended.

        Parameters
        ----------
        q
            [tokens, num_heads, head_dim] after RoPE.
        k, v
            [tokens, num_kv_heads, head_dim], keys after RoPE.
        out
            [tokens, num_heads, head_dim].
        """
        cache, plan = self.cache, self.cache.plan
        start, tokens = cache.host_lengths[row], q.shape[0]
        # All queries read the slots below packed; the first one's own is near, for a part that sees nothing has no sum.
        first = min(int(plan.boundary(index, start + 1)), start)
        exact = self._exact(index, row, first, k, v)
        if plan.layers[index].window is None:
            self._append(index, row, k, v, start)
            end = int(plan.boundary(index, start + tokens))
            lowest = 0 if self._native and end <= SEGMENT else first
            found = self._far(index, row, lowest, q) if lowest else None
            packed = self._expand(index, row, lowest, end)
        else:
            found = None
            packed, lowest = self._sliding(index, row, k, v)
        if self._native:
            self._dense(index, start, q, packed, lowest, exact, first, out, found)
            return
        for begin in range(0, tokens, QUERY_BLOCK):
            rows = slice(begin, min(begin + QUERY_BLOCK, tokens))
            keys, values, mask = self._near(index, start, rows, packed, lowest, exact, first)
            near = attention(q[rows].to(self.dtype), keys, values, mask)
            if found is not None:
                near = merge((found[0][:, :, rows], found[1][:, :, rows]), near)
            # [group, kv heads, tokens, d] to [tokens, kv heads, group, d]
            out[rows].view(-1, keys.shape[0], near[0].shape[0], keys.shape[2]).copy_(near[0].permute(2, 1, 0, 3))

    def _append(self, index: int, row: int, k: Tensor, v: Tensor, before: int) -> None:
        """Append tokens to a layer that holds ``before``."""
        self.cache.append_chunk(index, row, k, v, before=before)

    def _dense(
        self,
        index: int,
        start: int,
        q: Tensor,
        packed: tuple[Tensor, Tensor],
        lowest: int,
        exact: tuple[Tensor, Tensor],
        first: int,
        out: Tensor,
        found: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Attend by the native kernel, and merge what was found in slots below ``lowest``."""
        tokens, heads, dim = q.shape
        mixed = out if found is None else torch.empty(tokens, heads, dim)
        lse = None if found is None else torch.empty(heads, tokens)
        a = kvrt.Chunk(
            q=q.data_ptr(), out=mixed.data_ptr(), lse=kvrt.pointer(lse), q_row_stride=q.stride(0),
            out_row_stride=mixed.stride(0), dtype=kvrt.DTYPES[q.dtype], out_dtype=kvrt.DTYPES[mixed.dtype],
            start=start, tokens=tokens, packed_k=packed[0].data_ptr(), packed_v=packed[1].data_ptr(),
            exact_k=exact[0].data_ptr(), exact_v=exact[1].data_ptr(), packed_first=lowest,
            packed_count=packed[0].shape[1], packed_head_stride=packed[0].stride(0), exact_first=first,
            exact_count=exact[0].shape[1], exact_head_stride=exact[0].stride(0),
        )  # fmt: skip
        store = self.cache.layers[index]
        self.cache.library.call("attend_chunk", byref(store.struct), byref(a), byref(self.cache.exec))
        if found is not None and lse is not None:
            group = found[0].shape[0]
            near = mixed.view(tokens, -1, group, dim).permute(2, 1, 0, 3), lse.view(-1, group, tokens).transpose(0, 1)
            out.view(tokens, -1, group, dim).copy_(merge(found, near)[0].permute(2, 1, 0, 3))

    def _exact(self, index: int, row: int, first: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Exact keys and values of slots ``first`` … of the chunk's end, [kv heads, slots, d]; none in portable layers.

        What is still in the tail, and the chunk's own as the tail will hold them.
        """
        cache = self.cache
        if cache.plan.is_portable(index):
            nothing = k[:0].transpose(0, 1).to(self.dtype)
            return nothing, nothing
        kept = cache.host_lengths[row] - first  # below 0 where the boundary falls into the chunk's first token
        old = cache.tail_rows(index, row, first, max(0, kept))
        new = (x[max(0, -kept) :].transpose(0, 1).to(old[0].dtype) for x in (k, v))
        both = [torch.cat((a, b), 1).to(self.dtype) for a, b in zip(old, new, strict=True)]
        return both[0], both[1]

    def _expand(self, index: int, row: int, first: int, stop: int, at: int = 0, room: int = 0) -> tuple[Tensor, Tensor]:
        """Expand slots ``first`` … ``stop``, [kv heads, slots, d], to place ``at`` of a scratch of ``room`` slots."""
        layer = self.cache.plan.layers[index]
        room = room or max(0, stop - first)
        shape = (layer.num_kv_heads, room, layer.head_dim)
        k, v = (x[: shape[0] * room * shape[2]].view(shape) for x in self._scratch)
        if stop > first:
            where = slice(at, at + stop - first)
            self.cache.expand_into(index, row, first, k[:, where], v[:, where])
        return k, v

    def _far(self, index: int, row: int, stop: int, q: Tensor) -> tuple[Tensor, Tensor] | None:
        """Attend from all queries to packed slots below ``stop``."""
        found, query = None, q.to(self.dtype)
        for begin in range(0, stop, SEGMENT):
            part = attention(query, *self._expand(index, row, begin, min(begin + SEGMENT, stop)))
            found = part if found is None else merge(found, part)
        return found

    def _sliding(self, index: int, row: int, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor], int]:
        """Append to a sliding layer, whose pages are used in turn, and expand each before it is written over.

        Returns what is packed of the slots that any of the chunk's queries sees, and the first of them.
        """
        cache, plan = self.cache, self.cache.plan
        start, tokens, block = cache.host_lengths[row], k.shape[0], cache.plan.block_size
        boundary = int(plan.boundary(index, start))
        lowest = min(max(0, start + 1 - (plan.layers[index].window or 0)), boundary)
        room = int(plan.boundary(index, start + tokens)) - lowest
        packed = self._expand(index, row, lowest, boundary, room=room)
        begin = 0
        while begin < tokens:  # pieces end where pages do, so that none writes two
            end = min(begin + block - (start + begin) % block, tokens)
            self._append(index, row, k[begin:end], v[begin:end], start + begin)
            after = int(plan.boundary(index, start + end))
            self._expand(index, row, boundary, after, at=boundary - lowest, room=room)
            boundary, begin = after, end
        return packed, lowest

    def _near(
        self,
        index: int,
        start: int,
        rows: slice,
        packed: tuple[Tensor, Tensor],
        lowest: int,
        exact: tuple[Tensor, Tensor],
        first: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values [kv heads, slots, d] and mask [queries, slots] of a block of queries.

        ``packed`` begins at slot ``lowest``, ``exact`` at ``first``.
        """
        plan, window = self.cache.plan, self.cache.plan.layers[index].window
        t0, t1 = start + rows.start, start + rows.stop - 1
        oldest = 0 if window is None else t0 - window + 1
        a, b = max(lowest, oldest), max(int(plan.boundary(index, t1 + 1)), lowest)
        a = min(a, b)
        c, d = max(first, int(plan.boundary(index, t0 + 1)), oldest), t1 + 1
        d = d if exact[0].shape[1] else c
        c = min(c, d)
        keys, values = (
            torch.cat((p[:, a - lowest : b - lowest], x[:, c - first : d - first]), 1)
            for p, x in zip(packed, exact, strict=True)
        )
        name = (t0, t1, a, b, c, d, window or 0)
        if name not in self._masks:
            self._masks[name] = self._mask(index, t0, t1, (a, b), (c, d))
        return keys, values, self._masks[name]

    def _mask(self, index: int, t0: int, t1: int, packed: tuple[int, int], exact: tuple[int, int]) -> Tensor:
        """Return what is added to scores: 0 where a query sees a slot, [queries, slots]."""
        device, window = self.cache.device, self.cache.plan.layers[index].window
        t = torch.arange(t0, t1 + 1, device=device)[:, None]
        boundary = self.cache.plan.boundary(index, t + 1)
        p, x = torch.arange(*packed, device=device), torch.arange(*exact, device=device)
        seen = torch.cat((p < boundary, (x >= boundary) & (x <= t)), 1)
        if window is not None:
            seen &= torch.cat((p, x)) > t - window
        # memory-efficient attention on CUDA wants rows that begin at multiples of 16 bytes
        mask = torch.zeros(len(t), -(-seen.shape[1] // 8) * 8, dtype=self.dtype, device=device)[:, : seen.shape[1]]
        return mask.masked_fill_(~seen, -torch.inf)


class TokenAttention:
    """Appends and attends token by token, with the kernels of decoding: the same bits however tokens are cut.

    The parameters are :class:`ChunkAttention`'s.
    """

    def __init__(self, cache: NativeCache, chunk: int, dtype: torch.dtype) -> None:
        self.cache = cache
        self.nbytes = 0  # reads and writes the caller's buffers only
        self._append, self._attend = cache.library.function("append"), cache.library.function("attend")

    def begin(self, positions: Tensor) -> None:
        """Start a chunk, whose slots are ``positions``: each is the length that its token is appended at."""
        self._lengths = positions

    def __call__(self, index: int, row: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Append a chunk, and attend from each token in turn; shapes are :class:`ChunkAttention`'s."""
        store = self.cache.layers[index]
        a, b = kvrt.Append.from_buffer_copy(store.append), kvrt.Attend.from_buffer_copy(store.attend)
        cache = self.cache.cache_struct(store, row)
        a.dtype = b.dtype = kvrt.DTYPES[q.dtype]
        layer, exec_ = byref(store.struct), byref(self.cache.exec)
        first = self._lengths.data_ptr()
        places = [(x.data_ptr(), x.stride(0) * x.element_size()) for x in (q, k, v, out)]
        failed = 0
        for token in range(len(q)):
            cache.lengths = first + token * self._lengths.element_size()
            a.cache = b.cache = cache
            b.q, a.k, a.v, b.out = (start + token * step for start, step in places)
            failed |= self._append(layer, byref(a), exec_) | self._attend(layer, byref(b), exec_)
        if failed:
            raise kvrt.NativeError("a kernel failed in prefill.")


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attend, and return the log-sum-exp of the scores too.

    Parameters
    ----------
    q
        [tokens, num_heads, head_dim]; heads of a group are adjacent.
    k, v
        [num_kv_heads, slots, head_dim].
    mask
        [tokens, slots], added to scores.

    Returns
    -------
    tuple
        [group, num_kv_heads, tokens, head_dim] and [group, num_kv_heads, tokens]: the queries that share keys lie along
        the batch, so that neither they nor the keys need to be copied.
    """
    heads = k.shape[0]
    group = q.shape[1] // heads
    query = q.unflatten(1, (heads, group)).permute(2, 1, 0, 3)
    keys, values = (x[None].expand(group, -1, -1, -1) for x in (k, v))
    bias = None if mask is None else mask.expand(group, heads, -1, -1)
    scale = q.shape[2] ** -0.5
    if q.device.type == "cpu":
        if bias is not None:
            bias = bias[:1, :1]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, 0.0, False, attn_mask=bias, scale=scale
        )
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, keys, values, bias, True, 0.0, False, scale=scale
        )
    return out, lse[:, :, : q.shape[0]]


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Join attention over two sets of slots: outputs [..., head_dim], log-sum-exps [...]."""
    weight = torch.sigmoid(b[1] - a[1]).to(a[0].dtype)
    return torch.lerp(a[0], b[0], weight[..., None]), torch.logaddexp(a[1], b[1])
