"""Tiny models of every supported architecture and shape, and random transforms for them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from kvcli.calibration.ostquant import shapes

SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "tie_word_embeddings": False,
    "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-mha": {"model_type": "llama", "num_key_value_heads": 6},
    "llama-mqa-yarn": {"model_type": "llama", "num_key_value_heads": 1, "rope_parameters": YARN},
    # 9 heads in groups of 3, 10 channels each: nothing is a power of two, and 9 · 10 is not the hidden size
    "llama-odd-tied": {"model_type": "llama", "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 10,
                       "hidden_size": 45, "intermediate_size": 60, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 8, "head_dim": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3-tied-biases": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
}  # fmt: skip
ALL = ("r_res", "r_ov", "s_attn", "s_ffn", "s_qk", "s_ov", "s_ud")
IDS = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(0))


@cache
def _build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SHAPE, **MODELS[name]}))
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms start at 1 and biases at 0, where a mistake would not show
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return model.eval().requires_grad_(False)


def build(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Return a fresh copy, free to be changed."""
    return prepared(copy.deepcopy(_build(name)), dtype)


class Float64Norm(torch.nn.Module):
    """RMSNorm that stays in float64.

    Transformers computes it in float32, and a rotated vector's mean square is another in the last bit of that.
    """

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = stock.weight, stock.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))
        return out


def prepared(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    model = model.to(dtype).eval()
    if dtype == torch.float64:
        for name, module in list(model.named_modules()):
            if hasattr(module, "variance_epsilon"):
                model.set_submodule(name, Float64Norm(module))
    rotary: Any = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.float()  # as in a loaded checkpoint, whatever its dtype
    return model


def random_parameters(model: PreTrainedModel, names: Sequence[str] = ALL, seed: int = 0) -> dict[str, Tensor]:
    """Random rotations, and scales between a third and three of either sign."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, shape in shapes(model.config).items():
        x = torch.randn(shape, dtype=torch.float64, generator=generator)
        parameters[name] = torch.linalg.qr(x).Q if name.startswith("r_") else x.sign() * 3 ** x.tanh()
    return {name: parameters[name] for name in names}


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    out: Tensor = model(IDS, use_cache=False).logits
    return out


@torch.no_grad()
def cached(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    """Return each layer's keys after RoPE and values, as stock Transformers caches them."""
    store = DynamicCache()  # without a configuration no layer slides, and all tokens stay
    model(IDS, past_key_values=store)
    return [(x.keys, x.values) for x in store.layers]


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference beside the largest logit."""
    return float((a - b).abs().max() / b.abs().max())


each_model = pytest.mark.parametrize("architecture", MODELS)
