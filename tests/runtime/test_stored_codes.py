"""Codes of checkpoints on the native runtime: exactly those weights, whatever their groups and order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcli.calibration.quantized_weights import LayerQuantizer
from kvcli.models.loading import load
from kvcli.models.quantized import QuantizedWeights, gptq_config
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant import stored
from kvcli.quant.format import KVFormat
from kvcli.quant.stored import GptqLinear
from kvcli.quant.weight_format import WeightFormat
from kvcli.runtime import kvrt
from kvcli.runtime.linear import Codes, Grid, Int4
from kvcli.runtime.runner import ModelRunner
from kvcli.runtime.stored_codes import NF4, codes_of

try:
    kvrt.library("cpu")
except kvrt.NativeError as error:
    pytest.skip(f"needs the native kernels: {error}", allow_module_level=True)


def layer_of(
    bits: int, group: int, groups: int, *, out: int = 32, act_order: bool = False, seed: int = 0
) -> GptqLinear:
    g, fmt = torch.Generator().manual_seed(seed), WeightFormat(bits, group)
    codes = torch.randint(0, fmt.levels + 1, (out, group * groups), generator=g)
    scale = (torch.rand(out, groups, generator=g) * 0.1 + 0.001).half().float()
    packed = fmt.pack(codes, scale, torch.randint(1, fmt.levels + 1, (out, groups), generator=g).float())
    if act_order:
        order = torch.randperm(group * groups, generator=torch.Generator().manual_seed(9))
        packed["g_idx"] = packed["g_idx"][order]
    return GptqLinear(packed, fmt)


def weight_of(codes: Codes) -> Tensor:
    """The weight that codes stand for, float32 and in the inputs' order."""
    scale, zero = (x.float().repeat_interleave(codes.group, 1) for x in (codes.scale, codes.zero))
    table = torch.tensor(NF4)
    weight = table[codes.codes.long()] * scale if codes.grid == Grid.NF4 else (codes.codes.float() - zero) * scale
    return weight if codes.order is None else weight[:, codes.order.argsort()]


def product(codes: Codes, x: Tensor) -> Tensor:
    out = torch.full((len(x), len(codes.codes)), torch.nan, dtype=torch.bfloat16)
    layer = Int4(codes)
    layer.bind(x, out)()
    return out.float()


@given(
    st.sampled_from((3, 4)), st.sampled_from((32, 64, 128, 1536)), st.integers(1, 3), st.booleans(), st.integers(1, 3),
    st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=20)
def test_no_weight_is_rounded_again(bits, group, groups, act_order, count, seed):
    layers = [layer_of(bits, group, groups, act_order=act_order, seed=seed + i) for i in range(count)]
    codes = codes_of(layers)
    assert codes is not None
    assert torch.equal(weight_of(codes), torch.cat([x.dequantize() for x in layers]))
    assert codes.group <= 1024


def test_a_short_last_group_makes_the_others_shorter():
    layer = layer_of(4, 128, 3)
    short = {**layer.tensors, "g_idx": (torch.arange(384) // 256).int()}
    short |= {name: layer.tensors[name][:2].clone() for name in ("scales", "qzeros")}
    whole = GptqLinear(short, WeightFormat(4, 256))
    codes = codes_of([whole])
    assert codes is not None
    assert codes.group == 128
    assert torch.equal(weight_of(codes), whole.dequantize())


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_products_are_those_of_the_weights(rows, act_order, bits):
    layer = layer_of(bits, 64, 2, act_order=act_order)
    codes = codes_of([layer])
    assert codes is not None
    assert (codes.order is None) != act_order
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = x.float() @ layer.dequantize().t()
    assert float((product(codes, x) - expected).norm() / expected.norm()) < 0.006


@pytest.mark.parametrize("rows", [1, 70])
def test_nf4_is_looked_up(rows):
    pytest.importorskip("bitsandbytes")
    layer = stored.nf4(torch.randn(48, 128, generator=torch.Generator().manual_seed(0)))
    codes = codes_of([layer, layer])
    assert codes is not None
    assert codes.codes.shape == (96, 128)
    assert float((weight_of(codes)[48:] - layer.dequantize()).abs().max()) < 1e-3 * float(
        layer.dequantize().abs().max()
    )
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = (x.float() @ layer.dequantize().t()).repeat(1, 2)
    assert float((product(codes, x) - expected).norm() / expected.norm()) < 0.006


def test_what_kernels_do_not_read_is_left_to_16_bits():
    assert codes_of([]) is None
    assert codes_of([layer_of(8, 64, 2)]) is None
    assert codes_of([layer_of(4, 64, 2), layer_of(4, 64, 2, act_order=True)]) is None
    assert codes_of([stored.llm_int8(torch.ones(8, 64))]) is None
    layer = layer_of(4, 64, 2)
    wide = {**layer.tensors, "scales": layer.tensors["scales"].float() * 1.0001}
    assert codes_of([replace(layer, tensors=wide)]) is None


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_quantised_model_decodes_as_the_reference(bits: int, tinystories: Path) -> None:
    loaded = load(str(tinystories), dtype="bfloat16")
    fmt = WeightFormat(bits, 128)
    work = LayerQuantizer(loaded, torch.empty(0, 8, dtype=torch.int64), {128: fmt, 384: fmt}, "rtn")
    layers: dict[str, Any] = {}
    for i in range(2):
        layers |= work.quantize(i)[0]
    loaded = replace(loaded, quantized=QuantizedWeights(gptq_config(fmt), layers))
    ids = torch.randint(3, 2000, (24,), generator=torch.Generator().manual_seed(2))
    loaded.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = loaded.model(ids[None]).logits[0].float().log_softmax(-1)
    exact = KVFormat.exact()
    plan = CachePlan(
        tuple(LayerPlan(g.num_kv_heads, g.head_dim, exact, exact) for g in loaded.geometry), dtype="float32"
    )
    runner = ModelRunner(loaded, plan, capacity=32, threads=1)
    assert (runner.dtype == torch.bfloat16) == (bits < 8)  # codes compute in bf16; 8 bits are in the plan's dtype
    assert isinstance(runner.weights.layers[0].o, Int4) == (bits < 8)
    found = torch.stack([runner.prefill(ids[:20]), *(runner.decode(x[None])[0].clone() for x in ids[20:])])
    found = found.log_softmax(-1)
    kl = (expected[19:].exp() * (expected[19:] - found)).sum(-1)
    assert float(kl.mean()) < 0.02
