"""One layer's storage: what is packed is what the quantiser alone gives, however the tokens arrive."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard as scipy_hadamard
from torch import Tensor

from kvcli.errors import InputError
from kvcli.models.architectures import Rope
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.quant.prediction import Linear, Predictor, Source
from kvcli.quant.quantizer import dequantize, from_bytes, quantize, to_bytes
from kvcli.runtime.codec import Codec
from kvcli.runtime.packed_layer import PackedLayer

HEADS, DIM = 2, 16
INV_FREQ = 10000.0 ** -(torch.arange(0, DIM, 2) / DIM)
ROPE = Rope(INV_FREQ)
MEANS = {
    f"layer.0.{w}.mean": torch.randn(HEADS, DIM, generator=torch.Generator().manual_seed(i)) for i, w in enumerate("kv")
}

TOKEN4 = KVFormat(4, group=16)
TOKEN3 = KVFormat(3, group=8, symmetric=False, scale_dtype="e5m3")
CHANNEL2 = KVFormat(2, "channel", 16, symmetric=False)
GAUSSIAN = KVFormat(4, "channel", 8, grid="gaussian", scale_dtype="e5m3")
EXACT = KVFormat(16)
FORMATS = (TOKEN4, TOKEN3, CHANNEL2, GAUSSIAN, EXACT)


def one_layer(k: KVFormat = TOKEN4, v: KVFormat = TOKEN4, **fields: Any) -> CachePlan:
    shared = {x: fields.pop(x) for x in ("block_size", "sink_tokens", "residual_window", "dtype") if x in fields}
    return CachePlan((LayerPlan(HEADS, DIM, k, v, **fields),), **shared)


def store_for(plan: CachePlan, **fields: Any) -> PackedLayer:
    return PackedLayer(plan, 0, rope=ROPE, tensors=MEANS, **fields)


def tokens(n: int, seed: int = 0) -> Tensor:
    """Keys and values, [2, heads, n, dim]; they differ a lot from token to token and channel to channel."""
    x = torch.randn(2, HEADS, n, DIM, generator=torch.Generator().manual_seed(seed))
    return x * torch.linspace(0.5, 4, DIM)


def feed(store: PackedLayer, kv: Tensor, row: int = 0) -> None:
    store.append(row, store.exact(row, kv[0], kv[1]))
    store.release(row)


def full_pages(store: PackedLayer) -> Tensor:
    """Return the full pages of the first sequence in order; the rest of a page in progress may hold anything."""
    full = store.boundary(store.lengths[0]) // store.layout.block_size
    return store.pages[[page for page in store.block_tables[0][:full] if page >= 0]]


@st.composite
def plans(draw: st.DrawFn) -> CachePlan:
    window = draw(st.sampled_from((None, None, 5, 24, 50)))
    kind: Literal["full", "sliding"] = "full" if window is None else "sliding"
    return one_layer(
        draw(st.sampled_from(FORMATS)),
        draw(st.sampled_from(FORMATS)),
        block_size=draw(st.sampled_from((16, 32))),
        sink_tokens=draw(st.sampled_from((0, 1, 4, 20))),
        residual_window=draw(st.sampled_from((0, 1, 7, 20, 40))),
        dtype=draw(st.sampled_from(("float32", "bfloat16"))),
        kind=kind,
        window=window,
        rope=draw(st.sampled_from(("before", "after"))),
        transform=draw(st.sampled_from(("none", "hadamard"))),
        center=draw(st.booleans()),
    )


@st.composite
def splits(draw: st.DrawFn, longest: int = 110) -> list[int]:
    """Sizes of the chunks in which a sequence arrives."""
    return draw(st.lists(st.integers(1, 60), min_size=1, max_size=6).filter(lambda x: sum(x) <= longest))


# --- codec ----------------------------------------------------------------------------------------------------------


def rotate(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """RoPE as it is defined: pairs (i, i + dim / 2) turned as complex numbers."""
    half = DIM // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * positions[:, None] * INV_FREQ.double().numpy())
    return np.concatenate((turned.real, turned.imag), axis=-1)


@pytest.mark.parametrize("transform", ["none", "hadamard"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("rope", ["before", "after"])
def test_what_is_stored_and_what_comes_back(rope: str, center: bool, transform: str) -> None:
    # stored: H(RoPE⁻¹(k) - mean), or H(k - RoPE(mean)), and H(v - mean); 8 bits in small groups hide nothing
    fmt = KVFormat(8, group=8)
    codec = Codec(one_layer(fmt, fmt, rope=rope, center=center, transform=transform), 0, ROPE, MEANS)
    slots = torch.tensor([0, 1, 17, 400])
    matrix = scipy_hadamard(DIM) / 4 if transform == "hadamard" else np.eye(DIM)
    for which, x in zip("kv", tokens(4), strict=True):
        sections = codec.encode(which, x, slots)
        plain, mean = x.double().numpy(), MEANS[f"layer.0.{which}.mean"].double().numpy()[:, None] * center
        if which == "v":
            expected = plain - mean
        elif rope == "before":
            expected = rotate(plain, -slots.numpy()) - mean
        else:
            expected = plain - rotate(np.repeat(mean, 4, axis=1), slots.numpy())
        stored = from_bytes(*sections, fmt, torch.float16, DIM)
        step = np.abs(expected).max() / 127
        np.testing.assert_allclose(stored.numpy(), expected @ matrix, atol=4 * step)
        np.testing.assert_allclose(codec.decode(which, sections, slots).numpy(), plain, atol=8 * step)
        assert np.abs(expected - plain).max() > 20 * step or (not center and (rope == "after" or which == "v"))


def test_a_short_group_shows_the_scales_of_what_is_stored() -> None:
    # bit for bit where nothing is rotated: the codec adds nothing to the quantiser
    for fmt in (TOKEN4, TOKEN3):
        codec = Codec(one_layer(fmt, fmt), 0, None, {})
        for mine, alone in zip(
            codec.encode("k", tokens(5)[0], torch.arange(5)), to_bytes(tokens(5)[0], fmt, torch.float16), strict=True
        ):
            assert torch.equal(mine, alone)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_exact_tensors_are_neither_centred_nor_rotated(dtype: str) -> None:
    plan = one_layer(EXACT, TOKEN4, rope="before", center=True, transform="hadamard", dtype=dtype)
    codec = Codec(plan, 0, ROPE, MEANS)
    x = tokens(3)[0].to(getattr(torch, dtype))
    assert torch.equal(codec.decode("k", codec.encode("k", x, torch.arange(3)), torch.arange(3)), x)


@pytest.mark.parametrize("which", ["k", "v"])
def test_a_missing_mean_is_named(which: str) -> None:
    tensors = {name: x for name, x in MEANS.items() if name != f"layer.0.{which}.mean"}
    with pytest.raises(InputError, match=f"tensor layer.0.{which}.mean is missing"):
        PackedLayer(one_layer(center=True), 0, rope=ROPE, tensors=tensors)


@pytest.mark.parametrize("fields", [{"rope": "before"}, {"center": True}])
def test_a_missing_rotary_embedding_is_an_error(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="rotary embedding"):
        PackedLayer(one_layer(**fields), 0, tensors=MEANS)


def test_a_predictor_is_not_ignored() -> None:
    predictor = Predictor(v=Linear((Source(0, "k"),)))
    with pytest.raises(InputError, match=r"tensor layer\.0\.v\.predictor\.bias is missing"):
        PackedLayer(one_layer(predictor=predictor), 0, rope=ROPE)


# --- pages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v", FORMATS, ids=str)
@pytest.mark.parametrize("k", FORMATS, ids=str)
def test_page_bytes_are_what_the_quantiser_alone_gives(k: KVFormat, v: KVFormat) -> None:
    plan = one_layer(k, v, dtype="float16")
    store, kv = store_for(plan), tokens(48).half()
    feed(store, kv)
    sections = plan.layers[0].layout(16).sections
    for page in range(3):
        for head in range(HEADS):
            data = store.pages[store.block_tables[0][page], head]
            for which, fmt, x in zip("kv", (k, v), kv, strict=True):
                expected = to_bytes(x[head, 16 * page : 16 * page + 16], fmt, torch.float16)
                for name, section in zip(("codes", "scales", "zeros"), expected, strict=True):
                    assert torch.equal(data[sections[f"{which}_{name}"]], section)


@pytest.mark.parametrize("v", FORMATS, ids=str)
@pytest.mark.parametrize("k", FORMATS, ids=str)
def test_reading_gives_what_the_quantiser_alone_gives(k: KVFormat, v: KVFormat) -> None:
    store, kv = store_for(one_layer(k, v, residual_window=7)), tokens(75).half().float()
    for part in kv.split(11, dim=2):
        feed(store, part)
    *read, first = store.read(0)
    boundary = 75 if k.is_exact and v.is_exact else 64
    assert first == 0
    for fmt, x, decoded in zip((k, v), kv, read, strict=True):
        alone = x[:, :80] if fmt.is_exact else dequantize(quantize(x[:, : 75 // 16 * 16], fmt), fmt)
        torch.testing.assert_close(decoded.float(), alone[:, :boundary], rtol=0, atol=0)


@given(plans(), splits(), st.integers(0, 3))
@settings(max_examples=80)
def test_how_tokens_arrive_does_not_change_what_is_stored(plan: CachePlan, sizes: list[int], seed: int) -> None:
    n = sum(sizes)
    kv = tokens(n, seed)
    stores = [store_for(plan) for _ in range(3)]
    feed(stores[0], kv)
    for part in kv.split(sizes, dim=2):
        feed(stores[1], part)
    for part in kv.split(1, dim=2):
        feed(stores[2], part)
    boundary = plan.boundary(0, n)
    for store in stores[1:]:
        assert store.lengths == [n]
        assert [page < 0 for page in store.block_tables[0]] == [page < 0 for page in stores[0].block_tables[0]]
        assert torch.equal(full_pages(store), full_pages(stores[0]))
        assert torch.equal(store.tail[..., : n - boundary, :], stores[0].tail[..., : n - boundary, :])
        assert torch.equal(store.sinks, stores[0].sinks)
        for a, b in zip(store.read(0), stores[0].read(0), strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@given(plans(), splits(), st.integers(0, 1))
@settings(max_examples=80)
def test_what_is_decoded_once_is_what_decoding_anew_gives(plan: CachePlan, sizes: list[int], row: int) -> None:
    anew, kept = store_for(plan, batch_size=2), store_for(plan, batch_size=2, keep_decoded=True)
    halfway = len(sizes) // 2
    for i, part in enumerate(tokens(sum(sizes), 1).split(sizes, dim=2)):
        for store in (anew, kept):
            if i == halfway:  # from here on both sequences go on from one of them
                store.reorder([row, row])
            store.append(row, store.exact(row, part[0], part[1]))
        (k, v, first), (other_k, other_v, other_first) = anew.read(row), kept.read(row)
        assert first == other_first
        assert torch.equal(k, other_k)
        assert torch.equal(v, other_v)
        anew.release(row)
        kept.release(row)
    assert kept.nbytes == anew.nbytes


@given(plans(), splits())
@settings(max_examples=50)
def test_window_and_sinks_are_the_tokens_themselves(plan: CachePlan, sizes: list[int]) -> None:
    n = sum(sizes)
    kv = tokens(n)
    store = store_for(plan)
    for part in kv.split(sizes, dim=2):
        feed(store, part)
    exact = kv.to(getattr(torch, plan.exact_dtype))
    boundary, sinks = plan.boundary(0, n), min(plan.sinks(0), n)
    assert n - boundary >= min(n, plan.residual_window) or plan.is_portable(0)
    assert torch.equal(store.tail[:, 0, :, : n - boundary], exact[:, :, boundary:])
    assert torch.equal(store.sinks[:, 0, :, :sinks], exact[:, :, :sinks])
    # exact() hands out the tail and what is new, in order
    more = tokens(3, seed=9)
    handed = store.exact(0, more[0], more[1])
    assert torch.equal(handed, torch.cat((exact[:, :, boundary:], more.to(exact.dtype)), dim=2))


@pytest.mark.parametrize("sizes", [[17, 23], [16, 24], [3, 14, 23], [1] * 40], ids=str)
def test_sinks_may_span_blocks_and_chunks(sizes: list[int]) -> None:
    # the first block is packed before the last sinks arrive
    store, kv = store_for(one_layer(sink_tokens=20)), tokens(40)
    for part in kv.split(sizes, dim=2):
        feed(store, part)
    assert torch.equal(store.sinks[:, 0], kv[:, :, :20].half())


def test_reading_can_stop_early() -> None:
    store, kv = store_for(one_layer()), tokens(70)
    feed(store, kv)
    whole_k, whole_v, _ = store.read(0)
    for stop in (0, 1, 16, 33, 70):
        k, v, first = store.read(0, stop)
        assert first == 0
        assert torch.equal(k, whole_k[:, :stop])
        assert torch.equal(v, whole_v[:, :stop])


def test_storage_keeps_no_gradient_graph() -> None:
    # else every page's exact tensors would live as long as the cache
    store = store_for(one_layer(sink_tokens=4, residual_window=8))
    kv = tokens(40).requires_grad_()
    feed(store, kv)
    assert not any(x.requires_grad for x in (store.tail, store.sinks, store.pages))


# --- bytes ----------------------------------------------------------------------------------------------------------


@given(plans(), splits(), st.integers(1, 3))
@settings(max_examples=80)
def test_reserved_storage_is_what_the_plan_counts_and_stays_so(plan: CachePlan, sizes: list[int], batch: int) -> None:
    n = sum(sizes)
    expected = batch * plan.layer_bytes_at(0, n)
    for parts in ([n], sizes, [1] * n):
        store = store_for(plan, batch_size=batch, capacity=n)
        assert store.nbytes == expected
        for row in range(batch):
            for part in tokens(n, row).split(parts, dim=2):
                feed(store, part, row)
                assert store.nbytes == expected


@given(plans(), splits())
@settings(max_examples=50)
def test_growing_storage_never_holds_more_than_the_plan_counts(plan: CachePlan, sizes: list[int]) -> None:
    store, n = store_for(plan), 0
    for part in tokens(sum(sizes)).split(sizes, dim=2):
        feed(store, part)
        n += part.shape[2]
        # a sliding layer may hold a page less than its worst step
        assert store.nbytes == plan.layer_bytes_at(0, n) or (
            plan.layers[0].kind == "sliding" and store.nbytes < plan.layer_bytes_at(0, n)
        )


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("fmt", [TOKEN4, CHANNEL2, EXACT], ids=str)
def test_a_layer_grown_token_by_token_is_at_every_length_what_the_plan_counts(
    fmt: KVFormat, block: int, window: int
) -> None:
    plan = one_layer(fmt, fmt, block_size=block, residual_window=window)
    store = store_for(plan)
    for n, part in enumerate(tokens(window + 2 * block + 1).split(1, dim=2), start=1):
        feed(store, part)
        assert store.nbytes == plan.layer_bytes_at(0, n)


def test_a_sequence_may_outgrow_what_was_reserved() -> None:
    plan = one_layer(residual_window=8)
    small, large = store_for(plan, capacity=30), store_for(plan, capacity=100)
    for part in tokens(100).split(9, dim=2):
        feed(small, part)
        feed(large, part)
    assert small.nbytes == large.nbytes == plan.bytes_at(100)
    assert torch.equal(small.read(0)[0], large.read(0)[0])


# --- sliding windows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [TOKEN4, CHANNEL2, EXACT], ids=str)
def test_pages_behind_a_sliding_window_are_reused(fmt: KVFormat) -> None:
    # the pool never grows, however long the sequence, and what is still visible is right
    plan = one_layer(fmt, fmt, kind="sliding", window=24, dtype="float16")
    store, kv = store_for(plan, capacity=1000), tokens(304).half()
    pool, used = store.pages.data_ptr(), set[int]()
    for n, part in enumerate(kv.split(1, dim=2), start=1):
        feed(store, part)
        live = [page for page in store.block_tables[0] if page >= 0]
        used |= set(live)
        assert len(set(live)) == len(live) <= store.pages.shape[0]
        assert store.pages.data_ptr() == pool
        k, _, first = store.read(0)
        assert first <= max(0, n - 24 + 1) < first + 16  # the oldest slot the next query sees, and no whole page more
        alone = kv[0].float() if fmt.is_exact else dequantize(quantize(kv[0], fmt), fmt)
        torch.testing.assert_close(k.float(), alone[:, first : first + k.shape[1]], rtol=0, atol=0)
    assert len(used) == store.pages.shape[0] <= 3


def test_rows_share_the_pages_that_others_freed() -> None:
    plan = one_layer(kind="sliding", window=24)
    store = store_for(plan, batch_size=3, capacity=200)
    inputs = [tokens(n, seed=n) for n in (200, 90, 10)]
    for step in range(200):
        for row, kv in enumerate(inputs):
            if step < kv.shape[2]:
                feed(store, kv[:, :, step : step + 1], row)
    live = [page for table in store.block_tables for page in table if page >= 0]
    assert len(set(live)) == len(live)
    assert store.nbytes == 3 * plan.bytes_at(200)
    for row, kv in enumerate(inputs):
        k, _, first = store.read(row)
        alone = dequantize(quantize(kv[0].half(), TOKEN4), TOKEN4)
        assert torch.equal(k, alone[:, first:])


# --- beams ----------------------------------------------------------------------------------------------------------


@given(plans(), st.lists(st.integers(0, 2), min_size=3, max_size=3), st.integers(0, 80))
@settings(max_examples=60)
def test_a_reordered_sequence_goes_on_as_the_one_it_copies(plan: CachePlan, rows: list[int], capacity: int) -> None:
    lengths = (50, 37, 3)
    store = store_for(plan, batch_size=3, capacity=capacity)
    for row, n in enumerate(lengths):
        feed(store, tokens(n, seed=row), row)
    store.reorder(rows)
    for row, source in enumerate(rows):
        feed(store, tokens(20, seed=10 + row), row)
        alone = store_for(plan)
        feed(alone, tokens(lengths[source], seed=source))
        feed(alone, tokens(20, seed=10 + row))
        assert store.lengths[row] == alone.lengths[0]
        for a, b in zip(store.read(row), alone.read(0), strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        kept = alone.lengths[0] - plan.boundary(0, alone.lengths[0])
        assert torch.equal(store.tail[:, row, :, :kept], alone.tail[:, 0, :, :kept])
        assert torch.equal(store.sinks[:, row], alone.sinks[:, 0])
