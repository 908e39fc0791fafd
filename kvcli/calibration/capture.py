"""What calibration reads from a model: each layer's queries, keys and values, and its input, on a corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvcli.plan import CachePlan
from kvcli.runtime.packed_cache import AttendingLayer


@dataclass
class Attention:
    """One layer's attention on one batch of windows.

    Attributes
    ----------
    query
        [batch, num_heads, tokens, head_dim] after RoPE.
    key, value
        [batch, num_kv_heads, tokens, head_dim], keys after RoPE.
    scaling
        Factor on the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float


class PlainLayer(AttendingLayer):
    """Exact causal attention over the tokens of one pass; stores nothing, and shows what it saw to ``see``."""

    def __init__(self, window: int | None, see: Callable[[Attention], None] | None = None) -> None:
        super().__init__()
        self.window, self.see = window, see

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """Attend causally, within the layer's window if it slides."""
        if self.see is not None:
            self.see(Attention(query, key, value, scaling))
        causal = None
        if self.window is not None and self.window < query.shape[2]:
            t = torch.arange(query.shape[2], device=query.device)
            causal = ((t[None] <= t[:, None]) & (t[None] > t[:, None] - self.window))[None, None]
        out, _ = sdpa_attention_forward(module, query, key, value, causal, scaling=scaling)
        return out.transpose(1, 2)


class OnePassCache(Cache):
    """Layers that compute their own attention, for a single pass from position 0."""

    def __init__(self, layers: list[AttendingLayer]) -> None:
        super().__init__(layers=layers)  # type: ignore[arg-type]


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a module computes; under a device map its weights may lie elsewhere until then."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if device is None else torch.device(device)


def embed(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the first layer's input, [batch, tokens, hidden_size], for [batch, tokens] ids on any device."""
    embedding = model.model.embed_tokens
    out: Tensor = embedding(ids.to(device_of(embedding)))
    return out


def plain_cache(plan: CachePlan) -> OnePassCache:
    """Return a cache of exact layers."""
    return OnePassCache([PlainLayer(layer.window) for layer in plan.layers])


def run_layers(model: PreTrainedModel, hidden: Tensor, cache: Cache, start: int) -> Tensor:
    """Run decoder layers from ``start`` on, from their input [batch, tokens, hidden_size], and the final norm."""
    for layer in range(start, len(model.model.layers)):
        hidden = run_layer(model, hidden, cache, layer)
    out: Tensor = model.model.norm(hidden)
    return out


def run_layer(model: PreTrainedModel, hidden: Tensor, cache: Cache, index: int) -> Tensor:
    """Run one decoder layer on a pass that starts at position 0."""
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    out: Tensor = model.model.layers[index](
        hidden,
        attention_mask=None,
        position_ids=positions,
        past_key_values=cache,
        position_embeddings=model.model.rotary_emb(hidden, positions),
    )
    return out


def layer_inputs(model: PreTrainedModel, plan: CachePlan, ids: Tensor) -> Iterator[tuple[int, Tensor, Attention]]:
    """Run the exact model on [batch, tokens] ids, one layer at a time.

    Yields
    ------
    tuple
        The layer's index, its input [batch, tokens, hidden_size], and its attention. Only one layer's tensors are
        held at a time; whoever wants more keeps them.
    """
    hidden = embed(model, ids)
    for i, layer in enumerate(plan.layers):
        seen: list[Attention] = []
        cache = plain_cache(plan)
        cache.layers[i] = PlainLayer(layer.window, seen.append)
        out = run_layer(model, hidden, cache, i)
        yield i, hidden, seen[0]
        hidden = out
