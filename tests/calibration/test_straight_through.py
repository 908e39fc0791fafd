"""Storage as learning sees it: forwards the packed cache itself, backwards a slope that no scaling can cheat."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvcli.calibration.straight_through import Storage, TrainingLayer, quantized, quantized_weight
from kvcli.models.architectures import Rope
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.quant.quantizer import dequantize, quantize
from kvcli.quant.weight_format import WeightFormat
from kvcli.runtime.attention import attend
from kvcli.runtime.codec import Codec
from kvcli.runtime.packed_layer import PackedLayer

HEADS, TOKENS, DIM = 2, 96, 32
FORMATS = [
    KVFormat(3, group=32, grid="gaussian", scale_dtype="e5m3"),
    KVFormat(2, group=16, scale_dtype="e5m3"),
    KVFormat(4, group=32, symmetric=False),
    KVFormat(2, axis="channel", group=16, grid="gaussian"),
    KVFormat(3, axis="channel", group=16, symmetric=False),
]  # fmt: skip
ROPE = Rope(10000.0 ** -(torch.arange(DIM // 2).float() / (DIM // 2)))


def random(*shape: int, seed: int = 0) -> Tensor:
    # float16 is what the packed cache is given in the end
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half().float()


def plan_of(fmt: KVFormat, *, transform: str = "hadamard", center: bool = True, window: int | None = None) -> CachePlan:
    kind = "full" if window is None else "sliding"
    layer = LayerPlan(HEADS, DIM, fmt, fmt, transform=transform, center=center, kind=kind, window=window)
    return CachePlan((layer,), sink_tokens=4, residual_window=8)


def means() -> dict[str, Tensor]:
    return {f"layer.0.{x}.mean": random(HEADS, DIM, seed=i) for i, x in enumerate("kv")}


def storage(plan: CachePlan) -> Storage:
    return Storage(plan, 0, ROPE, {"k": means()["layer.0.k.mean"], "v": means()["layer.0.v.mean"]})


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_forwards_it_is_the_quantiser_itself(fmt: KVFormat) -> None:
    x = random(HEADS, TOKENS, DIM)
    torch.testing.assert_close(quantized(x, fmt), dequantize(quantize(x, fmt), fmt), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("transform", ["none", "hadamard"])
def test_storage_is_the_codec_of_the_packed_cache(fmt: KVFormat, transform: str) -> None:
    plan, slots = plan_of(fmt, transform=transform), torch.arange(TOKENS)
    codec, store = Codec(plan, 0, ROPE, means()), storage(plan)
    for which in ("k", "v"):
        x = random(HEADS, TOKENS, DIM, seed=7)
        decoded = codec.decode(which, codec.encode(which, x, slots), slots)
        torch.testing.assert_close(store(which, x), decoded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 24])
def test_a_layer_in_training_attends_as_the_packed_cache_does(window: int | None) -> None:
    plan = plan_of(FORMATS[0], window=window)
    q, k, v = random(6, TOKENS, DIM, seed=1), random(HEADS, TOKENS, DIM, seed=2), random(HEADS, TOKENS, DIM, seed=3)
    layer = TrainingLayer(plan, 0, storage(plan))
    found = layer.attend(torch.nn.Identity(), q[None], k[None], v[None], None, 0.3)[0]
    packed = PackedLayer(plan, 0, capacity=TOKENS, rope=ROPE, tensors=means())
    torch.testing.assert_close(found, attend(packed, 0, q, k, v, 0.3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_growing_does_not_seem_to_pay(fmt: KVFormat) -> None:
    # codes do not change when all grows alike, so neither does the relative error, and the slope must know it
    x = random(HEADS, TOKENS, DIM)
    factor = torch.ones((), requires_grad=True)
    target = random(HEADS, TOKENS, DIM, seed=5)
    loss = ((quantized(x * factor, fmt) / factor) * target).sum()
    (slope,) = torch.autograd.grad(loss, factor)
    assert abs(float(slope)) < 1e-3 * float(loss.detach().abs() + target.norm())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_backwards_rounding_is_passed_through(fmt: KVFormat) -> None:
    x = random(HEADS, TOKENS, DIM).requires_grad_()
    (slope,) = torch.autograd.grad(quantized(x, fmt).sum(), x)
    assert slope.isfinite().all()
    assert float(slope.mean()) == pytest.approx(1, abs=0.2)


def test_nothing_but_zeros_stays_so_and_has_a_slope() -> None:
    for fmt in FORMATS:
        x = torch.zeros(1, 16, DIM, requires_grad=True)
        out = quantized(x, fmt)
        assert not out.any()
        (slope,) = torch.autograd.grad(out.sum(), x)
        assert slope.isfinite().all()


def test_weights_are_rounded_to_their_format() -> None:
    weight, fmt = random(8, 64).requires_grad_(), WeightFormat(4, 32)
    groups = fmt.groups(weight.detach())
    scale, zero = fmt.grid(groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True))
    expected = fmt.decode(fmt.encode(groups, scale, zero), scale, zero).reshape(8, 64)
    found = quantized_weight(weight, fmt)
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-6)
    (slope,) = torch.autograd.grad(found.sum(), weight)
    assert slope.isfinite().all()
    assert slope.any()
