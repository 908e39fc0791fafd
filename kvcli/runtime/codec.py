"""What one layer's pages store of its keys and values: codes of what is left after mean or prediction and transform."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvcli.errors import InputError, KvcliError
from kvcli.models.architectures import Rope
from kvcli.plan import CachePlan
from kvcli.quant import transforms
from kvcli.quant.format import KVFormat
from kvcli.quant.linear_maps import LinearMap, of_layer
from kvcli.quant.quantizer import from_bytes, to_bytes


class Codec:
    """Turns exact keys and values of one layer into what pages store, and back.

    In between lie the mean or the prediction, RoPE, the transform and the codes.

    Parameters
    ----------
    plan, index
        The plan, and which of its layers this is.
    rope
        The model's rotary embedding; needed where keys are stored before it or have their mean taken off.
    tensors
        ``layer.{i}.k.mean`` and ``layer.{i}.v.mean`` ([num_kv_heads, head_dim]) for centred layers, and
        ``layer.{i}.{k|v}.predictor.…`` for predicted tensors.

    Attributes
    ----------
    maps
        The predictors of ``k`` and ``v``, where there are any.
    """

    def __init__(self, plan: CachePlan, index: int, rope: Rope | None, tensors: Mapping[str, Tensor]) -> None:
        self.plan = plan.layers[index]
        self.exact_dtype: torch.dtype = getattr(torch, plan.exact_dtype)
        self.page_dtype: torch.dtype = getattr(torch, plan.page_dtype)
        self.rope = rope
        self.means: dict[str, Tensor] = {}
        self.maps: dict[str, LinearMap] = of_layer(plan, index, tensors)
        for name in ("k", "v"):
            if self.plan.center and name not in self.maps:  # a predictor has a bias in the mean's place
                key = f"layer.{index}.{name}.mean"
                if key not in tensors:
                    raise InputError(f"tensor {key} is missing, and layer {index} is centred.")
                self.means[name] = tensors[key].to(torch.float32).unsqueeze(-2)
        if rope is None and (self.plan.rope == "before" or self.plan.center or self.plan.predictor is not None):
            raise InputError(f"layer {index} stores keys that need the model's rotary embedding, and none was given.")

    def encode(
        self, which: str, x: Tensor, positions: Tensor, predicted: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode keys after RoPE or values, [..., num_kv_heads, tokens, head_dim], into section bytes.

        ``positions`` is [tokens]; ``predicted``, of a tensor that has a predictor, is shaped like ``x``, keys before
        RoPE. Returns codes, scales and zeros, each [..., num_kv_heads, bytes] uint8.
        """
        fmt: KVFormat = getattr(self.plan, which)
        if not fmt.is_exact:
            x = x.to(torch.float32)
            x = self._to_stored(which, x, positions, self._offset(which, predicted))
            x = transforms.apply(self._transform(fmt), x)
        return to_bytes(x, fmt, self.page_dtype)

    def decode(
        self, which: str, sections: tuple[Tensor, Tensor, Tensor], positions: Tensor, predicted: Tensor | None = None
    ) -> Tensor:
        """Undo :meth:`encode`: [..., num_kv_heads, tokens, head_dim], float32, or the exact dtype if exact."""
        fmt: KVFormat = getattr(self.plan, which)
        x = from_bytes(*sections, fmt, self.page_dtype, self.plan.head_dim)
        if fmt.is_exact:
            return x
        x = transforms.invert(self._transform(fmt), x)
        return self._from_stored(which, x, positions, self._offset(which, predicted))

    def before_rope(self, k: Tensor, positions: Tensor) -> Tensor:
        """Return keys as predictors see them, float32."""
        assert self.rope is not None, "layers that predict or are predicted have the rotary embedding"
        return self.rope.unrotate(k.to(torch.float32), positions)

    def _offset(self, which: str, predicted: Tensor | None) -> Tensor | None:
        """Return what is taken off before a tensor is quantised: its prediction, or its mean."""
        if (predicted is None) == (which in self.maps):
            raise KvcliError(f"{which} was given {'no' if predicted is None else 'a'} prediction.")
        return self.means.get(which) if predicted is None else predicted

    def _transform(self, fmt: KVFormat) -> str:
        # a rotation would mix the channels that a channel-axis format keeps apart
        return self.plan.transform if fmt.axis == "token" else "none"

    def _to_stored(self, which: str, x: Tensor, positions: Tensor, offset: Tensor | None) -> Tensor:
        if which == "k" and self.rope is not None:
            if self.plan.rope == "before":
                x = self.rope.unrotate(x, positions)
            elif offset is not None:
                offset = self._rotated(self.rope, offset, positions)
        return x if offset is None else x - offset

    def _from_stored(self, which: str, x: Tensor, positions: Tensor, offset: Tensor | None) -> Tensor:
        if which == "k" and self.rope is not None:
            if self.plan.rope == "before":
                return self.rope.rotate(x if offset is None else x + offset, positions)
            if offset is not None:
                offset = self._rotated(self.rope, offset, positions)
        return x if offset is None else x + offset

    @staticmethod
    def _rotated(rope: Rope, offset: Tensor, positions: Tensor) -> Tensor:
        return rope.rotate(offset.expand(*offset.shape[:-2], len(positions), -1), positions)
