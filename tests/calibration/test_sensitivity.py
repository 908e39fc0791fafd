"""Sensitivities against brute force and against really running the cache."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from kvcli.calibration import sensitivity
from kvcli.calibration.capture import Attention, layer_inputs
from kvcli.calibration.sensitivity import BASE, MIN_KL, Probe, Sensitivity, carry_over
from kvcli.calibration.space import SearchSpace, Setting
from kvcli.calibration.surrogate import solve
from kvcli.models.architectures import Rope, geometry
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.packed_cache import PackedCache
from kvcli.runtime.packed_layer import PackedLayer

EXACT = KVFormat.exact()
WIDTHS = tuple(KVFormat(bits, group=16) for bits in (2, 3, 4, 8))
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # wide, so that attention is not flat
}


def tiny(dtype: torch.dtype, window: int | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    if window:
        model: PreTrainedModel = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=window, head_dim=16))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model = model.to(dtype).eval().requires_grad_(False)
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.float()  # as in a loaded checkpoint
    model.set_attn_implementation("kvcli")
    return model


def exact_layers(model: PreTrainedModel) -> list[LayerPlan]:
    return [
        LayerPlan(g.num_kv_heads, g.head_dim, EXACT, EXACT, kind=g.kind, window=g.window)
        for g in geometry(model.config)
    ]


def means(layers: list[LayerPlan]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"layer.{i}.{which}.mean": torch.randn(x.num_kv_heads, x.head_dim, generator=generator) / 4
        for i, x in enumerate(layers)
        for which in "kv"
    }


def random_ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(0, 96, (batch, tokens), generator=torch.Generator().manual_seed(2))


def probe_of(model: PreTrainedModel, ids: Tensor) -> Probe:
    return Probe(model, ids, Rope.from_model(model), means(exact_layers(model)))


def space(k: tuple[KVFormat, ...] = WIDTHS, v: tuple[KVFormat, ...] = WIDTHS, **fields: Any) -> SearchSpace:
    return SearchSpace(k=k, v=v, **fields)


# --- carrying measurements over ---------------------------------------------------------------------------------------

errors = st.floats(-18, 2).map(math.exp)


@given(st.lists(errors, min_size=1, max_size=8), st.floats(0, 20), st.data())
def test_carry_over_keeps_what_was_measured(error, kl, data):
    at = data.draw(st.integers(0, len(error) - 1))
    carried = carry_over(error, at, kl)
    assert len(carried) == len(error)
    assert carried[at] == pytest.approx(max(kl, MIN_KL), rel=1e-12)


@given(st.lists(errors, min_size=2, max_size=8), st.floats(0, 20), st.data())
def test_carry_over_never_lets_a_larger_error_cost_less(error, kl, data):
    carried = carry_over(error, data.draw(st.integers(0, len(error) - 1)), kl)
    for (e, x), (f, y) in itertools.combinations(zip(error, carried, strict=True), 2):
        assert x <= y if e <= f else y <= x


def test_carry_over_is_proportional_to_the_squared_error():
    assert carry_over([0.5, 0.25, 0.05], 0, 0.2) == pytest.approx([0.2, 0.1, 0.02])


@pytest.mark.parametrize("error", [[0.1, 0.0], [0.0, 0.0], [0.0]])
@pytest.mark.parametrize("kl", [0.3, 0.0, -1e-17])
def test_what_has_no_error_costs_nothing_to_speak_of(error, kl):
    assert 0 <= carry_over(error, 0, kl)[-1] < 1e-6


@pytest.mark.parametrize(
    ("formats", "bits"),
    [((4, 2, 3, 8), 3), ((2, 2, 8), 8), ((4,), 4), ((16,), 16), ((16, 4), 4), ((16, 2, 4), 4), ((32, 16, 8), 8)],
)
def test_the_measured_format_has_the_second_smallest_width_of_those_that_lose_anything(formats, bits):
    candidates = tuple(KVFormat(x, group=16 * (i + 1)) for i, x in enumerate(formats))
    assert sensitivity.anchor(candidates) == formats.index(bits)


# --- output errors ----------------------------------------------------------------------------------------------------

TREATMENTS: list[dict[str, Any]] = [
    {},
    {"rope": "before"},
    {"transform": "hadamard", "center": True},
    {"transform": "hadamard", "center": True, "rope": "before"},
]
CANDIDATES = (*WIDTHS, KVFormat(3, "channel", group=16, symmetric=False), KVFormat(2, group=16, grid="gaussian"), EXACT)


def error_by_hand(seen: Attention, plan: CachePlan, index: int, which: str, rope: Rope, tensors: dict[str, Tensor]):
    """Store the tokens in a real layer and attend from each query of the second half, one head at a time."""
    store = PackedLayer(plan, index, rope=rope, tensors=tensors)
    store.append(0, store.exact(0, seen.key[0], seen.value[0]))
    packed_k, packed_v, first = store.read(0)
    tokens, block = seen.key.shape[2], plan.block_size
    group = seen.query.shape[1] // seen.key.shape[1]
    wrong = norm = 0.0
    for t in range(tokens // 2, tokens):
        boundary = max(0, (t + 1 - plan.residual_window) // block) * block
        start = max(0, t - store.plan.window + 1) if store.plan.window else 0
        sinks = 0 if store.plan.window else plan.sink_tokens
        for head in range(seen.query.shape[1]):
            exact = [x[0, head // group, start : t + 1].double() for x in (seen.key, seen.value)]
            stored = [x.clone() for x in exact]
            for s in range(start, boundary):
                if s >= sinks:
                    side = 0 if which == "k" else 1
                    stored[side][s - start] = (packed_k, packed_v)[side][head // group, s - first].double()
            outputs = [
                ((k @ seen.query[0, head, t].double() * seen.scaling).softmax(0) @ v) for k, v in (exact, stored)
            ]
            wrong += float((outputs[1] - outputs[0]).square().sum())
            norm += float(outputs[0].square().sum())
    return wrong / norm


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("treatment", TREATMENTS, ids=str)
def test_output_errors_are_those_of_attention_on_the_stored_tokens(treatment, window):
    model = tiny(torch.float32, window)
    layers = [replace(x, **treatment) for x in exact_layers(model)]
    plan = CachePlan(tuple(layers), block_size=16, sink_tokens=3, residual_window=6, dtype="bfloat16")
    rope, tensors = Rope.from_model(model), means(layers)
    index, _, seen = list(layer_inputs(model, plan, random_ids(1, 58)))[1]
    seen = Attention(seen.query, seen.key.bfloat16().float(), seen.value.bfloat16().float(), seen.scaling)
    for which in sensitivity.TENSORS:
        found = sensitivity.output_errors(seen, plan, index, which, CANDIDATES, rope, tensors)
        for fmt, error in zip(CANDIDATES, found, strict=True):
            changed = list(layers)  # the other tensor is packed too, so that an exact format is tried on the same pages
            changed[index] = replace(layers[index], **{"k": WIDTHS[0], "v": WIDTHS[0], which: fmt})
            stored = replace(plan, layers=tuple(changed))
            assert error == pytest.approx(error_by_hand(seen, stored, index, which, rope, tensors), rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("first", [0, -1], ids=["exact last", "exact first"])
def test_output_errors_do_not_depend_on_the_order_of_candidates(first):
    model = tiny(torch.float32)
    plan = CachePlan(tuple(exact_layers(model)), sink_tokens=3, residual_window=6)
    _, _, seen = next(layer_inputs(model, plan, random_ids(1, 58)))
    rope = Rope.from_model(model)
    formats = CANDIDATES[first:] + CANDIDATES[:first]
    found = dict(zip(formats, sensitivity.output_errors(seen, plan, 0, "k", formats, rope, {}), strict=True))
    for fmt in CANDIDATES:
        alone = sensitivity.output_errors(seen, plan, 0, "k", (WIDTHS[0], fmt), rope, {})[1]
        assert found[fmt] == alone


@pytest.mark.parametrize("which", ["k", "v"])
def test_output_errors_fall_with_bits(which):
    model = tiny(torch.float32)
    plan = CachePlan(tuple(exact_layers(model)), sink_tokens=4)
    for index, _, seen in layer_inputs(model, plan, random_ids(2, 64)):
        found = sensitivity.output_errors(seen, plan, index, which, (*WIDTHS, EXACT), Rope.from_model(model), {})
        assert all(a > 2 * b for a, b in itertools.pairwise(found))
        assert found[-1] < 1e-6


# --- measuring layers -------------------------------------------------------------------------------------------------


def layers_of(probe: Probe, searched: SearchSpace, layers: list[LayerPlan]) -> dict[str, Any]:
    """Measure every layer as calibration does."""
    each = [sensitivity.measure_layer(probe, searched, layers, "bfloat16", i) for i in range(len(layers))]
    return sensitivity.layer_costs(searched, json.loads(json.dumps(each)))


def ratios_of(probe: Probe, searched: SearchSpace, layers: list[LayerPlan]) -> dict[Setting, float]:
    """Measure every setting as calibration does."""
    plans = sensitivity.setting_plans(searched, layers, "bfloat16")
    kl = {s: sensitivity.measure_plan(probe, p.to_json())["kl"] for s, p in plans.items()}
    return sensitivity.setting_ratios(searched, layers, kl)


def kl_of_running(model: PreTrainedModel, plan: CachePlan, probe: Probe) -> float:
    """KL of the second half's tokens between the model with this cache and the stock model."""
    cache = PackedCache(plan, batch_size=len(probe.ids), rope=probe.rope, tensors=probe.tensors)
    packed = model(probe.ids, past_key_values=cache).logits
    model.set_attn_implementation("sdpa")
    stock = model(probe.ids, use_cache=False).logits
    model.set_attn_implementation("kvcli")
    half = probe.ids.shape[1] // 2
    p, q = (x[:, half:].double().log_softmax(-1) for x in (stock, packed))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("window", [None, 24])
def test_a_layers_kl_is_that_of_really_storing_this_layer_alone(window):
    model = tiny(torch.bfloat16, window)
    layers = exact_layers(model)
    searched = space(
        (*WIDTHS[::2], KVFormat(3, "channel", group=32), WIDTHS[1]),  # the group makes pages of 32 tokens
        (KVFormat(3, group=16), KVFormat(2, group=16), EXACT),
        block_sizes=(32,), transform="hadamard", center=True,
    )  # fmt: skip
    probe = probe_of(model, random_ids(2, 90))
    found = layers_of(probe, searched, layers)
    assert set(found) == {"error", "kl", "measured"}
    for which, at, block in (("k", 2, 32), ("v", 0, 16)):
        fmt = getattr(searched, which)[at]
        measured = found["measured"][which]
        assert KVFormat.from_json(measured["format"]) == fmt
        for i in range(len(layers)):
            stored = [searched.layer(x, EXACT, EXACT) for x in layers]
            stored[i] = stored[i].with_format(which, fmt)
            plan = CachePlan(tuple(stored), block_size=block, sink_tokens=BASE.sink_tokens, dtype="bfloat16")
            ran = kl_of_running(model, plan, probe)
            assert ran > 1e-5
            assert measured["kl"][i] == pytest.approx(ran, rel=1e-3)
            assert found["kl"][which][i] == carry_over(found["error"][which][i], at, measured["kl"][i])
            assert len(found["error"][which][i]) == len(getattr(searched, which))


@pytest.mark.parametrize("k", [(EXACT,), (EXACT, KVFormat(4, group=16)), (KVFormat(4, group=16), EXACT)], ids=str)
def test_exact_candidates_cost_nothing_and_the_others_what_they_do(k):
    model = tiny(torch.bfloat16)
    layers, probe = exact_layers(model), probe_of(model, random_ids(1, 64))
    found = layers_of(probe, space(k, (KVFormat(4, group=16),)), layers)
    for costs in (*found["kl"]["k"], *found["kl"]["v"]):
        assert all(0 <= x < 1 for x in costs)
    for costs in found["kl"]["k"]:
        assert costs[k.index(EXACT)] < 1e-6
        assert len(k) == 1 or costs[k.index(KVFormat(4, group=16))] > 1e-6


# --- measuring settings -----------------------------------------------------------------------------------------------


def test_settings_are_measured_on_whole_plans_relative_to_the_base():
    model = tiny(torch.bfloat16)
    layers = exact_layers(model)
    probe = probe_of(model, random_ids(1, 160))
    searched = space(block_sizes=(16, 32), sink_tokens=(0, 4), residual_windows=(0, 24, 40))
    found = ratios_of(probe, searched, layers)
    assert set(found) == set(searched.settings())
    assert found[Setting(16, 4, 24)] == 1

    def kl(block: int, sinks: int, window: int) -> float:
        stored = tuple(searched.layer(x, WIDTHS[1], WIDTHS[1]) for x in layers)
        return kl_of_running(model, CachePlan(stored, block, sinks, window, "bfloat16"), probe)

    base = kl(16, 4, 24)
    for setting, ratio in found.items():
        tail, sinks = kl(setting.block_size, 4, setting.residual_window), kl(16, setting.sink_tokens, 24)
        assert ratio == pytest.approx(tail * sinks / base**2, rel=1e-3)
    assert found[Setting(16, 4, 40)] < found[Setting(16, 4, 0)]


@pytest.mark.parametrize(
    ("sliding", "windows", "base"),
    [(None, (0, 16, 32, 64), 32), (None, (0, 16), 16), (None, (64, 128), 64), (64, (0, 16, 32), 16), (24, (0, 16), 0)],
)
def test_layers_are_compared_behind_a_window_that_leaves_something_packed(sliding, windows, base):
    layers = exact_layers(tiny(torch.bfloat16, sliding))
    found = sensitivity.base_setting(space(block_sizes=(16,), residual_windows=windows), layers)
    assert found == Setting(16, BASE.sink_tokens, base)


def test_a_layer_that_looks_at_its_neighbours_costs_less_behind_a_window():
    # what a layer costs is measured as plans with the window read it: nearby tokens exactly
    model = tiny(torch.bfloat16)
    layers, probe = exact_layers(model), probe_of(model, random_ids(2, 90))
    bare, behind = (layers_of(probe, space(residual_windows=x), layers)["measured"] for x in ((0,), (0, 32)))
    for which in "kv":
        assert all(0 < a < b for a, b in zip(behind[which]["kl"], bare[which]["kl"], strict=True))


@pytest.mark.parametrize("blocks", [(32,), (16, 32), (64,)])
def test_formats_that_need_large_pages_can_be_measured(blocks):
    # per-channel keys in groups of 32, as KIVI stores them, beside pages they do not fit
    model = tiny(torch.bfloat16)
    k = tuple(KVFormat(bits, "channel", group=32) for bits in (2, 4))
    searched = space((*k, KVFormat(4, group=16)), block_sizes=blocks, sink_tokens=(0,), residual_windows=(32,))
    layers = exact_layers(model)
    found = ratios_of(probe_of(model, random_ids(1, 128)), searched.fitting(layers), layers)
    assert set(found) == set(searched.settings())
    assert all(0 < x < math.inf for x in found.values())


def test_a_plans_cost_is_that_of_really_running_it(monkeypatch):
    model = tiny(torch.bfloat16)
    layers, probe = exact_layers(model), probe_of(model, random_ids(2, 90))
    stored = tuple(space().layer(x, WIDTHS[0], WIDTHS[1]) for x in layers)
    plan = CachePlan(stored, 16, 4, 0, "bfloat16")
    monkeypatch.setattr(sensitivity, "ROWS", 7)  # the 45 scored tokens are compared in pieces
    found = probe.cost_of(plan)
    assert found.kl == pytest.approx(kl_of_running(model, plan, probe), rel=1e-3)
    cache = PackedCache(plan, batch_size=2, rope=probe.rope, tensors=probe.tensors)
    nll = []
    for more in ({"past_key_values": cache}, {"use_cache": False}):
        model.set_attn_implementation("kvcli" if "past_key_values" in more else "sdpa")
        logits = model(probe.ids, **more).logits[:, 45:-1].float()
        nll.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), probe.ids[:, 46:].flatten()))
    model.set_attn_implementation("kvcli")
    assert found.delta_nll == pytest.approx(float(nll[0] - nll[1]), rel=2e-2, abs=1e-5)
    assert probe.scored_tokens == 90


def test_layers_may_be_measured_in_any_order_and_by_a_copy_of_the_probe():
    model = tiny(torch.bfloat16)
    layers, probe = exact_layers(model), probe_of(model, random_ids(1, 64))
    in_order = [sensitivity.measure_layer(probe, space(), layers, "bfloat16", i) for i in range(2)]
    other = pickle.loads(pickle.dumps(probe))
    assert [sensitivity.measure_layer(other, space(), layers, "bfloat16", i) for i in (1, 0, 1)] == [
        in_order[1], in_order[0], in_order[1]
    ]  # fmt: skip
    with pytest.raises(IndexError):
        probe.inputs_of(CachePlan(tuple(layers)), 2)


def test_the_exact_model_answers_once_for_probes_of_all_tensors():
    model = tiny(torch.float32)
    plan, probe = CachePlan(tuple(exact_layers(model))), probe_of(model, random_ids(1, 64))
    found = probe.using({}).reference(plan)
    assert probe.reference(plan) is found
    assert probe.using({"other": torch.zeros(1)}).reference(plan) is found
    assert torch.equal(pickle.loads(pickle.dumps(probe)).reference(plan), found)


def test_output_errors_do_not_depend_on_how_queries_are_split(monkeypatch):
    model = tiny(torch.float32)
    plan = CachePlan(tuple(exact_layers(model)), sink_tokens=3, residual_window=6)
    _, _, seen = next(layer_inputs(model, plan, random_ids(1, 58)))
    rope = Rope.from_model(model)
    for which in sensitivity.TENSORS:
        whole = sensitivity.output_errors(seen, plan, 0, which, CANDIDATES, rope, {})
        with monkeypatch.context() as patched:
            patched.setattr(sensitivity, "QUERIES", 5)
            split = sensitivity.output_errors(seen, plan, 0, which, CANDIDATES, rope, {})
        assert split == pytest.approx(whole, rel=1e-5, abs=1e-12)


def test_measurements_survive_json():
    model = tiny(torch.bfloat16, 24)
    layers = exact_layers(model)
    searched = space(sink_tokens=(0, 4), transform="hadamard", center=True)
    probe = probe_of(model, random_ids(1, 64))
    ratio = ratios_of(probe, searched, layers)
    measured = layers_of(probe, searched, layers)
    found = Sensitivity(searched, layers, "bfloat16", measured["error"], measured["kl"], measured["measured"], ratio)
    again = Sensitivity.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    assert solve(again, 6, 64) == solve(found, 6, 64)
