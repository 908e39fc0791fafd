"""Attention on a packed layer, the plain reference: one masked softmax over packed, exact and sink tokens.

What a query may see depends on its position alone (DESIGN: visibility), so prefill in one pass, in chunks of any size
and token by token compute the same function.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvcli.runtime.packed_layer import PackedLayer

QUERY_BLOCK = 256  # queries handled at once: bounds the mask, and lets early queries skip late keys


def visible(slots: Tensor, queries: Tensor, layer: PackedLayer, part: str) -> Tensor:
    """Which slots of a part each query reads from that part.

    Parameters
    ----------
    slots
        [s] absolute slots of the part's tokens.
    queries
        [t] absolute slots of the queries.
    layer
        Gives block size, window, sinks and, for sliding layers, the attention window.
    part
        ``packed``, ``exact`` or ``sinks``.

    Returns
    -------
    Tensor
        [t, s] bool.
    """
    t, s = queries[:, None], slots[None, :]
    boundary = layer.boundary(t + 1)
    seen = s <= t
    if layer.plan.window is not None:
        seen &= s > t - layer.plan.window
    if part == "exact":
        return seen & (s >= boundary)
    num_sinks = layer.sinks.shape[3]
    return seen & (s < boundary) & (s < num_sinks if part == "sinks" else s >= num_sinks)


def attend(layer: PackedLayer, row: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Append new tokens of one sequence and attend from them.

    Parameters
    ----------
    layer
        The storage; changed in place.
    row
        Which sequence of the batch.
    query
        [num_heads, new, head_dim] after RoPE; query heads of a group are adjacent.
    key, value
        [num_kv_heads, new, head_dim], keys after RoPE.
    scaling
        Factor on the scores.

    Returns
    -------
    Tensor
        [num_heads, new, head_dim] in the query's dtype.
    """
    start = layer.lengths[row]
    first_exact = layer.boundary(start)
    exact = layer.exact(row, key, value)
    layer.append(row, exact)
    packed_k, packed_v, first_packed = layer.read(row)
    sink_k, sink_v = layer.sinks[:, row]
    device = query.device
    packed_slots = torch.arange(first_packed, first_packed + packed_k.shape[1], device=device)
    exact_slots = torch.arange(first_exact, start + query.shape[1], device=device)
    sink_slots = torch.arange(min(sink_k.shape[1], layer.lengths[row]), device=device)

    outputs = []
    for begin in range(0, query.shape[1], QUERY_BLOCK):
        block = query[:, begin : begin + QUERY_BLOCK]
        t = torch.arange(start + begin, start + begin + block.shape[1], device=device)
        last = int(t[-1]) + 1
        packed_end = max(0, min(layer.boundary(last) - first_packed, len(packed_slots)))
        exact_from, exact_end = layer.boundary(int(t[0]) + 1) - first_exact, last - first_exact
        exact_from = min(max(0, exact_from), exact_end)
        keys, values, masks = [], [], []
        near_k, near_v = exact[:, :, exact_from:exact_end]
        for part, slots, k, v in (
            ("packed", packed_slots[:packed_end], packed_k[:, :packed_end], packed_v[:, :packed_end]),
            ("exact", exact_slots[exact_from:exact_end], near_k, near_v),
            ("sinks", sink_slots, sink_k[:, : len(sink_slots)], sink_v[:, : len(sink_slots)]),
        ):  # fmt: skip
            if len(slots):
                keys.append(k.to(query.dtype))
                values.append(v.to(query.dtype))
                masks.append(visible(slots, t, layer, part))
        outputs.append(_softmax_over(block, keys, values, masks, scaling))
    layer.release(row)
    return torch.cat(outputs, dim=1)


def _softmax_over(query: Tensor, keys: list[Tensor], values: list[Tensor], masks: list[Tensor], scale: float) -> Tensor:
    """One softmax over all parts; the query group shares its KV head's keys, folded into the query axis."""
    k, v, mask = torch.cat(keys, 1), torch.cat(values, 1), torch.cat(masks, 1)
    group = query.shape[0] // k.shape[0]
    folded = query.reshape(k.shape[0], group * query.shape[1], query.shape[2])
    out = scaled_dot_product_attention(
        folded[None], k[None], v[None], attn_mask=mask.repeat(group, 1)[None, None], scale=scale
    )
    return out[0].reshape(query.shape)
