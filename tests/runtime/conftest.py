"""Tiny random models of every supported architecture, plans for them, and float64 norms."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from kvcli.models.architectures import Rope, geometry
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat

WINDOW = 24  # of the sliding models: neither a multiple of a block nor below one
VOCABULARY = 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # wide, so that attention is not flat and every token matters
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**COMMON),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=None, head_dim=16),
    "mistral-sliding": lambda: MistralConfig(**COMMON, sliding_window=WINDOW, head_dim=8),
    "qwen2": lambda: Qwen2Config(**COMMON),
    "qwen2-sliding": lambda: Qwen2Config(
        **{**COMMON, "num_hidden_layers": 3}, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
    ),
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=32),  # 32 is not 48 / 6
}


@cache
def _tiny(name: str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(ARCHITECTURES[name]())
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms start at 1 and biases at 0, where a mistake would not show
            parameter.data += 0.3 * torch.randn(parameter.shape)
    model = model.to(dtype).eval().requires_grad_(False)
    rotary: Any = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.float()  # as in a loaded checkpoint, whatever its dtype
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """Return a model by architecture, dtype and attention; the same weights each time."""

    def build(name: str, dtype: torch.dtype = torch.float32, attention: str = "kvcli") -> PreTrainedModel:
        import kvcli.runtime.packed_cache  # noqa: F401  (registers the attention)

        return _tiny(name, dtype, attention)

    return build


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def plan_for() -> Callable[..., CachePlan]:
    """Make a plan for a model: one pair of formats for all layers, and whatever else is named."""
    shared = ("block_size", "sink_tokens", "residual_window", "dtype")

    def make(model: PreTrainedModel, k: KVFormat, v: KVFormat, **fields: Any) -> CachePlan:
        plan = {name: fields.pop(name) for name in shared if name in fields}
        layers = tuple(
            LayerPlan(x.num_kv_heads, x.head_dim, k, v, kind=x.kind, window=x.window, **fields)
            for x in geometry(model.config)
        )
        return CachePlan(layers, **{"dtype": str(model.dtype).removeprefix("torch."), **plan})

    return make


@pytest.fixture(scope="session")
def means_for() -> Callable[[CachePlan], dict[str, Tensor]]:
    """Make the means of a plan's layers, so large that leaving them out would show."""

    def make(plan: CachePlan) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        return {
            f"layer.{i}.{which}.mean": torch.randn(x.num_kv_heads, x.head_dim, generator=generator)
            for i, x in enumerate(plan.layers)
            for which in "kv"
        }

    return make


@pytest.fixture(scope="session")
def rope_for() -> Callable[[PreTrainedModel], Rope]:
    return Rope.from_model


@pytest.fixture
def float64_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let RMSNorm stay in float64.

    Transformers computes it in float32 whatever the model's dtype. Hidden states that differ by 1e-16, as sums over
    other shapes do, then differ by 1e-7, and now and then a code or a float16 falls on the other side: differences of
    Transformers' making, in which ours of the same size would hide.
    """

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.square().mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))

    for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


@pytest.fixture
def one_thread() -> Any:
    """Compute with one thread: sums of tiny models come out the same, and sooner."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
