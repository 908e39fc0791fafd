"""The plan: geometry from its formula, bytes by hand, bits by brute force."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcli.errors import InputError
from kvcli.plan import BLOCK_SIZES, CachePlan, LayerPlan
from kvcli.quant.format import KVFormat

K4, V2 = KVFormat(4), KVFormat(2)


def layer(k: KVFormat = K4, v: KVFormat = V2, **fields: Any) -> LayerPlan:
    """Two heads of 64: 256 cached scalars a token."""
    return LayerPlan(2, 64, k, v, **fields)


@st.composite
def plans(draw: st.DrawFn) -> CachePlan:
    block = draw(st.sampled_from(BLOCK_SIZES))

    def fmt() -> KVFormat:
        axis: Literal["token", "channel"] = draw(st.sampled_from(("token", "channel")))
        group = draw(st.sampled_from((16, 32, 64))) if axis == "token" else draw(st.sampled_from((8, block)))
        symmetric = draw(st.booleans())
        return KVFormat(draw(st.sampled_from((2, 3, 4, 8, 16))), axis, group, symmetric)

    def one() -> LayerPlan:
        window = draw(st.none() | st.integers(1, 200))
        kind: Literal["full", "sliding"] = "full" if window is None else "sliding"
        center, transform = draw(st.booleans()), draw(st.sampled_from(("none", "hadamard")))
        return LayerPlan(
            draw(st.integers(1, 3)), 64, fmt(), fmt(), kind=kind, window=window, center=center, transform=transform
        )

    layers = tuple(one() for _ in range(draw(st.integers(1, 3))))
    return CachePlan(layers, block, draw(st.integers(0, 5)), draw(st.sampled_from((0, 1, 31, 32, 64))))


# --- geometry -------------------------------------------------------------------------------------------------------


@given(plans(), st.integers(0, 400))
def test_boundary_is_the_formula(plan: CachePlan, n: int) -> None:
    for i, one in enumerate(plan.layers):
        portable = not plan.sink_tokens and not plan.residual_window and one.k.is_token_wise and one.v.is_token_wise
        if portable or (one.k.bits == 16 and one.v.bits == 16):
            expected = n
        else:
            expected = plan.block_size * max(0, (n - plan.residual_window) // plan.block_size)
        assert plan.boundary(i, n) == expected


@given(plans())
def test_boundary_is_the_same_for_tensors(plan: CachePlan) -> None:
    n = torch.arange(300)
    for i in range(len(plan.layers)):
        assert plan.boundary(i, n).tolist() == [plan.boundary(i, x) for x in range(300)]


@given(plans())
def test_the_tail_holds_every_token_above_the_boundary(plan: CachePlan) -> None:
    # and the pool is no larger than it once must be
    for i, one in enumerate(plan.layers):
        kept = [n - plan.boundary(i, n) for n in range(400)]
        assert max(kept) == plan.tail(i)
        assert plan.residual_window <= min(kept[200:]) or one.is_exact


def test_the_portable_profile_has_nothing_beside_pages() -> None:
    plan = CachePlan((layer(), layer(KVFormat(16), KVFormat(16))))
    assert [(plan.is_portable(i), plan.sinks(i), plan.tail(i)) for i in (0, 1)] == [(True, 0, 0)] * 2
    assert plan.bytes_at(16) == sum(x.page_bytes(16) for x in plan.layers)


@pytest.mark.parametrize(
    "fields",
    [{"sink_tokens": 1}, {"residual_window": 1}, {"layers": (layer(KVFormat(4, "channel", 16)),)}],
)
def test_anything_beside_pages_ends_the_portable_profile(fields: dict[str, Any]) -> None:
    assert not CachePlan(**{"layers": (layer(),), **fields}).is_portable(0)


def test_exact_layers_need_neither_sinks_nor_tail() -> None:
    plan = CachePlan((layer(KVFormat(16), KVFormat(16)), layer()), sink_tokens=4, residual_window=32)
    assert (plan.sinks(0), plan.tail(0)) == (0, 0)
    assert (plan.sinks(1), plan.tail(1)) == (4, 47)


def test_sliding_layers_keep_no_sinks() -> None:
    plan = CachePlan((layer(kind="sliding", window=64), layer()), sink_tokens=4)
    assert [plan.sinks(i) for i in (0, 1)] == [0, 4]


def pages_alive(plan: CachePlan, i: int, n: int) -> int:
    """Return the most pages of layer i alive at once in any step up to n tokens, followed step by step."""
    window, most, alive = plan.layers[i].window, 0, set[int]()
    for length in range(1, n + 1):
        new = {slot // plan.block_size for slot in range(plan.boundary(i, length))}
        seen = range(length if window is None else max(0, length - window), length)  # what this step's query sees
        first = 0 if window is None else seen.start // plan.block_size
        alive = {page for page in new if page >= first}
        most = max(most, len(alive))
    return most


@given(plans(), st.integers(0, 300))
@settings(max_examples=60)
def test_pages_are_as_many_as_any_step_needs(plan: CachePlan, n: int) -> None:
    for i in range(len(plan.layers)):
        assert plan.num_pages(i, n) == pages_alive(plan, i, n)


@given(plans(), st.integers(0, 300))
def test_pages_behind_a_sliding_window_are_no_longer_needed_and_no_others(plan: CachePlan, n: int) -> None:
    for i, one in enumerate(plan.layers):
        oldest = 0 if one.window is None else max(0, n - one.window + 1)  # the next query, at n, sees this far back
        assert plan.first_page(i, n) == oldest // plan.block_size


def test_a_sliding_layer_stops_growing() -> None:
    plan = CachePlan((layer(kind="sliding", window=64),))
    # a window of 64 touches at most five blocks of 16
    assert plan.num_pages(0, 64) == 4
    assert plan.num_pages(0, 100_000) == 5
    full = CachePlan((layer(),))
    assert full.num_pages(0, 100_000) == 6250


def test_a_sliding_window_narrower_than_the_residual_one_needs_no_pages() -> None:
    plan = CachePlan((layer(kind="sliding", window=8),), residual_window=32)
    assert [plan.num_pages(0, n) for n in (1, 47, 48, 100, 1000)] == [0] * 5
    assert plan.bytes_at(1000) == 47 * 256 * 2


# --- bytes by hand --------------------------------------------------------------------------------------------------


def test_bytes_of_the_portable_profile() -> None:
    # one head's page of 16 tokens: K codes 16 * 64 * 4 / 8 = 512 and scales 16 * 2 = 32, V codes 256 and scales 32:
    # 832, a multiple of 16; two heads 1664
    plan = CachePlan((layer(),))
    assert plan.layers[0].page_bytes(16) == 1664
    assert [plan.bytes_at(n) for n in (0, 1, 16, 17, 2048)] == [0, 1664, 1664, 3328, 128 * 1664]


def test_bytes_with_sinks_and_window() -> None:
    # beside the pages: 4 sinks and 32 + 16 - 1 tail slots of 256 scalars of 2 bytes; pages up to 16 * ((n - 32) // 16)
    plan = CachePlan((layer(),), sink_tokens=4, residual_window=32)
    beside = (4 + 47) * 512
    assert [plan.bytes_at(n) for n in (1, 47, 48, 63, 64)] == [
        beside, beside, beside + 1664, beside + 1664, beside + 3328
    ]  # fmt: skip
    assert plan.bytes_at(2048) == beside + 126 * 1664


def test_bytes_of_kivi() -> None:
    # block 32; K 2 bits in channel groups of 32 tokens, V 2 bits in token groups of 32, both with zeros:
    # K codes 32 * 64 / 4 = 512, scales 64 * 2, zeros 64 * 2: 768. V codes 512, scales 32 * 2 * 2, zeros 128: 768
    k, v = KVFormat(2, "channel", 32, symmetric=False), KVFormat(2, "token", 32, symmetric=False)
    plan = CachePlan((layer(k, v),) * 3, block_size=32, residual_window=32)
    assert plan.layers[0].page_bytes(32) == 2 * 1536
    assert plan.bytes_at(1024) == 3 * (31 * 3072 + 63 * 512)


def test_bytes_of_layers_of_every_kind() -> None:
    exact = layer(KVFormat(16), KVFormat(16))  # 16 * 64 * 2 * 2 * 2 = 8192 a page, nothing beside
    mixed = layer(KVFormat(16), KVFormat(3, scale_dtype="e5m3"))  # 2048 + 384 + 16 = 2448 a head, 4896 a page
    sliding = layer(kind="sliding", window=64)  # no sinks
    plan = CachePlan((exact, mixed, sliding), sink_tokens=1, residual_window=0)
    assert [x.page_bytes(16) for x in plan.layers] == [8192, 4896, 1664]
    # 100 tokens: 7 pages; boundary 96: 6 pages, 1 sink and 15 tail slots; sliding: pages 2 … 5 at most four at once
    assert plan.layer_bytes_at(0, 100) == 7 * 8192
    assert plan.layer_bytes_at(1, 100) == 6 * 4896 + 16 * 512
    assert plan.layer_bytes_at(2, 100) == 4 * 1664 + 15 * 512
    assert plan.bytes_at(100) == sum(plan.layer_bytes_at(i, 100) for i in range(3))


def test_padding_is_counted() -> None:
    # K codes 16 bytes and channel scales 8, V codes 256: 280 bytes of a head become 288
    one = LayerPlan(3, 8, KVFormat(1, "channel", 16, scale_dtype="e5m3"), KVFormat(16))
    assert CachePlan((one,)).layer_bytes_at(0, 16) == 3 * 288 + 15 * 48 * 2


def test_the_test_format_of_32_bits_makes_everything_exact_32_bits() -> None:
    plan = CachePlan((layer(KVFormat(32), KVFormat(32)), layer()), sink_tokens=1)
    assert plan.exact_dtype == "float32"
    assert plan.layer_bytes_at(0, 16) == 16 * 256 * 4
    assert plan.layer_bytes_at(1, 1) == 16 * 256 * 4


@pytest.mark.parametrize(
    ("compute", "exact"),
    [("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "float16"), ("float64", "float16")],
)
def test_exact_tensors_have_the_compute_dtype_if_it_has_16_bits(compute: str, exact: str) -> None:
    assert CachePlan((layer(),), dtype=compute).exact_dtype == exact


# --- bits -----------------------------------------------------------------------------------------------------------


def test_effective_bits_by_hand() -> None:
    # 2033 … 2048 tokens all need 128 pages of 1664 bytes, so the first of them pays most
    plan = CachePlan((layer(),))
    assert plan.worst_length(2048) == 2033
    assert plan.effective_bits(2048) == 8 * 212992 / (2033 * 256)
    # one token pays for a whole page
    assert plan.effective_bits(1) == 8 * 1664 / 256


def test_sixteen_bits_cost_sixteen_bits_where_pages_are_full() -> None:
    plan = CachePlan((layer(),)).as_exact()
    assert 8 * plan.bytes_at(2048) / (2048 * plan.scalars_per_token) == 16
    assert plan.nominal_bits == 16


@given(plans(), st.integers(1, 500))
@settings(max_examples=60)
def test_effective_bits_are_the_worst_of_the_last_block(plan: CachePlan, context: int) -> None:
    scalars = sum(2 * x.num_kv_heads * x.head_dim for x in plan.layers)
    assert plan.scalars_per_token == scalars
    last = [n for n in range(1, context + 1) if n > context - plan.block_size]
    worst = max(8 * plan.bytes_at(n) / (n * scalars) for n in last)
    assert plan.effective_bits(context) == pytest.approx(worst, rel=1e-12)


@given(plans(), st.integers(1, 500))
def test_bytes_never_shrink_as_a_sequence_grows(plan: CachePlan, n: int) -> None:
    assert plan.bytes_at(n - 1) <= plan.bytes_at(n)


@given(plans(), st.integers(1, 300), st.data())
@settings(max_examples=40)
def test_more_bits_never_cost_less(plan: CachePlan, n: int, data: st.DataObject) -> None:
    # among codes; a layer that becomes exact drops its sinks and tail, and short sequences then save
    i, which = data.draw(st.integers(0, len(plan.layers) - 1)), data.draw(st.sampled_from("kv"))
    costs = []
    for bits in (2, 3, 4, 8):
        changed = replace(plan.layers[i], **{which: replace(KVFormat(2, group=16), bits=bits)})
        wider = replace(plan, layers=(*plan.layers[:i], changed, *plan.layers[i + 1 :]))
        costs.append((wider.bytes_at(n), wider.effective_bits(n), wider.nominal_bits))
    assert costs == sorted(costs)
    assert costs[0][2] < costs[-1][2]


def test_effective_bits_of_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="0 tokens"):
        CachePlan((layer(),)).effective_bits(0)


# KVTuner's published presets (digits are K then V bits): the name says what "nominal" must give
PRESETS = {
    "Llama-3.1-8B KIVI 3.25": "22 44 44 44 22 42 42 44 42 42 42 42 42 84 42 42 42 84 42 42 42 42 42 42 42 22 42 22 42"
    " 44 42 44",
    "Llama-3.1-8B per-token 3.59": "48 42 42 42 42 44 44 42 44 44 44 44 44 42 44 44 44 44 42 42 44 44 42 42 42 42 44 42"
    " 44 42 44 42",
    "Qwen2.5-7B per-token 4.0": "88 42 42 82 42 42 44 44 42 44 44 44 44 82 44 44 44 44 44 44 44 44 44 44 42 42 44 82",
    "Qwen2.5-7B per-token 5.0": "82 44 44 82 44 44 44 44 84 84 44 44 84 82 84 44 84 84 84 44 84 84 84 44 84 44 84 82",
}


@pytest.mark.parametrize("name", PRESETS)
def test_nominal_bits_are_the_papers(name: str) -> None:
    layers = tuple(LayerPlan(8, 128, KVFormat(int(k)), KVFormat(int(v))) for k, v in PRESETS[name].split())
    plan = CachePlan(layers)
    assert len(layers) == (32 if name.startswith("Llama") else 28)
    assert plan.nominal_bits == pytest.approx(float(name.split()[-1]), abs=0.005)
    assert plan.effective_bits(8192) > plan.nominal_bits


def test_kvtuners_kivi_preset_really_stores_4_3_bits() -> None:
    # groups of 32 with a float16 scale and zero are 1 bit more than nominal, the window of 32 and its block the rest
    layers = tuple(
        LayerPlan(8, 128, KVFormat(int(k), "channel", 32, False), KVFormat(int(v), "token", 32, False))
        for k, v in PRESETS["Llama-3.1-8B KIVI 3.25"].split()
    )
    plan = CachePlan(layers, block_size=32, residual_window=32)
    assert plan.nominal_bits == 3.25
    n = plan.worst_length(8192)
    pages = (n - 32) // 32
    assert plan.effective_bits(8192) == pytest.approx(4.25 * pages * 32 / n + 16 * 63 / n)


def test_means_are_counted_per_model() -> None:
    plan = CachePlan((layer(center=True), layer()))
    assert plan.model_bytes() == 256 * 4
    assert CachePlan((layer(), layer())).model_bytes() == 0
    assert plan.effective_bits_with_model(1024) == pytest.approx(plan.effective_bits(1024) + 8 * 1024 / (1024 * 512))


# --- making one -----------------------------------------------------------------------------------------------------


def test_the_exact_plan_keeps_only_the_geometry() -> None:
    plan = CachePlan(
        (layer(kind="sliding", window=8, rope="before", center=True, transform="hadamard"), layer()),
        block_size=32, sink_tokens=4, residual_window=8, dtype="bfloat16",
    )  # fmt: skip
    exact = KVFormat(16)
    assert plan.as_exact() == CachePlan(
        (LayerPlan(2, 64, exact, exact, kind="sliding", window=8), LayerPlan(2, 64, exact, exact)),
        block_size=32, dtype="bfloat16",
    )  # fmt: skip


@given(plans())
def test_json_round_trip(plan: CachePlan) -> None:
    again = CachePlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert hash(again) == hash(plan)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_kv_heads": 0}, "0 heads of 64 channels"),
        ({"head_dim": 0}, "2 heads of 0 channels"),
        ({"head_dim": -64}, "-64 channels"),
        ({"kind": "sliding"}, "needs a window"),
        ({"window": 64}, "only a sliding layer has one"),
        ({"kind": "sliding", "window": 0}, "window of 0 tokens"),
        ({"kind": "chunked"}, "kind 'chunked'"),
        ({"kind": "chunked", "window": 64}, "kind 'chunked'"),
        ({"rope": "never"}, "rope 'never'"),
        ({"transform": "fourier"}, "transform 'fourier'"),
    ],
)
def test_impossible_layers_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        LayerPlan(**{"num_kv_heads": 2, "head_dim": 64, "k": K4, "v": V2, **fields})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"layers": ()}, "at least one layer"),
        ({"block_size": 8}, "block_size 8 is not one of"),
        ({"block_size": 48}, "block_size 48 is not one of"),
        ({"sink_tokens": -1}, "cannot be negative"),
        ({"residual_window": -1}, "cannot be negative"),
        ({"dtype": "int8"}, "compute dtype 'int8'"),
        ({"layers": (layer(KVFormat(4, group=48)),)}, "group 48 does not divide head_dim 64"),
        ({"layers": (layer(V2, KVFormat(4, "channel", 32)),)}, "group 32 does not divide block_size 16"),
        ({"layers": (layer(KVFormat(4, grid="no such table")),)}, "no grid 'no such table'"),
        ({"layers": (layer(), LayerPlan(1, 20, KVFormat(3, group=20), V2))}, "whole number of bytes"),
    ],
)
def test_impossible_plans_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        CachePlan(**{"layers": (layer(),), **fields})
