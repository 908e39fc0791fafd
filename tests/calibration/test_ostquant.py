"""Fused transforms leave the function as it is, change what is cached as they say, and need every part they fuse."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package
from transform_models import ALL, IDS, MODELS, build, cached, difference, each_model, logits, random_parameters

from kvcli.calibration.fusing import fuse, fused
from kvcli.calibration.ostquant import (
    KV,
    DownHadamard,
    Fused,
    KeyScale,
    NormGains,
    ResidualRotation,
    ValueRotation,
    ValueScale,
    identity,
    shapes,
    transforms,
)
from kvcli.errors import InputError
from kvcli.models.architectures import SUPPORTED, geometry
from kvcli.protocols import Transform


def test_every_supported_model_type_is_among_them() -> None:
    assert {x["model_type"] for x in MODELS.values()} == set(SUPPORTED)


# --- the function stays -----------------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("names", [*((x,) for x in ALL), KV, ALL], ids=lambda x: "+".join(x))
def test_random_transforms_leave_the_logits(architecture: str, names: Sequence[str]) -> None:
    model = build(architecture)
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    maps = transforms(model.config, random_parameters(model, names))
    fuse(model, maps)
    assert difference(logits(model), before) < 1e-11
    touched = {name.split(".")[-2] for name, x in model.state_dict().items() if not torch.equal(x, weights[name])}
    expected = {module for each in maps for module in each.fused}
    gains = {"norm", "input_layernorm", "post_attention_layernorm"} if "r_res" in names else set()
    assert touched == expected | gains


@each_model
def test_all_together_in_float32(architecture: str) -> None:
    model = build(architecture, torch.float32)
    before = logits(model)
    fuse(model, transforms(model.config, random_parameters(model)))
    assert model.dtype == torch.float32
    assert difference(logits(model), before) < 1e-4


@each_model
def test_bfloat16_is_rounded_once(architecture: str) -> None:
    half = build(architecture, torch.bfloat16)
    exact = copy.deepcopy(half).double()
    for model in (half, exact):
        fuse(model, transforms(model.config, random_parameters(model)))
    for name, weight in half.state_dict().items():
        assert torch.equal(weight, exact.state_dict()[name].bfloat16()), name


@each_model
def test_every_weight_that_a_transform_fuses_is_needed(architecture: str) -> None:
    """Leave out one weight or bias of one layer at a time: each time the logits must change."""
    model = build(architecture)
    before, layer = logits(model), "model.layers.1."
    every = {**dict(model.named_parameters()), "lm_head.weight": model.lm_head.weight}
    for name in ALL:
        maps = transforms(model.config, random_parameters(model, [name]))
        whole = fused(every, maps)
        for left_out in [x for x in whole if x.startswith(layer) or not x.startswith("model.layers.")]:
            if torch.equal(whole[left_out], every[left_out]):
                continue
            parts = {**every, **whole, left_out: every[left_out]}
            with torch.no_grad():
                out = functional_call(model, parts, (IDS,), {"use_cache": False}, tie_weights=False).logits
            assert difference(out, before) > 1e-6, (name, left_out)
        with torch.no_grad():  # the same call with nothing left out
            out = functional_call(model, {**every, **whole}, (IDS,), {"use_cache": False}, tie_weights=False).logits
        assert difference(out, before) < 1e-11, name


@each_model
def test_gains_alone(architecture: str) -> None:
    model = build(architecture)
    before = logits(model)
    fuse(model, [NormGains()])
    for layer in model.model.layers:
        assert layer.input_layernorm.weight.eq(1).all()
        assert layer.post_attention_layernorm.weight.eq(1).all()
    assert model.model.norm.weight.eq(1).all()
    assert difference(logits(model), before) < 1e-11


def test_a_gain_needs_all_that_reads_it() -> None:
    model = build("llama")
    weights = dict(model.named_parameters())
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(InputError, match="post_attention_layernorm"):
        ResidualRotation(torch.eye(48)).fuse(weights)


def test_order_does_not_matter_where_it_might_be_mistaken() -> None:
    """A norm that S_attn has scaled is folded into q, k and v before R_res rotates."""
    model = build("qwen2")
    before = logits(model)
    fuse(model, transforms(model.config, random_parameters(model))[::-1])
    assert difference(logits(model), before) < 1e-11


# --- what is cached ---------------------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("names", [*((x,) for x in KV), KV], ids=lambda x: "+".join(x))
def test_keys_and_values_change_as_the_transforms_say(architecture: str, names: Sequence[str]) -> None:
    model = build(architecture)
    before = cached(model)
    parameters = random_parameters(model, names)
    maps = transforms(model.config, parameters)
    fuse(model, maps)
    for i, ((k, v), (new_k, new_v)) in enumerate(zip(before, cached(model), strict=True)):
        # written out once more, from the table
        want_k, want_v = k, v
        if "s_qk" in names:
            want_k = k * torch.cat([parameters["s_qk"][i]] * 2, dim=-1)[:, None]
        if "r_ov" in names:
            want_v = want_v @ parameters["r_ov"][i]
        if "s_ov" in names:
            want_v = want_v / parameters["s_ov"][i][:, None]
        torch.testing.assert_close(new_k, want_k, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(new_v, want_v, rtol=1e-9, atol=1e-11)
        assert ("s_qk" in names) == (not torch.allclose(new_k, k))
        assert ({"r_ov", "s_ov"} & set(names) != set()) == (not torch.allclose(new_v, v))
        for each in maps:
            k, v = each.forward(i, "k", k), each.forward(i, "v", v)
        torch.testing.assert_close(new_k, k, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(new_v, v, rtol=1e-9, atol=1e-11)


@each_model
@pytest.mark.parametrize("name", ["r_res", "s_attn", "s_ffn", "s_ud"])
def test_the_others_leave_keys_and_values(architecture: str, name: str) -> None:
    model = build(architecture)
    before = cached(model)
    fuse(model, transforms(model.config, random_parameters(model, [name])))
    for old, new in zip(before, cached(model), strict=True):
        for a, b in zip(old, new, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)


def test_the_others_map_as_the_table_says() -> None:
    """Its way round leaves the function too, but learning rates and reports mean this one."""
    model = build("llama-biases")
    old = {name: x.clone() for name, x in model.named_parameters()}
    names = ("s_attn", "s_ffn", "s_ud")
    parameters = random_parameters(model, names)
    fuse(model, transforms(model.config, parameters))
    new, layer = dict(model.named_parameters()), "model.layers.1."
    attn, ffn, ud = (parameters[name][1] for name in names)
    expected = {
        "input_layernorm.weight": lambda x: x / attn,
        "post_attention_layernorm.weight": lambda x: x / ffn,
        "self_attn.k_proj.weight": lambda x: x * attn,
        "mlp.gate_proj.weight": lambda x: x * ffn,
        "mlp.up_proj.weight": lambda x: x * ffn / ud[:, None],
        "mlp.up_proj.bias": lambda x: x / ud,
        "mlp.down_proj.weight": lambda x: x * ud,
    }
    for name, mapped in expected.items():
        torch.testing.assert_close(new[layer + name], mapped(old[layer + name]))
    rotated = build("llama-biases")
    r = random_parameters(rotated, ["r_res"])
    fuse(rotated, transforms(rotated.config, r))
    torch.testing.assert_close(rotated.model.embed_tokens.weight, old["model.embed_tokens.weight"] @ r["r_res"])


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(ALL), which=st.sampled_from(["k", "v"]),
       architecture=st.sampled_from(sorted(MODELS)), tokens=st.integers(1, 5))  # fmt: skip
def test_inverses_are_exact(seed: int, name: str, which: Any, architecture: str, tokens: int) -> None:
    model = build(architecture)
    (each,) = transforms(model.config, random_parameters(model, [name], seed))
    assert isinstance(each, Transform)
    kv = geometry(model.config)[0]
    x = torch.randn(2, kv.num_kv_heads, tokens, kv.head_dim, dtype=torch.float64)
    there = each.forward(1, which, x)
    assert there.shape == x.shape
    assert (name in KV and (which == "k") == (name == "s_qk")) == (not torch.equal(there, x))
    torch.testing.assert_close(each.inverse(1, which, there), x, rtol=0, atol=1e-13)
    torch.testing.assert_close(each.forward(1, which, each.inverse(1, which, x)), x, rtol=0, atol=1e-13)
    half = each.forward(1, which, x.bfloat16())
    assert half.dtype == torch.bfloat16


@each_model
@pytest.mark.parametrize("wrong", ["untied", "interleaved"])
def test_keys_must_be_scaled_in_the_pairs_that_rope_turns(architecture: str, wrong: str) -> None:
    model = build(architecture)
    before = logits(model)
    (scale,) = transforms(model.config, random_parameters(model, ["s_qk"]))
    assert isinstance(scale, KeyScale)
    half = scale.value.chunk(2, dim=-1)[0]
    other = random_parameters(model, ["s_qk"], seed=1)["s_qk"]
    scale.value = torch.cat((half, other), -1) if wrong == "untied" else half.repeat_interleave(2, dim=-1)
    fuse(model, [scale])
    assert difference(logits(model), before) > 1e-4


def test_with_qk_norm_keys_cannot_be_scaled_in_their_weights() -> None:
    model = build("qwen3")
    before = logits(model)
    value = random_parameters(build("llama"), ["s_qk"])["s_qk"].repeat(1, 1, 4)  # one for each of 2 heads
    fuse(model, [KeyScale(value, qk_norm=False)])
    assert difference(logits(model), before) > 1e-4


# --- parameters -------------------------------------------------------------------------------------------------------


@each_model
def test_the_identity_changes_no_weight(architecture: str) -> None:
    model = build(architecture)
    fuse(model, [NormGains()])
    weights = copy.deepcopy(model.state_dict())
    fuse(model, transforms(model.config, identity(model.config, ALL)))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_unknown_names_are_refused() -> None:
    model = build("llama")
    with pytest.raises(InputError, match="no transform 'r_none'"):
        transforms(model.config, {"r_none": torch.eye(2)})
    with pytest.raises(InputError, match="no transform 'r_none'"):
        identity(model.config, ["r_none"])
    with pytest.raises(InputError, match=r"'transformer\.wte\.weight' has no place"):
        DownHadamard().fuse({"transformer.wte.weight": torch.eye(2)})


def test_fusing_is_differentiable_in_every_parameter() -> None:
    model = build("qwen3-tied-biases")
    parameters = {k: v.requires_grad_() for k, v in random_parameters(model).items()}
    weights = {**dict(model.named_parameters()), "lm_head.weight": model.lm_head.weight}
    generator = torch.Generator().manual_seed(0)
    probe = {k: torch.randn(v.shape, dtype=torch.float64, generator=generator) for k, v in weights.items()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        new = fused(weights, transforms(model.config, values))
        return torch.stack([(x * probe[name]).sum() for name, x in new.items()]).sum()

    grads = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for (name, value), grad in zip(parameters.items(), grads, strict=True):
        direction = torch.randn(value.shape, dtype=torch.float64, generator=generator)
        step = 1e-6
        with torch.no_grad():
            up, down = (loss({**parameters, name: value + x * direction}) for x in (step, -step))
        torch.testing.assert_close((grad * direction).sum(), (up - down) / (2 * step), rtol=1e-5, atol=1e-5)


def test_a_learner_may_fuse_in_float32() -> None:
    model = build("llama-tied", torch.float32)
    before = logits(model)
    parameters = {k: v.float() for k, v in random_parameters(model).items()}
    maps = transforms(model.config, parameters, dtype=torch.float32)
    weights = {**dict(model.named_parameters()), "lm_head.weight": model.lm_head.weight}
    changed = fused(weights, maps)
    assert {x.dtype for x in changed.values()} == {torch.float32}
    with torch.no_grad():
        out = functional_call(model, {**weights, **changed}, (IDS,), {"use_cache": False}, tie_weights=False).logits
    assert difference(out, before) < 1e-3


def test_classes_state_what_is_fused_where() -> None:
    config = build("qwen3").config
    maps = transforms(config, identity(config, ALL))
    assert [x.name for x in maps] == list(shapes(config))
    assert all(isinstance(x, Fused) and not x.online and not x.tensors() for x in maps)
    assert set(next(x for x in maps if x.name == "s_qk").fused) == {"k_norm", "q_norm"}
    assert isinstance(DownHadamard(), Transform)
    assert DownHadamard().online == ("down",)
    assert isinstance(NormGains(), Transform)


def test_value_scales_and_rotations_compose_in_the_tables_order() -> None:
    model = build("llama")
    parameters = random_parameters(model, ["s_ov", "r_ov"])
    first, second = transforms(model.config, parameters)
    assert isinstance(first, ValueRotation)
    assert isinstance(second, ValueScale)
