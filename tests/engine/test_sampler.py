"""The sampler against Transformers' processors, plain formulas and counted draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvcli.engine import sampler
from kvcli.engine.request import SamplingParams
from kvcli.engine.sampler import SamplerState, draw, filtered, sample
from kvcli.errors import KvcliError, UsageError

VOCABULARY = 60


def scores(seed: int, rows: int = 1, vocabulary: int = VOCABULARY) -> Tensor:
    return 4 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def as_transformers_would(p: SamplingParams, logits: Tensor) -> Tensor:
    ids: Any = torch.zeros(1, 1, dtype=torch.int64)
    out: Any = TemperatureLogitsWarper(p.temperature)(ids, logits)
    if p.top_k:
        out = TopKLogitsWarper(p.top_k)(ids, out)
    if p.top_p < 1:
        out = TopPLogitsWarper(p.top_p)(ids, out)
    if p.min_p:
        out = MinPLogitsWarper(p.min_p)(ids, out)
    return Tensor(out.softmax(-1))


PARAMS = st.builds(
    SamplingParams, temperature=st.floats(0.05, 3), top_p=st.floats(0.01, 1), top_k=st.integers(0, 80),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)  # fmt: skip


@settings(max_examples=100)
@example([SamplingParams(temperature=0.25, top_p=1 - 2**-53)], 0, 3)
@given(st.lists(PARAMS, min_size=1, max_size=5), st.integers(0, 10**6), st.sampled_from([3, 512]))
def test_rows_with_settings_of_their_own_are_filtered_as_transformers_would(
    params: list[SamplingParams], seed: int, near: int
) -> None:
    logits = scores(seed, len(params))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "NEAR", near)
        found = filtered(params, logits).softmax(-1)
    for row, p in enumerate(params):
        expected = as_transformers_would(p, logits[row : row + 1])[0]
        # A token at the very edge of top_p may fall either way by rounding, and takes others' mass along; so may any
        # number of tokens whose mass is below rounding, where top_p is all but 1.
        edge = ((found[row] > 0) != (expected > 0)) & (torch.maximum(found[row], expected) > 1e-6)
        assert int(edge.sum()) <= 1
        if not edge.any():
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-6)


def test_penalties_and_biases_are_the_published_formulas() -> None:
    params = SamplingParams(
        repetition_penalty=1.7, presence_penalty=0.6, frequency_penalty=-0.3, logit_bias={7: 2.5, 9: -100.0}
    )
    prompt, logits = [3, 4, 4], scores(1)[0]
    state = SamplerState(params, prompt)
    for token in (5, 5, 6):
        state.add(token)
    ids: Any = torch.tensor([[3, 4, 4, 5, 5, 6]])
    expected: Any = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits[None].clone())
    for token, count in ((5, 2), (6, 1)):
        expected[0, token] -= 0.6 - 0.3 * count
    expected = SequenceBiasLogitsProcessor([[[7], 2.5], [[9], -100.0]])(ids, expected)
    before = logits.clone()
    assert torch.equal(state.adjust(logits), expected[0])
    assert torch.equal(logits, before)
    assert not state.is_plain
    assert SamplerState(SamplingParams(temperature=1.0), prompt).is_plain


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_draws_follow_the_probabilities(temperature: float) -> None:
    logits, p = scores(2, vocabulary=6)[0], SamplingParams(temperature=temperature, seed=5)
    count = 4000
    state = SamplerState(p, [])
    tokens = torch.cat([draw(logits.repeat(100, 1), [state] * 100) for _ in range(count // 100)])
    expected = (logits / temperature).softmax(-1) * count
    found = torch.bincount(tokens, minlength=6)
    chi2 = float(((found - expected) ** 2 / expected.clamp(min=1e-9))[expected > 5].sum())
    assert chi2 < 30  # five degrees of freedom: once in 70 000 seeds


def test_a_seed_gives_the_same_tokens_in_any_company() -> None:
    def run(company: int) -> list[int]:
        states = [SamplerState(SamplingParams(temperature=1.0, seed=11), [1]) for _ in range(2)]
        states[1] = SamplerState(SamplingParams(temperature=1.0, seed=11), [1], 1)
        others = [SamplerState(SamplingParams(temperature=float(i % 2), top_k=i), [1]) for i in range(company)]
        out = []
        for step in range(20):
            rows = torch.cat((scores(step, company), scores(50 + step).repeat(2, 1)))
            chosen = sample(rows, [*others, *states])
            out += [x.token for x in chosen[company:]]
        return out

    assert run(0) == run(3)
    assert run(0)[::2] != run(0)[1::2]  # another choice of the same request


def test_the_greedy_token_is_the_likeliest_and_no_generator_is_made() -> None:
    logits = scores(3, 4)
    states = [SamplerState(SamplingParams(), []) for _ in range(4)]
    assert [x.token for x in sample(logits, states)] == logits.argmax(-1).tolist()
    assert all(x.random is None for x in states)


def test_log_probabilities_are_the_models_own() -> None:
    logits = scores(4, 3)
    states = [
        SamplerState(SamplingParams(), []),
        SamplerState(SamplingParams(logprobs=0, temperature=3.0, seed=1), []),
        SamplerState(SamplingParams(logprobs=3, logit_bias={5: 100.0}), []),
    ]
    plain, drawn, biased = sample(logits, states)
    table = logits.log_softmax(-1)
    assert plain.logprob is None
    assert drawn.logprob == pytest.approx(float(table[1, drawn.token]))
    assert drawn.top == ()
    assert biased.token == 5
    assert biased.logprob == pytest.approx(float(table[2, 5]))
    assert [x for x, _ in biased.top] == table[2].topk(3).indices.tolist()
    assert [y for _, y in biased.top] == pytest.approx(table[2].topk(3).values.tolist())


@pytest.mark.parametrize("change", [lambda x: x / 0, lambda x: x * torch.nan])
def test_scores_that_are_no_numbers_are_an_error(change: Callable[[Tensor], Tensor]) -> None:
    logits = scores(5, 2)
    logits[1] = change(logits[1] * 0)
    with pytest.raises(KvcliError, match="not numbers"):
        sample(logits, [SamplerState(SamplingParams(), [])] * 2)


def test_a_vanishing_temperature_is_the_likeliest_token() -> None:
    logits = scores(6)
    state = SamplerState(SamplingParams(temperature=1e-30, seed=0), [])
    assert sample(logits, [state])[0].token == int(logits.argmax())


BAD: list[dict[str, Any]] = [
    {"max_tokens": 0}, {"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1},
    {"top_k": -1}, {"min_p": 2.0}, {"repetition_penalty": 0.0}, {"presence_penalty": 3.0},
    {"frequency_penalty": float("inf")}, {"n": 0}, {"n": 1000}, {"seed": 2**70}, {"logprobs": 21}, {"logprobs": -1},
    {"stop": ["x"] * 17}, {"stop": [""]}, {"stop": ["x" * 300]}, {"logit_bias": {60: 1.0}}, {"logit_bias": {-1: 1.0}},
    {"logit_bias": {1: 101.0}}, {"stop_token_ids": [60]}, {"logit_bias": dict.fromkeys(range(1025), 0.0)},
]  # fmt: skip


@pytest.mark.parametrize("fields", BAD, ids=lambda x: next(iter(x)))
def test_what_lies_outside_its_range_is_refused_by_name(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(UsageError, match=name if name != "stop" else "stop string"):
        SamplingParams(**fields).check(VOCABULARY)


def test_the_ends_of_all_ranges_are_taken() -> None:
    SamplingParams(
        max_tokens=None, temperature=100, top_p=1e-9, top_k=10**9, min_p=1, repetition_penalty=1e-9,
        presence_penalty=-2, frequency_penalty=2, seed=-(2**63), stop=["x" * 256], stop_token_ids=[59],
        logprobs=20, n=128,
        logit_bias={0: -100, 59: 100},
    ).check(VOCABULARY)  # fmt: skip
    SamplerState(SamplingParams(temperature=1, seed=-(2**63)), [])
