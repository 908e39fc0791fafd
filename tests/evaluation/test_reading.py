"""Reading, ranking and writing on one cache against the stock model's full passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvcli.evaluation.reading import Reader, encode, encode_pair, log_likelihoods, write_until
from kvcli.models.loading import LoadedModel
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.packed_model import PackedModel

CONTEXT = "Once upon a time there was a little dog who"
ENDINGS = (" ran to the big red house.", " slept", " was very happy")


@pytest.fixture(scope="module")
def exact(loaded: LoadedModel) -> PackedModel:
    """TinyStories in float32, its cache kept as it is."""
    layers = tuple(LayerPlan(g.num_kv_heads, g.head_dim, KVFormat(32), KVFormat(32)) for g in loaded.geometry)
    return PackedModel(loaded, CachePlan(layers, dtype="float32", block_size=16), {})


@pytest.fixture(scope="module")
def packed(exact: PackedModel) -> PackedModel:
    layers = tuple(
        LayerPlan(x.num_kv_heads, x.head_dim, KVFormat(4, group=16), KVFormat(4, group=16)) for x in exact.plan.layers
    )
    return PackedModel(exact.loaded, CachePlan(layers, dtype="float32", block_size=16), {})


def stock(loaded: LoadedModel, ids: list[int]) -> Tensor:
    """The stock model's log-probabilities after each token."""
    attention = loaded.model.config._attn_implementation
    loaded.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        out = loaded.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    loaded.model.set_attn_implementation(attention)
    return out


def pairs_of(model: PackedModel) -> list[tuple[list[int], list[int]]]:
    return [encode_pair(model.loaded.tokenizer, CONTEXT, x) for x in ENDINGS]


def test_endings_have_the_stock_models_likelihood(exact):
    pairs = pairs_of(exact)
    assert len({len(x) for _, x in pairs}) > 1  # so that rows are padded
    for (before, after), row in zip(pairs, log_likelihoods(exact, pairs), strict=True):
        logs = stock(exact.loaded, [*before, *after])[len(before) - 1 : -1]
        expected = logs.gather(-1, torch.tensor(after)[:, None])[:, 0]
        torch.testing.assert_close(row[0].float(), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(row[1].float(), logs.amax(-1), rtol=0, atol=1e-4)


def test_contexts_that_differ_are_read_apart_as_together(exact):
    tokenizer = exact.loaded.tokenizer
    pairs = [encode_pair(tokenizer, f"{CONTEXT} saw {x}", " and ran.") for x in ("a big cat", "the moon")]
    together = log_likelihoods(exact, pairs)
    for row, pair in zip(together, pairs, strict=True):
        torch.testing.assert_close(row, log_likelihoods(exact, [pair])[0], rtol=0, atol=1e-4)


def test_what_is_kept_goes_on_as_if_nothing_else_had_been_ranked(packed):
    pairs = pairs_of(packed)
    reader, plain = Reader(packed), Reader(packed)
    reader.read(pairs[0][0])
    reader.rank([after for _, after in pairs], keep=2)
    plain.read([*pairs[0][0], *pairs[2][1]])
    assert reader.length == plain.length
    assert reader.write(30) == plain.write(30)
    assert reader.cache.lengths == plain.cache.lengths == [plain.length]


def test_it_writes_what_transformers_generates(exact):
    ids = encode(exact.loaded.tokenizer, CONTEXT)
    reader = Reader(exact)
    reader.read(ids, chunk=5)
    mine = reader.write(25)
    exact.loaded.model.set_attn_implementation("sdpa")
    out = exact.loaded.model.generate(torch.tensor([ids]), max_new_tokens=25, do_sample=False)[0, len(ids) :]
    exact.loaded.model.set_attn_implementation("kvcli")
    assert mine == out.tolist()
    text = exact.loaded.tokenizer.decode(mine)
    stop = text[10:14]
    assert write_until(exact, ids, 25, (stop,)) == text[: text.index(stop)]


def test_a_context_longer_than_the_models_loses_its_beginning(exact):
    room = exact.loaded.max_context
    ids = (encode(exact.loaded.tokenizer, CONTEXT) * 100)[: room + 40]
    (long,) = log_likelihoods(exact, [(ids, [5, 6])])
    (cut,) = log_likelihoods(exact, [(ids[-(room - 2) :], [5, 6])])
    torch.testing.assert_close(long, cut, rtol=0, atol=0)


def test_spaces_belong_to_the_ending(exact):
    tokenizer = exact.loaded.tokenizer
    assert encode_pair(tokenizer, "The dog ", "ran.") == encode_pair(tokenizer, "The dog", " ran.")
