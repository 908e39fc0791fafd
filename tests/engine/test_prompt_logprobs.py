"""Log-probabilities of prompts: those of the plain runner that is fed the same tokens, however they were computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcli.engine import EngineConfig, Output, Request, SamplingParams
from kvcli.engine.engine import Engine, Failure
from kvcli.engine.pool import page_bytes, slot_bytes
from kvcli.errors import UsageError
from kvcli.models.loading import load
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime import kvrt
from kvcli.runtime.packed_model import PackedModel
from kvcli.runtime.runner import ModelRunner

try:
    kvrt.library("cpu")
except kvrt.NativeError as error:
    pytest.skip(f"needs the native kernels: {error}", allow_module_level=True)

PROMPT = [1, *(10 + (7 * i) % 90 for i in range(70))]


@pytest.fixture(autouse=True)
def _one_thread_and_many_in_little(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("kvcli.engine.pool.SHORT", 32)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[{"residual_window": 16, "sink_tokens": 4}, {}], ids=["window", "portable"])
def model(request: pytest.FixtureRequest, tinystories: Path) -> PackedModel:
    loaded = load(str(tinystories), dtype="float32")
    formats = KVFormat(4, group=16), KVFormat(8, group=16)
    layers = tuple(LayerPlan(x.num_kv_heads, x.head_dim, f, f) for x, f in zip(loaded.geometry, formats, strict=True))
    return PackedModel(loaded, CachePlan(layers, **request.param), {})


def engine_of(model: PackedModel, pages: int = 60, slots: int = 12, **fields: Any) -> Engine:
    memory = pages * page_bytes(model.plan) + slots * slot_bytes(model.plan)
    return Engine(model, EngineConfig(**{"memory": memory, "deterministic": True, "threads": 1, **fields}))


def forced(model: PackedModel, tokens: list[int], *, deterministic: bool = True) -> torch.Tensor:
    """The runner's own, float32 [tokens - 1, vocabulary]."""
    runner = ModelRunner(model.loaded, model.plan, capacity=len(tokens), threads=1, deterministic=deterministic)
    return runner.log_probs(torch.tensor(tokens), scored=len(tokens) - 1)[0]


def run(engine: Engine) -> dict[str, list[Any]]:
    out: dict[str, list[Any]] = {}
    while not engine.is_idle:
        for event in engine.step():
            out.setdefault(event.request_id, []).append(event)
    return out


def values_of(output: Output) -> list[float | None]:
    return [token.logprob for token, _ in output.prompt_logprobs]


def expected_of(table: torch.Tensor, prompt: list[int]) -> list[float | None]:
    return [None, *(float(line[x]) for line, x in zip(table, prompt[1:], strict=False))]


def ask(name: str, prompt: list[int], count: int = 3, **more: Any) -> Request:
    return Request(prompt, SamplingParams(max_tokens=count, logprobs=0, prompt_logprobs=2, **more), id=name)


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_they_are_the_teacher_forced_ones(model: PackedModel, chunk: int) -> None:
    engine = engine_of(model, chunk=chunk)
    engine.add(ask("x", PROMPT, n=2))
    events = run(engine)["x"]
    whole = [*PROMPT, *(x.token_id for x in events if x.index == 0)]
    table = forced(model, whole)
    first = [next(x for x in events if x.index == i) for i in range(2)]
    assert values_of(first[0]) == values_of(first[1]) == expected_of(table[: len(PROMPT) - 1], PROMPT)
    assert [token.token_id for token, _ in first[0].prompt_logprobs] == PROMPT
    assert first[0].prompt_logprobs[0][1] == ()
    for (_, top), line in zip(first[0].prompt_logprobs[1:], table, strict=False):
        assert [x.logprob for x in top] == line.topk(2).values.tolist()
    answered = [x for x in events if x.index == 0]
    assert [x.logprob.logprob for x in answered] == expected_of(table, whole)[len(PROMPT) :]
    assert all(x.prompt_logprobs == () for x in answered[1:])


def test_without_determinism_they_differ_by_rounding_only(model: PackedModel) -> None:
    engine = engine_of(model, deterministic=False, chunk=20)
    engine.add(ask("x", PROMPT))
    found = values_of(run(engine)["x"][0])
    expected = expected_of(forced(model, PROMPT, deterministic=False), PROMPT)
    assert found[1:] == pytest.approx(expected[1:], abs=0.05)  # a rounding may move a code


def test_the_prefix_cache_is_filled_by_such_prompts_and_not_asked(model: PackedModel) -> None:
    engine, expected = engine_of(model), expected_of(forced(model, PROMPT), PROMPT)
    for number in range(3):
        engine.add(ask(str(number), PROMPT))
        assert values_of(run(engine)[str(number)][0]) == expected
    assert engine.stats().prefix_hit_tokens == 0
    engine.add(Request(PROMPT, SamplingParams(max_tokens=3), id="plain"))
    (last,) = [x for x in run(engine)["plain"] if x.finish_reason]
    assert last.usage.cached_tokens >= 48
    assert last.prompt_logprobs == ()


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_runs_beside_them(model: PackedModel, data: st.DataObject) -> None:
    engine = engine_of(
        model, data.draw(st.integers(10, 20), "pages"), data.draw(st.integers(3, 6), "slots"), max_context=144,
        chunk=data.draw(st.integers(1, 40), "chunk"), max_num_seqs=4,
        preemption=data.draw(st.sampled_from(["swap", "recompute"]), "preemption"),
    )  # fmt: skip
    prompts = {str(i): [*PROMPT[: data.draw(st.integers(1, 60), "shared")], 5 + i] for i in range(4)}
    for name, prompt in prompts.items():
        engine.add(ask(name, prompt, 40))
        engine.add(Request(prompt, SamplingParams(max_tokens=20), id=f"plain {name}"))
    out = run(engine)
    for name, prompt in prompts.items():
        assert values_of(out[name][0]) == expected_of(forced(model, prompt), prompt)
    assert engine.stats().pages_used == 0


def test_a_sequence_put_aside_in_its_prompt_goes_on_where_it_was(model: PackedModel) -> None:
    for preemption in ("swap", "recompute"):
        engine = engine_of(model, chunk=20, preemption=preemption)
        engine.add(ask("x", PROMPT))
        events = [*engine.step(), *engine.step()]
        assert events == []
        engine.scheduler._preempt(engine.scheduler.running[0])
        out = run(engine)["x"]
        assert values_of(out[0]) == expected_of(forced(model, PROMPT), PROMPT)


def test_a_prompt_of_one_token_has_nothing_to_tell(model: PackedModel) -> None:
    engine = engine_of(model)
    engine.add(ask("x", [1]))
    first = run(engine)["x"][0]
    assert [(token.token_id, token.logprob) for token, _ in first.prompt_logprobs] == [(1, None)]


def test_scores_that_are_no_numbers_end_that_request_alone(model: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(model, chunk=1024)
    extend = engine.runner.extend

    def broken(slot: int, tokens: Any, *, logits: int) -> torch.Tensor | None:
        found = extend(slot, tokens, logits=logits)
        if logits > 1 and found is not None:
            found[0] = torch.nan
        return found

    monkeypatch.setattr(engine.runner, "extend", broken)
    engine.add(ask("bad", PROMPT))
    engine.add(Request(PROMPT, SamplingParams(max_tokens=3), id="good"))
    out = run(engine)
    assert [type(x) for x in out["bad"]] == [Failure]
    assert out["good"][-1].finish_reason == "length"
    assert engine.stats().pages_used == 0


def test_the_number_of_likeliest_tokens_has_a_bound(model: PackedModel) -> None:
    with pytest.raises(UsageError, match="prompt_logprobs"):
        engine_of(model).check(Request([1, 2], SamplingParams(prompt_logprobs=21)))
