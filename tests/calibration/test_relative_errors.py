"""The paper's four errors against a plain float64 reference that really stores the tokens and reads them one by one."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvcli.calibration import corpora, relative_errors
from kvcli.calibration.capture import Attention, layer_inputs
from kvcli.calibration.pipeline import exact_layers
from kvcli.calibration.relative_errors import RelativeErrors, measure, pairs_of
from kvcli.calibration.sensitivity import Probe
from kvcli.calibration.space import SearchSpace, Setting, load_recipe
from kvcli.errors import InputError
from kvcli.models.architectures import Rope, geometry
from kvcli.models.loading import load
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.packed_layer import PackedLayer

EXACT = KVFormat.exact()
TOKEN = tuple(KVFormat(bits, group=16, symmetric=False) for bits in (2, 4, 8))
CHANNEL = tuple(KVFormat(bits, "channel", group=16, symmetric=False) for bits in (2, 4))
ROPE = Rope(1.0 / 10000 ** (torch.arange(0, 16, 2) / 16))
TOKENS = 58


def full(**fields: Any) -> LayerPlan:
    return LayerPlan(2, 16, EXACT, EXACT, **fields)


def invented(heads: int = 4, seed: int = 0) -> Attention:
    """Attention whose keys and values bfloat16 holds exactly, a few channels of the keys large."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, h, TOKENS, 16, generator=generator) for h in (heads, 2, 2))
    key[..., 3] *= 5
    return Attention(query, key.bfloat16().float(), value.bfloat16().float(), 0.4)


# --- one layer --------------------------------------------------------------------------------------------------------


def relative(found: Tensor, exact: Tensor) -> float:
    size = exact.abs()
    return float(((found - exact).abs() / torch.maximum(size, size.mean())).mean())


def by_hand(seen: Attention, plan: CachePlan, layer: LayerPlan, tensors: dict[str, Tensor]) -> list[float]:
    """Store the tokens in a real layer and attend from each query of the second half, one head at a time."""
    store = PackedLayer(plan.with_layer(0, layer), 0, rope=ROPE, tensors=tensors)
    store.append(0, store.exact(0, seen.key[0], seen.value[0]))
    packed_k, packed_v, _ = store.read(0)
    exact_k, exact_v = seen.key[0].double(), seen.value[0].double()
    token_wise = all(f.is_exact or f.axis == "token" for f in (layer.k, layer.v))
    portable = layer.is_exact or (token_wise and plan.sink_tokens == plan.residual_window == 0)
    sinks = 0 if portable or layer.window else plan.sink_tokens
    group = seen.query.shape[1] // 2
    read: set[int] = set()
    weight_errors, outputs = [], []
    for t in range(TOKENS // 2, TOKENS):
        blocks = max(0, t + 1 - plan.residual_window) // plan.block_size
        packed = range(sinks, t + 1 if portable else max(sinks, blocks * plan.block_size))
        start = max(0, t + 1 - layer.window) if layer.window else 0
        packed = range(max(start, packed.start), max(start, packed.stop))
        read |= set(packed)
        for head in range(seen.query.shape[1]):
            k, v = exact_k[head // group].clone(), exact_v[head // group].clone()
            weights, output = [], []
            for stored in (False, True):
                if stored:
                    k[packed.start : packed.stop] = packed_k[head // group, packed.start : packed.stop].double()
                    v[packed.start : packed.stop] = packed_v[head // group, packed.start : packed.stop].double()
                scores = k[start : t + 1] @ seen.query[0, head, t].double() * seen.scaling
                weights.append(scores.softmax(0))
                output.append(weights[-1] @ v[start : t + 1])
            weight_errors.append((weights[1] - weights[0]).abs())
            outputs.append(output)
    slots = sorted(read)
    exact_o, found_o = (torch.stack(x) for x in zip(*outputs, strict=True))
    return [
        relative(packed_k[:, slots].double(), exact_k[:, slots]),
        relative(packed_v[:, slots].double(), exact_v[:, slots]),
        float(torch.cat(weight_errors).mean()),
        relative(found_o, exact_o),
    ]


PAIRS = [
    (TOKEN[0], TOKEN[1]), (TOKEN[0], TOKEN[2]), (TOKEN[2], TOKEN[0]), (CHANNEL[0], TOKEN[1]), (CHANNEL[1], CHANNEL[0]),
    (TOKEN[1], CHANNEL[1]), (EXACT, TOKEN[0]), (TOKEN[0], EXACT), (EXACT, EXACT),
]  # fmt: skip


@pytest.mark.parametrize("shared", [(16, 0, 0), (16, 3, 6), (32, 0, 9)], ids=str)
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("treatment", [{}, {"transform": "hadamard", "center": True}], ids=str)
def test_errors_are_those_of_reading_the_stored_tokens(shared, window, treatment):
    seen = invented()
    kind = {"kind": "sliding", "window": window} if window else {}
    layers = [replace(full(**kind, **treatment), k=k, v=v) for k, v in PAIRS]
    plan = CachePlan((full(**kind, **treatment),), *shared, dtype="bfloat16")
    means = {f"layer.0.{w}.mean": torch.randn(2, 16, generator=torch.Generator().manual_seed(1)) / 4 for w in "kv"}
    found = relative_errors.relative_errors(seen, plan, 0, layers, ROPE, means)
    assert found.shape == (4, len(PAIRS))
    for column, layer in zip(found.T.tolist(), layers, strict=True):
        assert column == pytest.approx(by_hand(seen, plan, layer, means), rel=2e-4, abs=1e-7)
    assert (found[:, :-1].amax(0) > 1e-3).all()


def test_scores_held_a_few_queries_at_a_time_give_the_same(monkeypatch):
    plan = CachePlan((full(),), 16, 3, 6, dtype="bfloat16")
    layers = [replace(full(), k=k, v=v) for k, v in PAIRS]
    whole = relative_errors.relative_errors(invented(), plan, 0, layers, ROPE, {})
    sizes: list[int] = []
    softmax = Tensor.softmax
    monkeypatch.setattr(Tensor, "softmax", lambda x, dim: sizes.append(x.nbytes) or softmax(x, dim))
    monkeypatch.setattr(relative_errors, "SCORE_BYTES", 4096)
    parts = relative_errors.relative_errors(invented(), plan, 0, layers, ROPE, {})
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-9)
    assert 0 < max(sizes) <= 4096


def test_a_pair_has_the_errors_it_has_alone():
    plan = CachePlan((full(),), dtype="bfloat16")  # token-wise pairs fill pages token by token, the others do not
    layers = [replace(full(), k=k, v=v) for k, v in PAIRS]
    together = relative_errors.relative_errors(invented(), plan, 0, layers, ROPE, {})
    for i, layer in enumerate(layers):
        alone = relative_errors.relative_errors(invented(), plan, 0, [layer], ROPE, {})
        torch.testing.assert_close(together[:, i], alone[:, 0], rtol=0, atol=0)


def test_a_layer_of_zeros_has_no_error():
    seen = replace(invented(), value=torch.zeros(1, 2, TOKENS, 16))
    found = relative_errors.relative_errors(
        seen, CachePlan((full(),), dtype="bfloat16"), 0, [replace(full(), k=TOKEN[0], v=TOKEN[0])], ROPE, {}
    )
    assert found.isfinite().all()
    assert found[1] == found[3] == 0
    assert found[0] > 0.1


def test_windows_in_which_nothing_is_read_packed_are_refused():
    plan = CachePlan((full(),), residual_window=64, dtype="bfloat16")
    with pytest.raises(InputError, match="windows of 58 tokens are too short"):
        relative_errors.relative_errors(invented(), plan, 0, [replace(full(), k=TOKEN[0], v=TOKEN[0])], ROPE, {})


# --- all layers -------------------------------------------------------------------------------------------------------


def tiny() -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.15,
        )
    )  # fmt: skip
    model = model.bfloat16().eval().requires_grad_(False)
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.float()
    model.set_attn_implementation("kvcli")
    return model


SPACE = SearchSpace(k=(*TOKEN, KVFormat(2, "channel", group=32)), v=TOKEN, block_sizes=(16, 32))
SETTING = Setting(16, 2, 8)


def measured(ids: Tensor, step: Any = lambda: None) -> RelativeErrors:
    model = tiny()
    layers = [LayerPlan(g.num_kv_heads, g.head_dim, EXACT, EXACT) for g in geometry(model.config)]
    return measure(Probe(model, ids, Rope.from_model(model), {}), SPACE, layers, SETTING, "bfloat16", step)


def test_every_layer_and_window_is_measured_on_the_exact_models_attention():
    ids = torch.randint(0, 96, (2, 70), generator=torch.Generator().manual_seed(2))
    steps: list[int] = []
    found = measured(ids, lambda: steps.append(1))
    assert len(steps) == 2 * 3
    assert found.pairs == list(itertools.product(range(3), range(3)))  # groups of 32 do not fit pages of 16
    windows = [measured(x[None]) for x in ids]
    for name in ("key", "value", "attention", "output"):
        table = torch.tensor(getattr(found, name))
        assert table.shape == (3, 9)
        torch.testing.assert_close(table, sum(torch.tensor(getattr(x, name)) for x in windows) / 2)
    model = tiny()
    layer = full()
    plan = CachePlan((layer,) * 3, 16, 2, 8, "bfloat16")
    pairs = [replace(layer, k=k, v=v) for k, v in itertools.product(TOKEN, TOKEN)]
    for i, _, seen in layer_inputs(model, plan, ids[:1]):
        here = relative_errors.relative_errors(seen, plan, i, pairs, Rope.from_model(model), {})
        assert here[3].tolist() == pytest.approx(windows[0].output[i])


def test_errors_fall_with_bits_and_belong_to_their_tensor():
    found = measured(torch.randint(0, 96, (2, 70), generator=torch.Generator().manual_seed(3)))
    at = {pair: i for i, pair in enumerate(found.pairs)}
    for layer in range(3):
        e_k, e_v, e_a, e_o = (x[layer] for x in (found.key, found.value, found.attention, found.output))
        for fixed in range(3):
            for few, more in itertools.pairwise(range(3)):
                assert e_k[at[more, fixed]] < e_k[at[few, fixed]] / 2
                assert e_v[at[fixed, more]] < e_v[at[fixed, few]] / 2
                assert e_a[at[more, fixed]] < e_a[at[few, fixed]] / 2
                assert e_o[at[more, more]] < e_o[at[few, few]] / 2
            # values do not touch keys and weights, nor keys values
            assert e_k[at[fixed, 0]] == e_k[at[fixed, 2]]
            assert e_a[at[fixed, 0]] == e_a[at[fixed, 2]]
            assert e_v[at[0, fixed]] == e_v[at[2, fixed]]


def test_measurements_survive_json():
    found = measured(torch.randint(0, 96, (1, 64), generator=torch.Generator().manual_seed(4)))
    assert RelativeErrors.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_only_formats_that_pages_hold_are_paired():
    assert pairs_of(SPACE, Setting(32, 0, 0)) == list(itertools.product(range(4), range(3)))


@pytest.mark.slow
def test_sensitivities_of_the_standing_model_are_shaped_as_the_paper_says(smollm2: Path):
    loaded = load(str(smollm2))
    loaded.model.set_attn_implementation("kvcli")
    ids = corpora.tokens("builtin:arithmetic", loaded, num_tokens=256, seed=0, length=256).ids
    layers = exact_layers(loaded)
    space = load_recipe("kvtuner-token")
    assert space is not None
    space = space.fitting(layers)
    found = measure(Probe(loaded.model, ids, loaded.rope, {}), space, layers, next(space.settings()), loaded.dtype)
    bits = [(space.k[k].bits, space.v[v].bits) for k, v in found.pairs]
    rows = [dict(zip(bits, x, strict=True)) for x in found.output]
    assert sum(x[2, 8] > x[8, 2] for x in rows) >= 0.8 * len(rows)
    assert all(x[8, 8] < x[4, 4] < x[2, 2] for x in rows)
    # at a scale near the published ones: 0.0146, 0.207 and 0.962 on Llama-3.1-8B
    mean = {b: sum(x[b, b] for x in rows) / len(rows) for b in (2, 4, 8)}
    assert 0.003 < mean[8] < 0.05
    assert 0.05 < mean[4] < 0.5
    assert 0.3 < mean[2] < 3
