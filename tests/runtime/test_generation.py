"""Generation on the native runtime against Transformers' own: tokens, streams, ends, sampling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kvcli.errors import KvcliError, UsageError
from kvcli.models.loading import load
from kvcli.plan import CachePlan
from kvcli.quant.format import KVFormat
from kvcli.runtime import kvrt
from kvcli.runtime.generation import Generator, Sampler, Sampling, choose_backend
from kvcli.runtime.packed_model import PackedModel

try:
    kvrt.library("cpu")
except kvrt.NativeError as error:
    pytest.skip(f"needs the native kernels: {error}", allow_module_level=True)

PROMPT = "Once upon a time there was a dog"


@pytest.fixture
def subject(tinystories: Path, plan_for: Callable[..., CachePlan]) -> PackedModel:
    loaded = load(str(tinystories), dtype="float32")
    eight = KVFormat(8, group=16)
    return PackedModel(loaded, plan_for(loaded.model, eight, eight, sink_tokens=4, residual_window=16), {})


@pytest.mark.parametrize("exact", [False, True])
def test_native_generation_is_the_reference_generation(subject: PackedModel, exact: bool) -> None:
    if exact:
        subject = PackedModel(subject.loaded, subject.plan.as_exact(), {})
    sampling = Sampling(max_tokens=60)
    expected = Generator(subject, sampling).complete(PROMPT)
    for deterministic in (False, True):
        assert Generator(subject, sampling, backend="cpu", deterministic=deterministic).complete(PROMPT) == expected


def test_the_stream_is_the_text_and_ends_where_the_model_does(subject: PackedModel) -> None:
    generator = Generator(subject, Sampling(max_tokens=400), backend="cpu")
    pieces: list[str] = []
    found = generator.complete(PROMPT, pieces.append)
    assert "".join(pieces) == found.text
    assert len(pieces) > 20
    assert found.finish_reason == "stop"
    assert found.completion_tokens < 400
    again = generator.complete(PROMPT)  # the same weights, a fresh cache
    assert again == found
    config: Any = subject.loaded.model.generation_config
    ends, config.eos_token_id = config.eos_token_id, None
    try:
        assert generator.complete(PROMPT).finish_reason == "length"
    finally:
        config.eos_token_id = ends


@pytest.mark.parametrize("top_p", [1.0, 0.7, 0.05, 0.0])
@pytest.mark.parametrize("top_k", [0, 1, 9, 1000])
def test_tokens_are_drawn_from_transformers_distribution(top_k: int, top_p: float) -> None:
    logits = 3 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    expected: Any = logits[None]
    warpers: list[Any] = [TemperatureLogitsWarper(1.5)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    for warper in warpers:
        expected = warper(torch.zeros(1, 1, dtype=torch.int64), expected)
    found = Sampler(Sampling(1, 1.5, top_p, top_k), torch.zeros(1, dtype=torch.int64)).probabilities(logits)
    torch.testing.assert_close(found, expected[0].softmax(-1))


def test_sampling_keeps_to_its_seed(subject: PackedModel) -> None:
    def text(**settings: Any) -> str:
        sampling = Sampling(max_tokens=20, temperature=1.5, **settings)
        return Generator(subject, sampling, backend="cpu").complete(PROMPT).text

    assert text(seed=1) == text(seed=1)
    assert text(seed=1) != text(seed=2)
    greedy = Generator(subject, Sampling(max_tokens=20), backend="cpu").complete(PROMPT).text
    assert text(top_k=1) == text(top_p=0.0) == greedy


def test_the_models_repetition_penalty_holds_on_every_backend(subject: PackedModel) -> None:
    config: Any = subject.loaded.model.generation_config
    config.repetition_penalty = 5.0
    both = [Generator(subject, Sampling(max_tokens=60), backend=x).complete(PROMPT) for x in ("reference", "cpu")]
    config.repetition_penalty = None
    assert both[0] == both[1]
    assert both[0].text != Generator(subject, Sampling(max_tokens=60)).complete(PROMPT).text


def test_auto_takes_what_is_there(subject: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_backend(subject) == "cpu"
    monkeypatch.setattr(subject.loaded.model.config, "hidden_act", "gelu")
    assert choose_backend(subject) == "reference"
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def none_here(kind: str) -> Any:
        raise kvrt.NativeError(f"this build of kvcli has no {kind} kernels.")

    monkeypatch.setattr(kvrt, "library", none_here)
    assert Generator(subject, Sampling(), backend="auto").backend == "reference"
    with pytest.raises(KvcliError, match="no cpu kernels"):
        Generator(subject, Sampling(), backend="cpu")
    with pytest.raises(KvcliError, match="no GPU"):
        Generator(subject, Sampling(), backend="cuda")
    with pytest.raises(UsageError, match="native"):
        Generator(subject, Sampling(), backend="auto", weights="int4")


def test_a_graph_is_recorded_while_the_cache_is_empty(subject: PackedModel) -> None:
    calls: list[str] = []
    logits = torch.arange(subject.loaded.model.config.vocab_size).float()

    def said(name: str, result: Any = None) -> Callable[..., Any]:
        return lambda *_, **__: calls.append(name) or result

    generator: Any = Generator(subject, Sampling(max_tokens=3), backend="cpu")
    generator._runner = SimpleNamespace(
        device=torch.device("cuda"), plan=subject.plan, cache=SimpleNamespace(nbytes=0), resize=said("resize"),
        capture=said("capture"), prefill=said("prefill", logits), decode=said("decode", logits[None]),
    )  # fmt: skip
    assert generator.complete(PROMPT).completion_tokens == 3
    assert calls == ["resize", "capture", "prefill", "decode", "decode"]
