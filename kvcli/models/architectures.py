"""What the code needs to know about an architecture: the one place for it.

Supported are the dense decoders whose attention is ``softmax(q k / sqrt(d)) v`` over rotated keys: Llama, Mistral,
Qwen2 and Qwen3. Everything else is refused by name, before any work starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from kvcli.errors import InputError

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")

# Why the better known of the others do not fit; any other model type is refused without a reason.
_REFUSED = {
    "gemma": ("Gemma", "scales its norms and embeddings in a way of its own"),
    "gemma2": ("Gemma 2", "interleaves sliding-window layers and caps its attention scores"),
    "gemma3": ("Gemma 3", "interleaves sliding-window and full layers with a rotary embedding each"),
    "gemma3_text": ("Gemma 3", "interleaves sliding-window and full layers with a rotary embedding each"),
    "gpt_oss": ("GPT-OSS", "gives each head a learned attention sink"),
    "llama4": ("Llama 4", "mixes chunked attention with layers without positions"),
    "llama4_text": ("Llama 4", "mixes chunked attention with layers without positions"),
    "deepseek_v2": ("DeepSeek-V2", "caches a latent vector instead of keys and values"),
    "deepseek_v3": ("DeepSeek-V3", "caches a latent vector instead of keys and values"),
    "phi3": ("Phi-3", "fuses its projections"),
    "mixtral": ("Mixtral", "is a mixture of experts"),
    "qwen2_moe": ("Qwen2-MoE", "is a mixture of experts"),
    "qwen3_moe": ("Qwen3-MoE", "is a mixture of experts"),
    "mamba": ("Mamba", "has a recurrent state and no KV cache"),
}


@dataclass(frozen=True)
class LayerGeometry:
    """One attention layer: ``num_heads`` queries share ``num_kv_heads`` cached heads of ``head_dim`` channels.

    A ``sliding`` layer's query at t sees ``window`` tokens, t - window + 1 … t; a ``full`` one has no window.
    """

    num_kv_heads: int
    num_heads: int
    head_dim: int
    kind: Literal["full", "sliding"] = "full"
    window: int | None = None


def check_model_type(model_type: object) -> None:
    """Raise :class:`InputError`, naming the architecture, unless ``model_type`` is supported."""
    if model_type in SUPPORTED:
        return
    if not isinstance(model_type, str) or not model_type:
        raise InputError(f"The model's configuration names no model_type; kvcli supports {', '.join(SUPPORTED)}.")
    name, reason = _REFUSED.get(model_type, (f"Model type {model_type!r}", ""))
    what = f"{name} ({model_type}) {reason}, which is not supported" if reason else f"{name} is not supported"
    raise InputError(f"{what}; kvcli supports {', '.join(SUPPORTED)}.")


def check_supported(config: PretrainedConfig) -> None:
    """Raise :class:`InputError`, one sentence naming the culprit, for a configuration that cannot be served."""
    check_model_type(config.model_type)
    if getattr(config, "is_heterogeneous", False):
        raise InputError("Layers that differ in shape (per_layer_config) are not supported.")
    if config.num_attention_heads % config.num_key_value_heads:
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        raise InputError(f"The model's {heads} attention heads cannot be shared by {kv} key/value heads.")
    _check_rope(config.rope_parameters or {})
    geometry(config)


def _check_rope(parameters: dict[str, Any]) -> None:
    kind = parameters.get("rope_type", "default")
    supported = ", ".join(STATIC_ROPE)
    if kind in ("dynamic", "longrope"):
        raise InputError(f"RoPE of type {kind!r} changes with the sequence's length; kvcli supports {supported}.")
    if kind not in STATIC_ROPE:
        raise InputError(f"RoPE of type {kind!r} is not supported; kvcli supports {supported}.")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("Partial RoPE (partial_rotary_factor below 1) is not supported; kvcli rotates whole heads.")


def geometry(config: PretrainedConfig) -> tuple[LayerGeometry, ...]:
    """Return every layer's shape and kind, as the model's own attention masks decide them.

    Raises
    ------
    InputError
        For a kind of layer other than full and sliding, or a window that the model's attention would not respect.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    # Only Qwen's attention asks layer_types: Llama's has no window, and Mistral's holds for every layer.
    own = {"llama": "full_attention", "mistral": "sliding_attention" if window else "full_attention"}
    forced = own.get(config.model_type)
    if config.model_type == "llama" and window:
        raise InputError(f"The model sets sliding_window {window}, which Llama's attention ignores: not supported.")

    layers = []
    for i, kind in enumerate(types or [forced or "full_attention"] * config.num_hidden_layers):
        if kind not in ("full_attention", "sliding_attention"):
            raise InputError(f"Layer {i} is of kind {kind!r}; kvcli supports full_attention and sliding_attention.")
        if forced not in (None, kind):
            raise InputError(f"Layer {i} is declared {kind!r}, but {config.model_type} computes {forced!r} there.")
        sliding = kind == "sliding_attention"
        if sliding and not (isinstance(window, int) and window > 0):
            raise InputError(f"Layer {i} is a sliding-window layer, but sliding_window is {window}.")
        layers.append(
            LayerGeometry(
                num_kv_heads=config.num_key_value_heads,
                num_heads=config.num_attention_heads,
                head_dim=head_dim,
                kind="sliding" if sliding else "full",
                window=window if sliding else None,
            )
        )
    return tuple(layers)


@dataclass(frozen=True, eq=False)
class Rope:
    """A model's rotary position embedding, which depends on position alone, and its exact inverse.

    Channels i and i + head_dim / 2 form a pair that is turned by ``position * inv_freq[i]`` and stretched by
    ``attention_scaling``, as in Transformers' ``rotate_half``.

    Attributes
    ----------
    inv_freq
        float32 [head_dim / 2].
    attention_scaling
        What yarn multiplies cosine and sine by; 1 for the other types.
    """

    inv_freq: Tensor
    attention_scaling: float = 1.0
    _table: Tensor = field(default_factory=lambda: torch.empty(0, 0), repr=False)

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> Rope:
        """Read the embedding that ``model`` itself uses.

        Raises
        ------
        InputError
            If it changes with the sequence's length or leaves channels unrotated.
        """
        _check_rope(model.config.rope_parameters or {})
        rotary: Any = model.model.rotary_emb
        inv_freq = rotary.inv_freq.detach().float()
        if 2 * len(inv_freq) != geometry(model.config)[0].head_dim:
            raise InputError("Partial RoPE is not supported; kvcli rotates whole heads.")
        return cls(inv_freq, float(rotary.attention_scaling))

    def to(self, device: torch.device | str) -> Rope:
        """Return the same embedding with its frequencies on ``device``."""
        return Rope(self.inv_freq.to(device), self.attention_scaling)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate vectors to their positions.

        Parameters
        ----------
        x
            Any float dtype [..., tokens, head_dim].
        positions
            int64 [tokens], or any shape that broadcasts with ``x.shape[:-1]``.

        Returns
        -------
        Tensor
            float32 (float64 if ``x`` is), the shape of ``x``.
        """
        first, second, cos, sin = self._pairs(x, positions)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Undo :meth:`rotate`: same shapes, same dtypes."""
        first, second, cos, sin = self._pairs(x, positions)
        # Not attention_scaling ** 2: cosine and sine are rounded to float32, and the inverse must hold in float64.
        norm = cos.square() + sin.square()
        return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1) / torch.cat((norm, norm), -1)

    def _pairs(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        last = int(positions.max()) if positions.numel() else 0
        cos, sin = self.table(last + 1).to(positions.device)[positions].to(dtype).chunk(2, dim=-1)
        first, second = x.to(dtype).chunk(2, dim=-1)
        return first, second, cos, sin

    def table(self, length: int) -> Tensor:
        """Return the cosines and sines of at least ``length`` positions, float32 [positions, head_dim].

        Each row is head_dim / 2 cosines, then as many sines. There is one such table a model, and every backend reads
        it: a cosine computed elsewhere, or in other company, may differ in its last bit.
        """
        if self._table.shape[0] < length:
            rows = max(1024, 1 << (length - 1).bit_length())
            # Angles are float32 even for float64 vectors: Transformers computes them so, and the two must agree.
            angles = torch.arange(rows, device=self.inv_freq.device)[:, None].float() * self.inv_freq
            table = torch.cat((angles.cos(), angles.sin()), dim=-1) * self.attention_scaling
            object.__setattr__(self, "_table", table)
        return self._table
