"""What the code knows of an architecture agrees with what Transformers computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvcli.errors import InputError
from kvcli.models.architectures import SUPPORTED, LayerGeometry, Rope, check_model_type, check_supported, geometry

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 256,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
WINDOWED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
TINY: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-linear": {"model_type": "llama", "rope_parameters": LINEAR},
    "llama-llama3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama-yarn": {"model_type": "llama", "rope_parameters": YARN},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-sliding": {"model_type": "mistral", "sliding_window": 8},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-sliding": {"model_type": "qwen2", **WINDOWED},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3-sliding": {"model_type": "qwen3", "head_dim": 16, **WINDOWED},
}


def tiny(**kwargs: Any) -> PretrainedConfig:
    return AutoConfig.for_model(**{**SHAPE, **kwargs})


@pytest.fixture(params=TINY, ids=str)
def config(request: pytest.FixtureRequest) -> PretrainedConfig:
    return tiny(**TINY[request.param])


def test_every_supported_model_type_has_a_tiny_model():
    assert {x["model_type"] for x in TINY.values()} == set(SUPPORTED)


def test_supported_configurations_pass(config):
    check_supported(config)


def test_geometry_agrees_with_transformers_own_cache_and_projections(config):
    layers = geometry(config)
    assert len(layers) == config.num_hidden_layers
    model = AutoModelForCausalLM.from_config(config)
    cache = DynamicCache(config=config)
    for own, layer, cached in zip(layers, model.model.layers, cache.layers, strict=True):
        assert layer.self_attn.head_dim == own.head_dim
        assert layer.self_attn.k_proj.out_features == own.num_kv_heads * own.head_dim
        assert layer.self_attn.q_proj.out_features == own.num_heads * own.head_dim
        assert getattr(cached, "sliding_window", None) == own.window
        assert (own.kind == "sliding") == (own.window is not None)


def test_a_window_is_as_long_as_the_models_own_mask_says():
    """A token that the geometry puts outside the window changes nothing; the first inside it does."""
    config = tiny(model_type="mistral", sliding_window=8, num_hidden_layers=1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    window = geometry(config)[0].window
    ids = torch.arange(20)[None] % 60
    with torch.no_grad():
        last = model(ids).logits[0, -1]
        outside, inside = ids.clone(), ids.clone()
        outside[0, 19 - window] = inside[0, 20 - window] = 63
        assert torch.equal(model(outside).logits[0, -1], last)
        assert not torch.allclose(model(inside).logits[0, -1], last)


def test_head_dim_need_not_be_hidden_over_heads():
    assert geometry(tiny(model_type="qwen3", head_dim=16))[0] == LayerGeometry(2, 4, 16)
    assert geometry(tiny(model_type="llama"))[0] == LayerGeometry(2, 4, 8)


@pytest.mark.parametrize(
    ("model_type", "named"),
    [("gemma3_text", "Gemma 3"), ("gpt_oss", "GPT-OSS"), ("mixtral", "Mixtral"), ("bert", "'bert'"), (None, "no mo")],
)
def test_other_model_types_are_refused_by_name(model_type, named):
    with pytest.raises(InputError, match=named) as error:
        check_model_type(model_type)
    assert all(x in str(error.value) for x in SUPPORTED)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gemma2"}, "Gemma 2"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
                              "long_factor": [1.0] * 4, "original_max_position_embeddings": 32}}, "'longrope'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0,
                              "partial_rotary_factor": 0.5}}, "Partial RoPE"),
        ({"num_key_value_heads": 3}, "3 key/value heads"),
        ({"sliding_window": 8}, "sliding_window 8"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention'"),
        ({"model_type": "mistral", "sliding_window": 8,
          "layer_types": ["full_attention", "sliding_attention"]}, "Layer 0"),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}, "sliding_window is None"),
    ],
)  # fmt: skip
def test_unsupported_configurations_are_refused_by_name(change, named):
    config = tiny(**{"model_type": "llama", **change})
    with pytest.raises(InputError, match=named) as error:
        check_supported(config)
    assert str(error.value).count(". ") == 0


def test_rope_agrees_with_transformers(config):
    model = AutoModelForCausalLM.from_config(config).eval()
    rope, layer = Rope.from_model(model), geometry(config)[0]
    positions = torch.tensor([0, 1, 2, 31, 32, 33, 200, 255, 4000])
    x = torch.randn(1, layer.num_kv_heads, len(positions), layer.head_dim)
    cos, sin = model.model.rotary_emb(x, positions[None])
    assert torch.equal(rope.rotate(x, positions), apply_rotary_pos_emb(x, x, cos, sin)[1])


def test_rope_agrees_with_transformers_in_float64():
    model = AutoModelForCausalLM.from_config(tiny(**TINY["llama-yarn"])).double().eval()
    x, positions = torch.randn(1, 2, 300, 8, dtype=torch.float64), torch.arange(300)
    cos, sin = model.model.rotary_emb(x, positions[None])
    rotated = Rope.from_model(model).rotate(x, positions)
    assert rotated.dtype == torch.float64
    torch.testing.assert_close(rotated, apply_rotary_pos_emb(x, x, cos, sin)[1], rtol=0, atol=1e-12)


def test_yarn_scales_attention():
    rope = Rope.from_model(AutoModelForCausalLM.from_config(tiny(**TINY["llama-yarn"])))
    assert rope.attention_scaling > 1
    x = torch.randn(5, 8)
    norm = rope.rotate(x, torch.arange(5)).norm(dim=-1)
    torch.testing.assert_close(norm, rope.attention_scaling * x.norm(dim=-1))


def test_half_precision_is_computed_in_float32():
    rope = Rope.from_model(AutoModelForCausalLM.from_config(tiny(model_type="llama")))
    assert rope.rotate(torch.randn(3, 8, dtype=torch.bfloat16), torch.arange(3)).dtype == torch.float32


@settings(max_examples=50)
@given(
    pairs=st.integers(1, 32),
    tokens=st.integers(1, 9),
    start=st.integers(0, 1 << 20),
    theta=st.floats(10.0, 1e6),
    scaling=st.floats(0.5, 2.0),
    double=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_unrotate_undoes_rotate(pairs, tokens, start, theta, scaling, double, seed):
    rope = Rope(theta ** -(torch.arange(pairs) / pairs), scaling)
    dtype = torch.float64 if double else torch.float32
    x = torch.randn(2, 3, tokens, 2 * pairs, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    positions = start + torch.arange(tokens)
    tolerance = 1e-13 if double else 1e-5
    torch.testing.assert_close(rope.unrotate(rope.rotate(x, positions), positions), x, rtol=0, atol=tolerance)
    torch.testing.assert_close(rope.rotate(rope.unrotate(x, positions), positions), x, rtol=0, atol=tolerance)
