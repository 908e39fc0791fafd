"""Caches that store residuals: the same function in chunks of any size, for every architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from kvcli.errors import InputError, KvcliError
from kvcli.models.architectures import Rope, geometry
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.quant.prediction import Linear, Predictor, Source
from kvcli.runtime.packed_cache import PackedCache
from kvcli.runtime.packed_layer import PackedLayer

TOKENS = 72
TOKEN, CHANNEL = KVFormat(3, group=8), KVFormat(4, axis="channel", group=16)
SETTINGS: dict[str, dict[str, Any]] = {
    "windowed": {"k": CHANNEL, "v": TOKEN, "block_size": 16, "sink_tokens": 3, "residual_window": 5},
    "portable": {"k": TOKEN, "v": TOKEN, "block_size": 16},
    "rotated": {"k": TOKEN, "v": TOKEN, "block_size": 32, "rope": "before", "transform": "hadamard", "center": True},
    "rotated-after": {"k": TOKEN, "v": TOKEN, "residual_window": 20, "transform": "hadamard", "center": True},
}


def predictor(index: int, earlier: list[int], kind: str) -> Predictor:
    """Return one layer's predictors: everything earlier of its kind, or its own keys alone."""
    if kind == "absorbed":
        return Predictor(v=Linear((Source(index, "k"),)))
    seen = tuple(Source(i, w) for i in earlier for w in ("k", "v"))
    return Predictor(Linear(seen) if seen else None, Linear((Source(index, "k"), *seen)))


def plan_of(model: PreTrainedModel, kind: str, fields: dict[str, Any]) -> CachePlan:
    shared = {k: x for k, x in fields.items() if k in ("block_size", "sink_tokens", "residual_window")}
    layers: list[LayerPlan] = []
    for i, x in enumerate(geometry(model.config)):
        earlier = [j for j, y in enumerate(layers) if y.kind == x.kind]
        own = {k: y for k, y in fields.items() if k not in shared}
        layers.append(
            LayerPlan(
                x.num_kv_heads, x.head_dim, kind=x.kind, window=x.window, predictor=predictor(i, earlier, kind), **own
            )
        )
    return CachePlan(tuple(layers), dtype=str(model.dtype).removeprefix("torch."), **shared)


def tensors_of(plan: CachePlan) -> dict[str, Tensor]:
    """Return predictors so large that leaving one out would show."""
    generator = torch.Generator().manual_seed(1)
    dtypes = {"F16": torch.float16, "F32": torch.float32}
    return {
        name: (0.3 * torch.randn(shape, generator=generator)).to(dtypes[dtype])
        for name, (dtype, shape) in plan.model_tensors().items()
    }


def run(model: PreTrainedModel, plan: CachePlan, ids: Tensor, chunks: list[int], **more: Any) -> Tensor:
    cache = PackedCache(plan, batch_size=len(ids), rope=Rope.from_model(model), tensors=tensors_of(plan), **more)
    logits, at = [], 0
    for chunk in chunks:
        logits.append(model(ids[:, at : at + chunk], past_key_values=cache).logits)
        at += chunk
        assert not any(x._rebuilt for x in cache.stores)  # no decoded copy outlives a pass
    assert cache.lengths == [ids.shape[1]] * len(ids)
    return torch.cat(logits, 1)


def text(rows: int = 1, tokens: int = TOKENS) -> Tensor:
    return torch.randint(0, 96, (rows, tokens), generator=torch.Generator().manual_seed(3))


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("kind", ["absorbed", "always"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_any_chunks_give_the_same_logits(
    tiny: Callable[..., PreTrainedModel], architecture: str, setting: str, kind: str
) -> None:
    model = tiny(architecture, torch.float64)
    plan = plan_of(model, kind, SETTINGS[setting])
    ids = text()
    whole = run(model, plan, ids, [TOKENS])
    exact = model(ids, past_key_values=PackedCache(plan.as_exact())).logits
    assert (whole - exact).abs().max() > 1e-2  # 3 bits show
    for chunks in ([7] * (TOKENS // 7) + [TOKENS % 7], [1] * TOKENS):
        # sums over other shapes differ by 1e-16, and float16 windows and codes forget that
        assert torch.allclose(run(model, plan, ids, chunks), whole, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("float64_norms")
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chunks=st.lists(st.integers(1, 40), min_size=1, max_size=6), window=st.integers(0, 20), sinks=st.integers(0, 20))
def test_flushes_and_page_borders_do_not_show(
    tiny: Callable[..., PreTrainedModel], chunks: list[int], window: int, sinks: int
) -> None:
    model, n = tiny("qwen3", torch.float64), sum(chunks)
    fields = {**SETTINGS["windowed"], "residual_window": window, "sink_tokens": sinks}
    plan = plan_of(model, "always", fields)
    ids = text(tokens=n)
    assert torch.allclose(run(model, plan, ids, chunks), run(model, plan, ids, [n]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["absorbed", "always"])
def test_fine_residuals_give_the_exact_model(
    tiny: Callable[..., PreTrainedModel], architecture: str, kind: str
) -> None:
    """Whatever the predictors say, keys and values are what they were: the residual makes up for it."""
    model = tiny(architecture)
    fine = KVFormat(8, group=4)
    plan = plan_of(model, kind, {**SETTINGS["rotated"], "k": fine, "v": fine})
    exact = model(text(), past_key_values=PackedCache(plan.as_exact())).logits
    near = run(model, plan, text(), [TOKENS])
    assert (near - exact).norm() / exact.norm() < 0.05
    zeros = {name: torch.zeros_like(x) for name, x in tensors_of(plan).items()}
    cache = PackedCache(plan, rope=Rope.from_model(model), tensors=zeros)
    assert not torch.equal(model(text(), past_key_values=cache).logits, near)


@pytest.mark.usefixtures("float64_norms")
def test_rows_of_a_batch_do_not_mix(tiny: Callable[..., PreTrainedModel]) -> None:
    model = tiny("llama", torch.float64)
    plan = plan_of(model, "always", SETTINGS["windowed"])
    ids = text(3)
    together = run(model, plan, ids, [50, 40], capacity=TOKENS)
    for row in range(3):
        assert torch.allclose(run(model, plan, ids[row : row + 1], [TOKENS]), together[row], rtol=0, atol=1e-6)


def test_the_bytes_are_those_of_the_plan(tiny: Callable[..., PreTrainedModel], architecture: str) -> None:
    model = tiny(architecture)
    plan = plan_of(model, "always", SETTINGS["windowed"])
    cache = PackedCache(plan, capacity=TOKENS, rope=Rope.from_model(model), tensors=tensors_of(plan))
    model(text(), past_key_values=cache)
    assert cache.nbytes == plan.bytes_at(TOKENS)
    plain = CachePlan(tuple(replace(x, predictor=None) for x in plan.layers), 16, 3, 5, plan.dtype)
    assert plan.bytes_at(TOKENS) == plain.bytes_at(TOKENS)


def test_reading_a_layer_alone_rebuilds_what_it_needs(tiny: Callable[..., PreTrainedModel]) -> None:
    model = tiny("llama")
    plan = plan_of(model, "always", SETTINGS["windowed"])
    cache = PackedCache(plan, rope=Rope.from_model(model), tensors=tensors_of(plan))
    seen: list[Tensor] = []
    read = PackedLayer.read

    def remember(layer: PackedLayer, row: int, stop: int | None = None) -> tuple[Tensor, Tensor, int]:
        found = read(layer, row, stop)
        if layer.index == 1:
            seen.append(found[0])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedLayer, "read", remember)
        model(text(), past_key_values=cache)
    assert torch.equal(cache.stores[1].read(0)[0], seen[-1])


def test_absorbing_is_the_same_sum(tiny: Callable[..., PreTrainedModel]) -> None:
    """o = W (Σ p K̂) + m b + Σ p R̂, with m the mass on packed tokens: what a kernel that reads codes only computes."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    heads, dim, tokens, packed = 2, 8, 40, 30
    width = heads * dim
    k, residual, exact, weight, bias = (
        random(tokens, width), random(tokens, width), random(tokens, width), random(width, width), random(width),
    )  # fmt: skip
    p = random(heads, tokens).softmax(-1)
    values = torch.where(torch.arange(tokens)[:, None] < packed, k @ weight.t() + bias + residual, exact)
    for head in range(heads):
        own = slice(head * dim, (head + 1) * dim)
        plain = p[head] @ values[:, own]
        near, far = p[head, :packed], p[head, packed:]
        absorbed = weight[own] @ (near @ k[:packed]) + near.sum() * bias[own]
        absorbed = absorbed + near @ residual[:packed, own] + far @ exact[packed:, own]
        assert torch.allclose(absorbed, plain)


def test_a_missing_predictor_is_named(tiny: Callable[..., PreTrainedModel]) -> None:
    model = tiny("llama")
    plan = plan_of(model, "absorbed", SETTINGS["windowed"])
    tensors = tensors_of(plan)
    del tensors["layer.1.v.predictor.weight"]
    with pytest.raises(InputError, match=r"tensor layer\.1\.v\.predictor\.weight is missing"):
        PackedCache(plan, rope=Rope.from_model(model), tensors=tensors)
    with pytest.raises(InputError, match="rotary embedding, and none was given"):
        PackedCache(plan, tensors=tensors_of(plan))


def test_a_layer_must_be_connected_to_what_it_reads(tiny: Callable[..., PreTrainedModel]) -> None:
    model = tiny("llama")
    plan = plan_of(model, "always", {**SETTINGS["portable"]})
    alone = PackedLayer(plan, 1, rope=Rope.from_model(model), tensors=tensors_of(plan))
    x = torch.zeros(2, 2, 8)
    with pytest.raises(KvcliError, match="predicted from layer 0, to which it is not connected"):
        alone.append(0, alone.exact(0, x, x))
