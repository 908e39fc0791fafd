"""The engine on a small model: whatever runs beside it, an answer is the one that it would be alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config

from kvcli.engine import EngineConfig, Output, Request, SamplingParams
from kvcli.engine.engine import Engine, Failure
from kvcli.engine.pool import PoolSize, page_bytes, slot_bytes
from kvcli.errors import BudgetError, KvcliError, UsageError
from kvcli.models.architectures import Rope, geometry
from kvcli.models.loading import LoadedModel, load
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime import kvrt
from kvcli.runtime.packed_model import PackedModel
from kvcli.runtime.runner import ModelRunner

try:
    kvrt.library("cpu")
except kvrt.NativeError as error:
    pytest.skip(f"needs the native kernels: {error}", allow_module_level=True)

EXACT, TOKEN8, TOKEN4 = KVFormat(16), KVFormat(8, group=16), KVFormat(4, group=16)
CHANNEL2 = KVFormat(2, "channel", 16, symmetric=False)
PLANS: dict[str, tuple[list[KVFormat], dict[str, int]]] = {
    "window": ([CHANNEL2, TOKEN4], {"residual_window": 16, "sink_tokens": 4}),
    "odd window": ([TOKEN4, TOKEN8], {"residual_window": 21}),
    "mixed": ([EXACT, CHANNEL2], {"residual_window": 8, "sink_tokens": 2}),
    "portable": ([TOKEN8, TOKEN4], {}),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _many_in_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let more sequences run than the memory holds at full length: pages run out."""
    monkeypatch.setattr("kvcli.engine.pool.SHORT", 32)


@pytest.fixture(scope="module")
def loaded(tinystories: Path) -> LoadedModel:
    return load(str(tinystories), dtype="float32")


def model_of(loaded: LoadedModel, name: str) -> PackedModel:
    formats, fields = PLANS[name]
    layers = tuple(LayerPlan(x.num_kv_heads, x.head_dim, f, f) for x, f in zip(loaded.geometry, formats, strict=True))
    return PackedModel(loaded, CachePlan(layers, **fields), {})  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=PLANS)
def model(request: pytest.FixtureRequest, loaded: LoadedModel) -> PackedModel:
    return model_of(loaded, str(request.param))


@pytest.fixture(scope="module")
def window(loaded: LoadedModel) -> PackedModel:
    return model_of(loaded, "window")


def memory_for(plan: CachePlan, pages: int, slots: int) -> int:
    return pages * page_bytes(plan) + slots * slot_bytes(plan)


def solo(model: PackedModel) -> Callable[[list[int], int], list[int]]:
    """Greedy answers through the plain runner, one at a time."""
    runner = ModelRunner(model.loaded, model.plan, model.tensors, capacity=256, deterministic=True)
    end: Any = model.loaded.model.generation_config.eos_token_id
    known: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def answer(prompt: list[int], count: int) -> list[int]:
        key = tuple(prompt), count
        if key not in known:
            runner.cache.reset()
            out = [int(runner.prefill(torch.tensor(prompt)).argmax())]
            while len(out) < count and out[-1] != end:
                out.append(int(runner.decode(torch.tensor(out[-1:]))[0].argmax()))
            known[key] = out
        return known[key]

    return answer


def run(engine: Engine) -> dict[str, list[Any]]:
    out: dict[str, list[Any]] = {}
    while not engine.is_idle:
        for event in engine.step():
            out.setdefault(event.request_id, []).append(event)
    return out


def tokens_of(events: list[Output]) -> list[int]:
    return [x.token_id for x in events if x.token_id is not None]


PROMPTS = st.tuples(st.integers(0, 3), st.integers(0, 25), st.integers(0, 2))
LOADS = st.lists(st.tuples(PROMPTS, st.integers(1, 50), st.integers(0, 12)), min_size=1, max_size=7)


@pytest.mark.slow
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_deterministic_answers_do_not_depend_on_what_else_runs(model: PackedModel, data: st.DataObject) -> None:
    plan, answer = model.plan, _solo_of(model)
    config = EngineConfig(
        memory=memory_for(plan, data.draw(st.integers(18, 40), "pages"), data.draw(st.integers(3, 9), "slots")),
        max_num_seqs=data.draw(st.integers(1, 6), "seqs"), chunk=data.draw(st.integers(1, 64), "chunk"),
        max_context=160, deterministic=True, prefix_caching=data.draw(st.booleans(), "caching"),
        preemption=data.draw(st.sampled_from(["swap", "recompute"]), "preemption"),
        swap_bytes=data.draw(st.sampled_from([0, 1 << 30]), "swap"),
    )  # fmt: skip
    engine = Engine(model, config)
    expected, left = {}, set()
    events: dict[str, list[Any]] = {}
    for number, ((shared, own, kind), count, steps) in enumerate(data.draw(LOADS, "load")):
        prompt = [1, *([5 + kind] * 16 * shared), *(10 + (7 * i) % 90 + kind for i in range(own))]
        count = min(count, engine.max_context - len(prompt))
        if count < 1:
            continue
        engine.add(Request(prompt, SamplingParams(max_tokens=count), id=str(number)))
        expected[str(number)] = answer(prompt, count)
        for _ in range(steps):
            for event in engine.step():
                events.setdefault(event.request_id, []).append(event)
        if data.draw(st.integers(0, 5), "leaves") == 0:
            for event in engine.abort(str(number)):
                left.add(event.request_id)
    for name, more in run(engine).items():
        events.setdefault(name, []).extend(more)
    for name, tokens in expected.items():
        if name not in left:
            assert tokens_of(events[name]) == tokens
    stats = engine.stats()
    assert stats.pages_used == stats.queued == stats.running == stats.swapped_bytes == 0
    engine.blocks.forget()
    assert engine.stats().pages_cached == 0
    assert engine.blocks.available == engine.blocks.num_pages


_SOLO: dict[int, tuple[PackedModel, Callable[[list[int], int], list[int]]]] = {}


def _solo_of(model: PackedModel) -> Callable[[list[int], int], list[int]]:
    return _SOLO.setdefault(id(model), (model, solo(model)))[1]


def text_ids(loaded: LoadedModel, text: str) -> list[int]:
    return list(loaded.tokenizer(text).input_ids)


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_a_pool_too_small_for_all_changes_no_answer(model: PackedModel, preemption: Any) -> None:
    answer, plan = _solo_of(model), model.plan
    config = EngineConfig(
        memory=memory_for(plan, 18, 6), max_num_seqs=5, max_context=200, deterministic=True, preemption=preemption,
        prefix_caching=False,
    )  # fmt: skip
    engine = Engine(model, config)
    prompts = [[1, *range(20 + 10 * i, 50 + 10 * i)] for i in range(5)]
    for i, prompt in enumerate(prompts):
        engine.add(Request(prompt, SamplingParams(max_tokens=90, ignore_eos=False), id=str(i)))
    out = run(engine)
    assert engine.stats().preemptions > 0
    for i, prompt in enumerate(prompts):
        assert tokens_of(out[str(i)]) == answer(prompt, 90)


def test_a_prompt_seen_before_is_found_and_answers_the_same(model: PackedModel) -> None:
    answer, plan = _solo_of(model), model.plan
    engine = Engine(model, EngineConfig(memory=memory_for(plan, 40, 8), max_context=160, deterministic=True))
    story = [1, *range(30, 100)]
    for prompt in (story, story, [*story, 7, 8], story[:50] + [9] * 10, story[:50] + [11] * 10):
        engine.add(Request(prompt, SamplingParams(max_tokens=30), id="x"))
        events = run(engine)["x"]
        assert tokens_of(events) == answer(prompt, 30)
    # found: the whole prompt, the same once more, and where the fourth parted from the first
    assert events[-1].usage.cached_tokens == 48
    assert engine.stats().prefix_hit_tokens >= 64 + 64 + 48


def test_without_determinism_answers_part_only_where_two_tokens_are_all_but_equal(window: PackedModel) -> None:
    prompts = [text_ids(window.loaded, x) for x in ("Once upon a time", "Lily and Tom", "The dog was very big and")]
    memory = memory_for(window.plan, 60, 12)

    def answers(prompts: list[list[int]], chunk: int) -> list[list[Output]]:
        engine = Engine(window, EngineConfig(memory=memory, chunk=chunk))
        for i, prompt in enumerate(prompts):
            engine.add(Request(prompt, SamplingParams(max_tokens=60, logprobs=2), id=str(i)))
        out = run(engine)
        return [out[str(i)] for i in range(len(prompts))]

    together = answers(prompts, 3)
    for prompt, events in zip(prompts, together, strict=True):
        (alone,) = answers([prompt], 64)
        for a, b in zip(alone, events, strict=False):
            if a.token_id != b.token_id:
                assert abs(a.top_logprobs[0].logprob - a.top_logprobs[1].logprob) < 1e-2
                break


def test_choices_differ_by_their_seeds_and_repeat_with_them(window: PackedModel) -> None:
    prompt = text_ids(window.loaded, "Once upon a time there was")
    engine = Engine(window, EngineConfig(memory=memory_for(window.plan, 60, 12), deterministic=True))
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=3, n=3, ignore_eos=True)

    def choices() -> list[list[int]]:
        engine.add(Request(prompt, params, id="x"))
        events = run(engine)["x"]
        assert [x.usage.completion_tokens for x in events if x.usage] == [20] * 3
        return [tokens_of([x for x in events if x.index == i]) for i in range(3)]

    first = choices()
    assert len({tuple(x) for x in first}) == 3
    assert choices() == first


def test_text_ends_before_a_stop_string_and_at_a_stop_token(window: PackedModel) -> None:
    prompt = text_ids(window.loaded, "Once upon a time")
    engine = Engine(window, EngineConfig(memory=memory_for(window.plan, 60, 12), deterministic=True))

    def complete(**fields: Any) -> tuple[str, list[Output]]:
        engine.add(Request(prompt, SamplingParams(max_tokens=40, **fields), id="x"))
        events = run(engine)["x"]
        return "".join(x.text for x in events), events

    whole, events = complete()
    token = tokens_of(events)[4]
    assert events[-1].finish_reason == "length"
    assert events[-1].usage.completion_tokens == 40  # type: ignore[union-attr]
    middle = whole[12:19]
    text, events = complete(stop=["never said", middle])
    assert text == whole[: whole.index(middle)]
    assert events[-1].finish_reason == "stop"
    text, events = complete(stop_token_ids=[token])
    assert whole.startswith(text)
    assert events[-1].token_id == token
    assert events[-1].finish_reason == "stop"
    assert len(text) < len(whole)
    assert engine.is_idle


def test_one_bad_choice_takes_no_other_down(window: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(window, EngineConfig(memory=memory_for(window.plan, 60, 12), deterministic=True))
    prompt = [1, 20, 30]
    for name in "abc":
        engine.add(Request(prompt, SamplingParams(max_tokens=8), id=name))
    for choice in engine._choices["b"]:
        monkeypatch.setattr(choice.sampler, "add", lambda _: 1 / 0)
    out = run(engine)
    assert [type(x) for x in out["b"]] == [Failure]
    assert tokens_of(out["a"]) == tokens_of(out["c"]) == _solo_of(window)(prompt, 8)

    for name in "de":
        engine.add(Request(prompt, SamplingParams(max_tokens=8), id=name))
    step = engine.runner.step

    def broken(slots: list[int], tokens: list[int]) -> torch.Tensor:
        logits = step(slots, tokens).clone()
        logits[1:] = torch.nan
        return logits

    monkeypatch.setattr(engine.runner, "step", broken)
    out = run(engine)
    assert isinstance(out["e"][-1], Failure)
    assert tokens_of(out["d"]) == _solo_of(window)(prompt, 8)
    assert engine.stats().pages_used == 0


def test_what_cannot_be_served_is_refused_with_the_numbers(window: PackedModel) -> None:
    engine = Engine(window, EngineConfig(memory=memory_for(window.plan, 18, 2), max_num_seqs=1))
    assert engine.max_context == 16 * 19 - 1 + 16  # what 18 pages, a tail and the window hold
    with pytest.raises(UsageError, match="319"):
        engine.check(Request([1] * 319))
    engine.check(Request([1] * 318))
    with pytest.raises(UsageError, match="empty"):
        engine.add(Request([]))
    with pytest.raises(UsageError, match="2048"):
        engine.add(Request([2048]))
    with pytest.raises(UsageError, match="top_p"):
        engine.add(Request([1], SamplingParams(top_p=0)))
    engine.add(Request([1], id="x"))
    with pytest.raises(UsageError, match="'x'"):
        engine.add(Request([1], id="x"))
    assert [x.finish_reason for x in engine.abort("x")] == ["abort"]
    assert engine.abort("x") == []
    assert engine.is_idle


def test_a_sequence_may_fill_the_whole_context(window: PackedModel) -> None:
    engine = Engine(window, EngineConfig(memory=memory_for(window.plan, 18, 2), max_num_seqs=1, deterministic=True))
    engine.add(Request([1] * 100, SamplingParams(max_tokens=None, ignore_eos=True), id="x"))
    last = run(engine)["x"][-1]
    assert last.finish_reason == "length"
    assert last.usage.completion_tokens == engine.max_context - 100


def test_memory_is_divided_by_the_plan(model: PackedModel) -> None:
    plan = model.plan
    for memory in (40_000, 300_000, 3_000_000):
        try:
            size = PoolSize.of(plan, EngineConfig(memory=memory), 512)
        except BudgetError as error:
            least = int(str(error).split()[-1].rstrip("."))
            assert least > memory
            PoolSize.of(plan, EngineConfig(memory=least), 512)
            with pytest.raises(BudgetError):
                PoolSize.of(plan, EngineConfig(memory=least - 1), 512)
            continue
        used = memory_for(plan, size.num_pages, size.num_slots)
        assert used <= memory
        assert size.num_slots >= size.num_seqs >= 1
        assert size.max_context <= 512
        engine = Engine(model, EngineConfig(memory=memory))
        assert engine.stats().cache_bytes == used
        # one sequence costs what the plan says, but for what its last page rounds up
        one = slot_bytes(plan) + engine.blocks.geometry.needed(512) * page_bytes(plan)
        assert 0 <= one - plan.bytes_at(512) <= 3 * page_bytes(plan)


def test_an_engine_that_cannot_go_on_says_so(window: PackedModel) -> None:
    engine = Engine(window, EngineConfig(memory=memory_for(window.plan, 18, 2), max_num_seqs=1))
    engine.add(Request([1, 2, 3]))
    engine.blocks._free_slots.clear()
    with pytest.raises(KvcliError, match="cannot place"):
        engine.step()


def tiny(name: str) -> LoadedModel:
    """A random model with sliding layers."""
    torch.manual_seed(0)
    shape = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    common = {**shape, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2}
    config = {
        "mistral": lambda: MistralConfig(**common, num_hidden_layers=2, sliding_window=24),
        "qwen2": lambda: Qwen2Config(
            **common, num_hidden_layers=3, use_sliding_window=True, sliding_window=24, max_window_layers=2
        ),
    }[name]()
    model: Any = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    tokenizer: Any = SimpleNamespace(decode=lambda tokens, **_: "".join(chr(97 + x) for x in tokens))
    return LoadedModel(model, tokenizer, name, geometry(model.config), Rope.from_model(model), ())


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_sliding_layers_share_pages_too(name: str) -> None:
    loaded = tiny(name)
    layers = tuple(
        LayerPlan(x.num_kv_heads, x.head_dim, TOKEN8, TOKEN8, kind=x.kind, window=x.window) for x in loaded.geometry
    )
    model = PackedModel(loaded, CachePlan(layers, residual_window=8), {})
    answer = solo(model)
    engine = Engine(
        model, EngineConfig(memory=memory_for(model.plan, 12, 6), max_num_seqs=4, chunk=20, deterministic=True)
    )
    prompts = [[1, *range(10, 60)], [1, *range(10, 60), 3], [4, *range(20, 50)], [1, *range(10, 45), 9, 9, 9]]
    for i, prompt in enumerate(prompts):
        engine.add(Request(prompt, SamplingParams(max_tokens=70), id=str(i)))
    out = run(engine)
    for i, prompt in enumerate(prompts):
        assert tokens_of(out[str(i)]) == answer(prompt, 70)
    assert engine.stats().preemptions > 0
    engine.add(Request(prompts[3], SamplingParams(max_tokens=70), id="again"))
    assert tokens_of(run(engine)["again"]) == answer(prompts[3], 70)
    assert engine.stats().prefix_hit_tokens > 0


@pytest.mark.parametrize("activations", [8, 16])
def test_int4_weights_answer_as_the_plain_runners_do(activations: Literal[8, 16], tinystories: Path) -> None:
    def fresh() -> PackedModel:
        return model_of(load(str(tinystories), dtype="float32"), "window")

    model, prompt = fresh(), [1, *range(30, 60)]
    settings: dict[str, Any] = {"weights": "int4", "activations": activations, "deterministic": True}
    runner = ModelRunner(model.loaded, model.plan, capacity=100, **settings)
    assert runner.padded(3) == (3 if activations == 8 else 16)  # exact sums need no company
    expected = [int(runner.prefill(torch.tensor(prompt)).argmax())]
    while len(expected) < 30 and expected[-1] != 2:
        expected.append(int(runner.decode(torch.tensor(expected[-1:]))[0].argmax()))
    config = EngineConfig(memory=memory_for(model.plan, 60, 8), chunk=7, **settings)
    engine = Engine(fresh(), config)
    for i in range(3):
        engine.add(Request(prompt, SamplingParams(max_tokens=30), id=str(i)))
    out = run(engine)
    assert [tokens_of(out[str(i)]) for i in range(3)] == [expected] * 3
