"""The packed cache of a whole model, and its plug into Transformers' cache and attention interfaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from kvcli.errors import KvcliError
from kvcli.models.architectures import Rope
from kvcli.plan import CachePlan
from kvcli.runtime.attention import attend
from kvcli.runtime.packed_layer import PackedLayer

ATTENTION = "kvcli"  # the name under which Transformers finds the attention function


class PackedCache(Cache):
    """Paged, packed storage for all layers: pass it to a model as ``past_key_values``.

    The model must run with ``attn_implementation="kvcli"``. New tokens are packed in place; padding tokens of a batch
    (attention mask 0) are never stored.

    Parameters
    ----------
    plan
        How each layer is stored.
    batch_size, capacity
        Sequences, and tokens each for which pages are allocated at once; longer sequences grow the pool.
    rope, tensors
        The model's rotary embedding and the artifact's ``kv.safetensors``, where the plan needs them.
    device
        Where pages live.
    keep_decoded
        Decode each page once; see :class:`kvcli.runtime.packed_layer.PackedLayer`.
    """

    def __init__(
        self,
        plan: CachePlan,
        *,
        batch_size: int = 1,
        capacity: int = 0,
        rope: Rope | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        device: torch.device | str = "cpu",
        keep_decoded: bool = False,
    ) -> None:
        self.plan = plan
        stores = [
            PackedLayer(
                plan, i, batch_size=batch_size, capacity=capacity, rope=rope, tensors=tensors, device=device,
                keep_decoded=keep_decoded,
            )
            for i in range(len(plan.layers))
        ]  # fmt: skip
        for store in stores:
            store.connect(stores)
        super().__init__(layers=[StoredLayer(store) for store in stores])

    @property
    def stores(self) -> list[PackedLayer]:
        """The layers' storage."""
        return [layer.store for layer in self.layers if isinstance(layer, StoredLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes really allocated for sequences."""
        return sum(store.nbytes for store in self.stores)

    @property
    def lengths(self) -> list[int]:
        """Tokens each sequence has seen."""
        return list(self.stores[0].lengths)


class AttendingLayer(CacheLayerMixin):
    """A cache layer that computes its own attention: ``update`` only tags the keys with the layer that wants them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = 0  # columns of the padded batch, as Transformers counts them
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Tag the new keys, so that :func:`packed_attention` finds this layer, and return the new tokens only."""
        self.seen += key_states.shape[2]
        key_states.kvcli_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """Attend from new tokens: query [batch, num_heads, new, head_dim], mask [batch, new] bool or None."""
        raise KvcliError(f"{type(self).__name__} does not attend.")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is lazy here."""

    def get_seq_length(self) -> int:
        """Columns seen, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (keys the mask spans, offset)."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


class StoredLayer(AttendingLayer):
    """A layer that keeps its tokens packed."""

    def __init__(self, store: PackedLayer) -> None:
        super().__init__()
        self.store = store

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """Append each sequence's new tokens and attend from them; padding gets zeros."""
        if query.shape[0] != len(self.store.lengths):
            raise KvcliError(f"the cache holds {len(self.store.lengths)} sequences and was given {query.shape[0]}.")
        out = torch.zeros_like(query)
        for row in range(query.shape[0]):
            keep = slice(None) if mask is None else mask[row].nonzero().flatten()
            q, k, v = query[row][:, keep], key[row][:, keep], value[row][:, keep]
            if q.shape[1]:
                if self.store.plan.is_exact:
                    out[row][:, keep] = self._attend_exactly(module, row, q, k, v, scaling)
                else:
                    out[row][:, keep] = attend(self.store, row, q, k, v, scaling)
        return out

    def _attend_exactly(
        self, module: torch.nn.Module, row: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Attend from exact pages through Transformers' own SDPA call, so that logits match it bit for bit."""
        store, old, new = self.store, self.store.lengths[row], query.shape[1]
        store.append(row, store.exact(row, key, value))
        k, v, first = store.read(row)
        window = store.plan.window
        if window is not None:  # Transformers keeps window - 1 past tokens; with more keys, sums would round otherwise
            begin = max(first, old - window + 1)
            k, v, first = k[:, begin - first :], v[:, begin - first :], begin
        k, v = k.to(query.dtype)[None], v.to(query.dtype)[None]
        t = torch.arange(old, old + new, device=query.device)[:, None]
        s = torch.arange(first, old + new, device=query.device)[None]
        mask = None  # wherever Transformers has none
        if 1 < new < k.shape[2] or (window is not None and k.shape[2] >= window):
            mask = (s <= t) & ((s > t - window) if window is not None else True)
            mask = mask[None, None]
        out, _ = sdpa_attention_forward(module, query[None], k, v, mask, scaling=scaling)
        store.release(row)
        return out[0].transpose(0, 1)

    def reset(self) -> None:
        """Refuse: a packed cache is made for one use."""
        raise KvcliError("a packed cache is not reset; make a new one.")

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: what was packed is no longer exact, so no token can be taken back."""
        raise KvcliError("a packed cache takes no tokens back, so it cannot serve assisted decoding.")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder sequences for beam search; ``beam_idx`` is [batch]."""
        self.store.reorder(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences; ``indices`` is [new batch]."""
        self.store.reorder(torch.arange(len(self.store.lengths))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence, copies side by side."""
        self.store.reorder([row for row in range(len(self.store.lengths)) for _ in range(repeats)])


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for Transformers: hands the new tokens to the layer that :meth:`AttendingLayer.update` tagged.

    Shapes are Transformers': query [batch, num_heads, new, head_dim], result [batch, new, num_heads, head_dim];
    attention_mask is None or the batch's padding mask [batch, seen].
    """
    layer: AttendingLayer | None = getattr(key, "kvcli_layer", None)
    if layer is None:
        raise KvcliError("attention 'kvcli' reads a PackedCache: pass one as past_key_values.")
    new = attention_mask[:, -query.shape[2] :].bool() if attention_mask is not None else None
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attend(module, query, key, value, new, factor).transpose(1, 2), None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, flash_attention_mask)
