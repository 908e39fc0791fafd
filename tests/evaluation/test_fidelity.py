"""Perplexity, KL and flips against scipy and the stock model, and what is dumped lets anyone compute them again."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kvcli.calibration import corpora
from kvcli.errors import BudgetError, InputError
from kvcli.evaluation import fidelity
from kvcli.evaluation.fidelity import compare, evaluate
from kvcli.models.architectures import Rope, geometry
from kvcli.models.loading import LoadedModel, load
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.packed_cache import PackedCache
from kvcli.runtime.packed_model import PackedModel

EXACT = KVFormat.exact()
FOUR = KVFormat(4, group=16)
TOKENS = 250  # a multiple of nothing, so that the last page is never full


def plan_for(loaded: LoadedModel, k: KVFormat, v: KVFormat, **fields: Any) -> CachePlan:
    """One pair of formats for all layers."""
    shared = {x: fields.pop(x) for x in ("block_size", "sink_tokens", "residual_window") if x in fields}
    layers = tuple(LayerPlan(x.num_kv_heads, x.head_dim, k, v, **fields) for x in loaded.geometry)
    return CachePlan(layers, dtype=loaded.dtype, **shared)


def subject_of(loaded: LoadedModel, k: KVFormat = FOUR, v: KVFormat = FOUR, **fields: Any) -> PackedModel:
    return PackedModel(loaded, plan_for(loaded, k, v, **fields), {})


def exact_of(subject: PackedModel) -> PackedModel:
    return replace(subject, plan=subject.plan.as_exact())


@pytest.fixture(scope="module")
def loaded(tinystories: Path) -> LoadedModel:
    """TinyStories as it is, in bfloat16."""
    return load(str(tinystories))


@pytest.fixture(scope="module")
def in_float32(tinystories: Path) -> LoadedModel:
    return load(str(tinystories), dtype="float32")


@pytest.fixture(scope="module")
def in_float64(tinystories: Path) -> LoadedModel:
    return load(str(tinystories), dtype="float64")


@pytest.fixture(scope="module")
def texts(loaded: LoadedModel) -> list[Tensor]:
    return corpora.windows("builtin:narrative", loaded.tokenizer, TOKENS, limit=2)


def log_probs_of(loaded: LoadedModel, ids: Tensor) -> np.ndarray:
    """The stock model's log-probabilities of the second half's tokens, in float64, by scipy."""
    attention = loaded.model.config._attn_implementation
    loaded.model.set_attn_implementation("sdpa")
    logits = loaded.model(ids[None]).logits[0]
    loaded.model.set_attn_implementation(attention)
    first = len(ids) // 2 - 1
    return scipy.special.log_softmax(logits[first:-1].double().numpy(), axis=-1)


# --- the measures -----------------------------------------------------------------------------------------------------


def test_kl_nll_and_flips_are_those_of_scipy():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (2, fidelity.ROWS + 41, 50))  # more than are compared at once
    p, q = scipy.special.log_softmax(logits, axis=-1)
    targets = rng.integers(0, 50, len(p))
    found = compare(torch.tensor(p), torch.tensor(q), torch.tensor(targets))
    kl = scipy.special.rel_entr(np.exp(p), np.exp(q)).sum(-1)
    np.testing.assert_allclose(found["kl"], kl, rtol=1e-10)
    np.testing.assert_array_equal(found["nll"], -q[np.arange(len(q)), targets])
    np.testing.assert_array_equal(found["nll_reference"], -p[np.arange(len(p)), targets])
    np.testing.assert_array_equal(found["flip"], p.argmax(-1) != q.argmax(-1))
    assert found["kl"].dtype == torch.float64


def test_kl_is_not_symmetric_and_the_reference_comes_first():
    p, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    found = compare(p, q, torch.tensor([0]))
    assert float(found["kl"]) == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))


def test_summaries_are_means_percentiles_and_rates():
    kl = torch.arange(1001, dtype=torch.float64)
    found = {"kl": kl, "nll": kl / 500, "nll_reference": kl / 1000, "flip": kl >= 751}
    assert fidelity.summarize("kl", found) == {"mean": 500, "p99": 990, "p999": pytest.approx(999)}
    assert fidelity.summarize("flips", found) == {"rate": 250 / 1001}
    ppl = fidelity.summarize("ppl", found)
    assert ppl == {
        "value": pytest.approx(math.e),
        "reference": pytest.approx(math.exp(0.5)),
        "delta_pct": pytest.approx(100 * (math.exp(0.5) - 1)),
    }


@given(windows=st.integers(1, 3), scored=st.integers(1, 70), first=st.integers(0, 50))
def test_kl_along_the_sequence_is_of_every_position_once(windows, scored, first):
    kl = torch.arange(windows * scored, dtype=torch.float64).reshape(windows, scored)
    found = fidelity.along(kl, first)
    assert len(found) == min(fidelity.BINS, scored)
    ends = [x["first"] + x["tokens"] for x in found]
    assert [x["first"] for x in found] == [first, *ends[:-1]]
    assert ends[-1] == first + scored
    for x in found:
        at = x["first"] - first
        assert x["mean"] == pytest.approx(kl[:, at : at + x["tokens"]].numpy().mean())


def test_intervals_are_those_of_scipys_bootstrap_over_parts_of_windows():
    rng = np.random.default_rng(0)
    shape = (4, 8 * fidelity.BINS)
    found = [
        {"kl": kl, "nll": nll, "nll_reference": before, "flip": kl > 1}
        for kl, nll, before in zip(*(torch.from_numpy(rng.exponential(1, shape)) for _ in range(3)), strict=True)
    ]
    got = fidelity.measures(found, 0)

    def expected(rows: list[Tensor]) -> tuple[float, float]:
        means = torch.stack(rows).double().reshape(-1, 8).mean(1).numpy()
        interval = scipy.stats.bootstrap((means,), np.mean, method="percentile", random_state=0).confidence_interval
        return interval.low, interval.high

    assert got["kl"]["interval"] == pytest.approx(expected([x["kl"] for x in found]), rel=0.03)
    assert got["flips"]["interval"] == pytest.approx(expected([x["flip"] for x in found]), rel=0.03)
    worse = expected([x["nll"] - x["nll_reference"] for x in found])
    assert got["ppl"]["interval_pct"] == pytest.approx([100 * math.expm1(x) for x in worse], abs=1.5)
    low, high = got["ppl"]["interval_pct"]
    assert low < got["ppl"]["delta_pct"] < high


# --- against the stock model ------------------------------------------------------------------------------------------


def test_the_reference_perplexity_is_the_stock_models(loaded, texts):
    subject = subject_of(loaded)
    found = evaluate(subject, exact_of(subject), texts, tasks=("ppl",))
    nll = [-log_probs_of(loaded, ids)[np.arange(TOKENS // 2), ids[-TOKENS // 2 :]] for ids in texts]
    assert found["ppl"]["reference"] == pytest.approx(math.exp(np.concatenate(nll).mean()), rel=1e-6)
    assert found["scored_tokens"] == 2 * (TOKENS // 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_plan_is_the_stock_model_to_the_last_digit(tinystories, texts, dtype):
    loaded = load(str(tinystories), dtype=dtype)
    subject = subject_of(loaded, EXACT, EXACT)
    found = evaluate(subject, exact_of(subject), texts)
    assert found["kl"] == {"mean": 0, "p99": 0, "p999": 0, "interval": [0, 0]}
    assert found["flips"] == {"rate": 0, "interval": [0, 0]}
    assert found["ppl"]["value"] == found["ppl"]["reference"]
    assert found["ppl"]["delta_pct"] == 0
    assert found["ppl"]["interval_pct"] == [0, 0]
    loaded.model.set_attn_implementation("sdpa")
    nll = []
    for ids in texts:
        logits = loaded.model(ids[None], use_cache=False, logits_to_keep=TOKENS // 2 + 1).logits[0, :-1]
        rows = logits.float().log_softmax(-1).double()
        nll.append(-rows.gather(-1, ids[-TOKENS // 2 :, None])[:, 0])
    assert found["ppl"]["value"] == math.exp(float(torch.cat(nll).mean()))


def test_with_float32_compute_the_reference_is_rounded_and_says_so(in_float32, texts):
    subject = subject_of(in_float32, EXACT, EXACT)
    found = evaluate(subject, exact_of(subject), texts[:1])
    assert (found["dtype"], found["reference_cache"]) == ("float32", "float16")
    assert found["kl"]["mean"] == 0  # both sides are rounded alike
    exact = subject_of(in_float32, KVFormat(32), KVFormat(32))
    rounded = evaluate(exact, exact_of(exact), texts[:1])["kl"]["mean"]
    assert 0 < rounded < 1e-5


# --- reading the cache the way decoding reads it ----------------------------------------------------------------------


def mean_kl(p: Tensor, q: Tensor) -> float:
    return float(scipy.special.rel_entr(p.double().exp().numpy(), q.double().exp().numpy()).sum(-1).mean())


def test_chunks_of_any_size_and_single_tokens_agree_in_float32(in_float32, texts):
    subject = subject_of(in_float32, sink_tokens=4, residual_window=20, transform="hadamard")
    whole, *others = [subject.log_probs(texts[0], scored=TOKENS // 2, chunk=chunk)[0] for chunk in (TOKENS, 96, 17, 1)]
    for other in others:
        assert mean_kl(whole, other) < 1e-4
        assert mean_kl(other, whole) < 1e-4
    exact = exact_of(subject).log_probs(texts[0], scored=TOKENS // 2)[0]
    assert mean_kl(exact, whole) > 1e-3  # so that agreeing means something


@pytest.mark.parametrize("k", [FOUR, KVFormat(3, "channel", group=16, symmetric=False)], ids=str)
def test_chunks_of_any_size_and_single_tokens_agree_to_1e_9_in_float64(in_float64, texts, monkeypatch, k):
    def forward(self: Any, hidden_states: Tensor) -> Tensor:  # Transformers' own computes in float32
        variance = hidden_states.square().mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    subject = subject_of(in_float64, k, FOUR, sink_tokens=4, residual_window=20)
    whole, *others = [subject.log_probs(texts[0], scored=TOKENS // 2, chunk=c)[0] for c in (TOKENS, 64, 7, 1)]
    assert whole.dtype == torch.float64
    for other in others:
        torch.testing.assert_close(other, whole, rtol=0, atol=1e-9)


def test_the_chunk_changes_neither_figures_nor_bytes(in_float32, texts):
    subject = subject_of(in_float32, sink_tokens=4, residual_window=20)
    a, b = (evaluate(subject, exact_of(subject), texts[:1], chunk=chunk) for chunk in (TOKENS, 33))
    assert a["measured_bytes"] == b["measured_bytes"]
    assert a["kl"]["mean"] == pytest.approx(b["kl"]["mean"], rel=0.02)
    assert a["ppl"]["value"] == pytest.approx(b["ppl"]["value"], rel=1e-3)


def test_evaluation_is_what_decoding_one_token_at_a_time_predicts(in_float32, texts):
    # through the model's own forward pass, as generation calls it
    subject = subject_of(in_float32, sink_tokens=4)
    cache, rows = subject.new_cache(), []
    with torch.no_grad():
        for token in texts[0]:
            rows.append(in_float32.model(token[None, None], past_key_values=cache).logits[0, 0])
    decoded = torch.stack(rows)[-TOKENS // 2 - 1 : -1].log_softmax(-1)
    evaluated, _ = subject.log_probs(texts[0], scored=TOKENS // 2)
    assert mean_kl(decoded, evaluated) < 1e-4


@pytest.mark.parametrize("tokens", [4, 5, 31])
def test_short_and_odd_windows_score_their_second_half(loaded, texts, tokens):
    subject = subject_of(loaded)
    ids = texts[0][:tokens]
    found = evaluate(subject, exact_of(subject), [ids])
    assert found["scored_tokens"] == -(-tokens // 2)
    rows, _ = exact_of(subject).log_probs(ids, scored=found["scored_tokens"])
    expected = log_probs_of(loaded, ids)[-found["scored_tokens"] :]
    np.testing.assert_allclose(rows, expected, atol=1e-4)


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"sink_tokens": 4, "residual_window": 20}, {"block_size": 64}], ids=str)
def test_bits_are_measured_at_their_worst_over_the_last_block(loaded, texts, fields):
    subject = subject_of(loaded, FOUR, KVFormat(2, group=16), **fields)
    found = evaluate(subject, exact_of(subject), texts[:1], tasks=("ppl",))
    assert found["measured_bytes"] == subject.plan.bytes_at(TOKENS)
    _, allocated = subject.log_probs(texts[0], scored=4)
    assert allocated == found["measured_bytes"]
    scalars = 2 * 2 * 4 * 16  # of a token: 2 layers, keys and values, 4 heads of 16 channels
    worst = 0.0
    for n in range(TOKENS - subject.plan.block_size + 1, TOKENS + 1):
        cache = PackedCache(subject.plan, capacity=n)
        worst = max(worst, 8 * cache.nbytes / (n * scalars))
    assert found["effective_bits"] == pytest.approx(worst, rel=1e-12)
    assert found["effective_bits"] > 8 * found["measured_bytes"] / (TOKENS * scalars) or TOKENS % 16 == 0
    assert found["context"] == TOKENS
    assert found["nominal_bits"] == 3
    assert found["reference_bytes"] == 2 * scalars * 256  # whole pages


def test_means_count_where_the_models_own_bytes_do(loaded, texts):
    plan = plan_for(loaded, FOUR, FOUR, center=True)
    means = {f"layer.{i}.{which}.mean": torch.zeros(4, 16) for i in range(2) for which in "kv"}
    subject = PackedModel(loaded, plan, means)
    found = evaluate(subject, exact_of(subject), texts[:1], tasks=("kl",))
    assert found["effective_bits_with_model"] == pytest.approx(found["effective_bits"] + 8 * 1024 / (TOKENS * 256))


# --- quality ----------------------------------------------------------------------------------------------------------


def test_fewer_bits_cost_more_and_a_wrecked_plan_shows(loaded, texts):
    results = []
    for bits in (8, 4, 2):
        subject = subject_of(loaded, KVFormat(bits, group=16), KVFormat(bits, group=16))
        results.append(evaluate(subject, exact_of(subject), texts))
    good, fair, wrecked = results
    assert good["kl"]["mean"] < 1e-3
    assert 10 * good["kl"]["mean"] < fair["kl"]["mean"] < wrecked["kl"]["mean"] / 10
    assert good["flips"]["rate"] < fair["flips"]["rate"] < wrecked["flips"]["rate"]
    assert wrecked["flips"]["rate"] > 0.3
    assert abs(good["ppl"]["delta_pct"]) < 1 < 10 < wrecked["ppl"]["delta_pct"]
    for x in results:
        assert x["kl"]["mean"] < x["kl"]["p99"] < x["kl"]["p999"]
        assert x["ppl"]["delta_pct"] == pytest.approx(100 * (x["ppl"]["value"] / x["ppl"]["reference"] - 1))
        assert x["ppl"]["reference"] == good["ppl"]["reference"]


# --- the dump ---------------------------------------------------------------------------------------------------------


def test_the_dump_lets_anyone_compute_every_figure_again(loaded, texts, tmp_path):
    subject, file = subject_of(loaded, KVFormat(3, group=16), FOUR), tmp_path / "dump.safetensors"
    found = json.loads(json.dumps(evaluate(subject, exact_of(subject), texts, dump=file)))
    dump = load_file(file)
    p, q, targets = dump["reference"].astype(float), dump["quantized"].astype(float), dump["targets"]
    assert p.shape == q.shape == (2, TOKENS // 2, 2048)
    np.testing.assert_array_equal(targets, np.stack([x.numpy()[-TOKENS // 2 :] for x in texts]))
    np.testing.assert_allclose(scipy.special.logsumexp(p, axis=-1), 0, atol=1e-5)
    kl = scipy.special.rel_entr(np.exp(p), np.exp(q)).sum(-1).ravel()
    assert found["kl"]["mean"] == pytest.approx(kl.mean(), rel=1e-4)
    assert found["kl"]["p99"] == pytest.approx(np.percentile(kl, 99), rel=1e-4)
    assert found["kl"]["p999"] == pytest.approx(np.percentile(kl, 99.9), rel=1e-4)
    for name, rows in (("value", q), ("reference", p)):
        nll = -np.take_along_axis(rows, targets[..., None], -1)
        assert found["ppl"][name] == pytest.approx(np.exp(nll.mean()), rel=1e-9)
    assert found["flips"]["rate"] == (p.argmax(-1) != q.argmax(-1)).mean()
    parts = [x.mean() for x in np.array_split(kl.reshape(2, -1), fidelity.BINS, axis=1)]
    assert [x["mean"] for x in found["kl_by_position"]] == pytest.approx(parts, rel=1e-4, abs=1e-9)
    assert found["kl_by_position"][0]["first"] == TOKENS // 2
    assert [x.name for x in tmp_path.iterdir()] == ["dump.safetensors"]


@pytest.mark.parametrize("before", [None, b"an older dump"])
def test_a_dump_that_fails_leaves_what_was_there(loaded, texts, tmp_path, monkeypatch, before):
    file = tmp_path / "dump.safetensors"
    if before:
        file.write_bytes(before)

    def interrupted(tensors: Any, path: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(fidelity, "save_file", interrupted)
    subject = subject_of(loaded)
    with pytest.raises(KeyboardInterrupt):
        evaluate(subject, exact_of(subject), [texts[0][:32]], dump=file)
    assert [x.read_bytes() for x in tmp_path.iterdir()] == ([before] if before else [])


def test_a_dump_that_would_not_fit_is_refused_before_any_work(loaded, texts, tmp_path, monkeypatch):
    subject = subject_of(loaded)
    monkeypatch.setattr(PackedModel, "log_probs", None)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 2**20}))
    with pytest.raises(BudgetError, match=r"GiB of memory.*lower --limit"):
        evaluate(subject, exact_of(subject), texts, dump=tmp_path / "dump")
    assert list(tmp_path.iterdir()) == []


# --- what is refused --------------------------------------------------------------------------------------------------


def test_no_window_is_refused(loaded):
    subject = subject_of(loaded)
    with pytest.raises(InputError, match="no window"):
        evaluate(subject, exact_of(subject), [])


def test_models_with_different_vocabularies_are_refused(loaded, texts):
    config = LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    other = LlamaForCausalLM(config).eval()
    model = LoadedModel(other, loaded.tokenizer, "tiny", geometry(config), Rope.from_model(other), ())
    with pytest.raises(InputError, match="different vocabularies"):
        evaluate(subject_of(loaded), subject_of(model, EXACT, EXACT), texts)


def test_only_what_is_asked_for_is_reported_and_every_pass_is_counted(loaded, texts):
    subject, steps = subject_of(loaded), []
    found = evaluate(
        subject, exact_of(subject), [x[:32] for x in texts], tasks=("flips",), step=lambda: steps.append(1)
    )
    assert "flips" in found
    assert not {"ppl", "kl"} & set(found)
    assert len(steps) == 4


# --- the standing model -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_chunks_agree_on_the_standing_model(smollm2, wikitext_test):
    # through thirty layers a rounding in float32 moves some codes: the paths differ by a few per cent of the plan's KL
    loaded = load(str(smollm2))
    (ids,) = corpora.windows(str(wikitext_test), loaded.tokenizer, 192, limit=1)
    formats = KVFormat(8, group=32), KVFormat(4, group=32)
    subject = subject_of(loaded, *formats, sink_tokens=4, residual_window=16, transform="hadamard")
    whole, *others = [subject.log_probs(ids, scored=96, chunk=chunk)[0] for chunk in (192, 50, 1)]
    kl = mean_kl(exact_of(subject).log_probs(ids, scored=96)[0], whole)
    assert 2e-4 < kl < 0.05
    for other in others:
        assert mean_kl(whole, other) < min(1e-4, kl / 5)
