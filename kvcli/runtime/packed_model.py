"""A model with one way of keeping its cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcli.models.loading import LoadedModel
from kvcli.plan import CachePlan
from kvcli.runtime.packed_cache import ATTENTION, PackedCache

CHUNK = 512  # tokens of one forward pass; any other gives the same function


@dataclass(frozen=True)
class PackedModel:
    """A loaded model, a plan for its cache, and the tensors the plan needs.

    Attributes
    ----------
    loaded
        The model; its attention is switched to ``kvcli``.
    plan
        How the cache is kept.
    tensors
        The artifact's tensors, where the plan needs them.
    """

    loaded: LoadedModel
    plan: CachePlan
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        self.loaded.model.set_attn_implementation(ATTENTION)

    def new_cache(self, *, batch_size: int = 1, capacity: int = 0, keep_decoded: bool = False) -> PackedCache:
        """Return an empty cache, as :class:`kvcli.runtime.packed_cache.PackedCache`."""
        return PackedCache(
            self.plan, batch_size=batch_size, capacity=capacity, rope=self.loaded.rope, tensors=self.tensors,
            device=self.loaded.model.device, keep_decoded=keep_decoded,
        )  # fmt: skip

    @torch.no_grad()
    def log_probs(self, ids: Tensor, *, scored: int, chunk: int = CHUNK) -> tuple[Tensor, int]:
        """Run one window through a fresh cache.

        Parameters
        ----------
        ids
            [tokens] int64.
        scored
            How many of the last tokens to predict.
        chunk
            Tokens of one forward pass.

        Returns
        -------
        tuple
            Log-probabilities [scored, vocabulary] in float32 (float64 if the model computes in it), those of the last
            ``scored`` tokens given all before; and the bytes the cache had allocated at the end.
        """
        model, tokens = self.loaded.model, len(ids)
        cache = self.new_cache(capacity=tokens, keep_decoded=True)
        first = tokens - scored - 1  # the row that predicts the first scored token
        kept = []
        for begin in range(0, tokens, chunk):
            hidden = model.model(ids[None, begin : begin + chunk], past_key_values=cache).last_hidden_state[0]
            kept.append(hidden[max(0, first - begin) :])
        logits = model.lm_head(torch.cat(kept)[:-1])
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1), cache.nbytes
