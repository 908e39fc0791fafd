"""Attention against a reference that chooses, query by query and slot by slot, what is read packed and what exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kvcli.models.architectures import Rope
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime import attention
from kvcli.runtime.codec import Codec
from kvcli.runtime.packed_cache import PackedCache
from kvcli.runtime.packed_layer import PackedLayer

KV_HEADS, GROUP, DIM = 2, 3, 16
SCALING = 0.3
ROPE = Rope(10000.0 ** -(torch.arange(0, DIM, 2) / DIM))
MEANS = {
    f"layer.0.{w}.mean": torch.randn(KV_HEADS, DIM, generator=torch.Generator().manual_seed(i))
    for i, w in enumerate("kv")
}
FORMATS = (
    KVFormat(2, group=16),
    KVFormat(3, group=8, symmetric=False, scale_dtype="e5m3"),
    KVFormat(2, "channel", 16, symmetric=False),
    KVFormat(4, "channel", 8, grid="gaussian", scale_dtype="e5m3"),
    KVFormat(16),
    KVFormat(32),
)


@st.composite
def plans(draw: st.DrawFn) -> CachePlan:
    window = draw(st.sampled_from((None, None, 1, 5, 24, 50)))
    kind: Literal["full", "sliding"] = "full" if window is None else "sliding"
    layer = LayerPlan(
        KV_HEADS,
        DIM,
        draw(st.sampled_from(FORMATS)),
        draw(st.sampled_from(FORMATS)),
        kind=kind,
        window=window,
        rope=draw(st.sampled_from(("before", "after"))),
        transform=draw(st.sampled_from(("none", "hadamard"))),
        center=draw(st.booleans()),
    )
    return CachePlan(
        (layer,),
        block_size=draw(st.sampled_from((16, 32))),
        sink_tokens=draw(st.sampled_from((0, 1, 4, 20))),
        residual_window=draw(st.sampled_from((0, 1, 7, 20, 40))),
        dtype="float64",
    )


sizes = st.lists(st.integers(1, 60), min_size=1, max_size=6).filter(lambda x: sum(x) <= 100)


def inputs(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and values, and keys that queries tell apart, all float64."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(KV_HEADS * GROUP, n, DIM, dtype=torch.float64, generator=generator)
    key, value = torch.randn(2, KV_HEADS, n, DIM, dtype=torch.float64, generator=generator) * 2
    return query, key, value


def reconstructed(plan: CachePlan, key: Tensor, value: Tensor) -> list[Tensor]:
    """Return what pages give back for every slot. Tokens beyond the last full block are filled up with zeros."""
    n, block = key.shape[1], plan.block_size
    slots = torch.arange(-(-n // block) * block)
    codec = Codec(plan, 0, ROPE, MEANS)
    out = []
    for which, x in (("k", key), ("v", value)):
        stored = torch.zeros(KV_HEADS, len(slots), DIM, dtype=getattr(torch, plan.exact_dtype))
        stored[:, :n] = x
        out.append(codec.decode(which, codec.encode(which, stored, slots), slots)[:, :n].double())
    return out


def reference(plan: CachePlan, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """DESIGN's visibility, written out: which slots the query at t sees, and which of them from pages."""
    layer, block = plan.layers[0], plan.block_size
    exact = [x.to(getattr(torch, plan.exact_dtype)).double() for x in (key, value)]
    packed = reconstructed(plan, key, value)
    all_exact = layer.k.is_exact and layer.v.is_exact
    by_token = layer.k.is_token_wise and layer.v.is_token_wise
    portable = all_exact or (by_token and plan.sink_tokens == 0 and plan.residual_window == 0)
    out = torch.zeros_like(query)
    for t in range(query.shape[1]):
        n = t + 1
        boundary = n if portable else block * max(0, (n - plan.residual_window) // block)
        keys, values = [], []
        for slot in range(n):
            if layer.window is not None and slot <= t - layer.window:
                continue
            is_sink = slot < plan.sink_tokens and layer.window is None and not all_exact
            source = packed if slot < boundary and not is_sink else exact
            keys.append(source[0][:, slot])
            values.append(source[1][:, slot])
        k = torch.stack(keys, 1).repeat_interleave(GROUP, 0)
        v = torch.stack(values, 1).repeat_interleave(GROUP, 0)
        weights = torch.softmax((query[:, t, None] * k).sum(-1) * SCALING, dim=-1)
        out[:, t] = (weights[..., None] * v).sum(1)
    return out


def attend_in(plan: CachePlan, chunks: list[int], *qkv: Tensor, capacity: int = 0) -> Tensor:
    store = PackedLayer(plan, 0, capacity=capacity, rope=ROPE, tensors=MEANS)
    parts = zip(*(x.split(chunks, dim=1) for x in qkv), strict=True)
    return torch.cat([attention.attend(store, 0, q, k, v, SCALING) for q, k, v in parts], dim=1)


@given(plans(), sizes, st.integers(0, 5), st.sampled_from((1, 7, 256)), st.booleans())
@settings(max_examples=80)
def test_attention_is_the_reference(
    plan: CachePlan, chunks: list[int], seed: int, query_block: int, reserve: bool
) -> None:
    n = sum(chunks)
    qkv = inputs(n, seed)
    with mock.patch.object(attention, "QUERY_BLOCK", query_block):
        out = attend_in(plan, chunks, *qkv, capacity=n if reserve else 0)
    torch.testing.assert_close(out, reference(plan, *qkv), rtol=0, atol=1e-12)


@given(plans(), sizes)
@settings(max_examples=40)
def test_token_by_token_is_one_pass(plan: CachePlan, chunks: list[int]) -> None:
    n = sum(chunks)
    qkv = inputs(n, 0)
    whole = attend_in(plan, [n], *qkv)
    torch.testing.assert_close(attend_in(plan, [1] * n, *qkv), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(attend_in(plan, chunks, *qkv), whole, rtol=0, atol=1e-12)


@given(plans(), st.integers(2, 90), st.data())
@settings(max_examples=40)
def test_the_future_does_not_matter(plan: CachePlan, n: int, data: st.DataObject) -> None:
    # what a query reads was fixed when its token came: other later tokens in the same pass change nothing
    seen = data.draw(st.integers(1, n - 1))
    query, key, value = inputs(n, 0)
    other = [torch.cat((x[:, :seen], y[:, seen:]), 1) for x, y in zip((query, key, value), inputs(n, 1), strict=True)]
    a, b = attend_in(plan, [n], query, key, value), attend_in(plan, [n], *other)
    torch.testing.assert_close(a[:, :seen], b[:, :seen], rtol=0, atol=1e-13)


def test_quantisation_is_felt_exactly_where_it_should_be() -> None:
    # guards the tests above: with a window of 7 and blocks of 16, the query at 22 is the first that reads a page
    layer = LayerPlan(KV_HEADS, DIM, FORMATS[0], FORMATS[0])
    plan = CachePlan((layer,), residual_window=7, dtype="float64")
    exact = CachePlan((LayerPlan(KV_HEADS, DIM, KVFormat(16), KVFormat(16)),), dtype="float64")
    qkv = inputs(40, 0)
    error = (attend_in(plan, [40], *qkv) - attend_in(exact, [40], *qkv)).abs().amax((0, 2))
    assert error[:22].max() < 1e-12
    assert error[22:].min() > 1e-3


def test_visible_slots_by_hand() -> None:
    # block 16, window 2, one sink: the query at 16 (n = 17) still reads all exactly, at 17 (n = 18) slots 1 … 15 packed
    plan = CachePlan((LayerPlan(KV_HEADS, DIM, FORMATS[0], FORMATS[0]),), sink_tokens=1, residual_window=2)
    store = PackedLayer(plan, 0)
    slots, queries = torch.arange(20), torch.tensor([0, 16, 17])

    def seen(part: str) -> list[list[int]]:
        return [row.nonzero().flatten().tolist() for row in attention.visible(slots, queries, store, part)]

    assert seen("packed") == [[], [], list(range(1, 16))]
    assert seen("sinks") == [[], [], [0]]
    assert seen("exact") == [[0], list(range(17)), [16, 17]]


def test_the_result_has_the_querys_dtype() -> None:
    layer = LayerPlan(KV_HEADS, DIM, FORMATS[0], FORMATS[4])
    plan = CachePlan((layer,), sink_tokens=1, dtype="bfloat16")
    q, k, v = (x.bfloat16() for x in inputs(40, 0))
    out = attend_in(plan, [40], q, k, v)
    assert out.dtype == torch.bfloat16
    assert out.shape == q.shape
    torch.testing.assert_close(out.double(), reference(plan, q.double(), k.double(), v.double()), rtol=0, atol=0.05)


# --- a real model ---------------------------------------------------------------------------------------------------

TEXT = (
    "<|start_story|>Once upon a time, there was a little boy named Tim. Tim had a toy car that he loved to play with."
    " One day, he went to the park with his mom. Tim saw a toy car on the ground. Tim wanted to play with the car."
)
REAL_PLANS: dict[str, dict[str, Any]] = {
    "portable": {"k": KVFormat(4, group=16, grid="gaussian", scale_dtype="e5m3"), "v": KVFormat(3, group=16)},
    "kivi": {
        "k": KVFormat(2, "channel", 32, symmetric=False), "v": KVFormat(2, group=16, symmetric=False),
        "block_size": 32, "residual_window": 20,
    },
    "all at once": {
        "k": KVFormat(3, group=16), "v": KVFormat(2, "channel", 16), "sink_tokens": 4, "residual_window": 8,
        "rope": "before", "center": True, "transform": "hadamard",
    },
    "sliding": {"k": KVFormat(4, group=16), "v": KVFormat(16), "sink_tokens": 4, "kind": "sliding", "window": 24},
    "exact": {"k": KVFormat(16), "v": KVFormat(16)},
}  # fmt: skip


@pytest.fixture(scope="module")
def story_model(tinystories: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        tinystories, dtype=torch.float64, attn_implementation="kvcli"
    )
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def story(tinystories: Path) -> Tensor:
    ids: Tensor = AutoTokenizer.from_pretrained(tinystories)(TEXT, return_tensors="pt").input_ids
    return ids.repeat(1, 2)[:, :90]


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("name", REAL_PLANS)
def test_one_pass_chunks_and_single_tokens_agree_to_1e_9(
    name: str,
    story_model: PreTrainedModel,
    story: Tensor,
    plan_for: Callable[..., CachePlan],
    means_for: Callable[[CachePlan], dict[str, Tensor]],
) -> None:
    fields = dict(REAL_PLANS[name])
    plan = plan_for(story_model, **{x: y for x, y in fields.items() if x not in ("kind", "window")})
    if "window" in fields:  # the model has none of its own: its attention is ours, and so is the window
        plan = replace(plan, layers=tuple(replace(x, kind="sliding", window=24) for x in plan.layers))

    def logits(chunk: int) -> Tensor:
        packed = PackedCache(plan, rope=Rope.from_model(story_model), tensors=means_for(plan))
        return torch.cat([story_model(x, past_key_values=packed).logits for x in story.split(chunk, dim=1)], 1)

    whole = logits(1000)
    for chunk in (1, 7, 16, 50):
        assert (logits(chunk) - whole).abs().max() < 1e-9
