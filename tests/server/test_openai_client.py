"""The official client, which is what most people will call with."""

from __future__ import annotations

import asyncio

import pytest
from serving import ANSWER, CONTEXT, ScriptedEngine, app_of, eventually, listening

from kvcli.server import replies
from kvcli.server.served import Settings

openai = pytest.importorskip("openai")

HELLO = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]


@pytest.fixture
def api(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_models(api):
    (model,) = api.models.list().data
    assert (model.id, model.object, model.owned_by) == ("scripted", "model", "kvcli")
    assert api.models.retrieve("scripted").max_model_len == CONTEXT


def test_completion(api, engine):
    done = api.completions.create(model="scripted", prompt="abc", max_tokens=200, seed=7, temperature=0.5, top_p=0.9)
    (choice,) = done.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (ANSWER, "stop", None)
    assert (done.object, done.model) == ("text_completion", "scripted")
    assert done.usage.prompt_tokens == 3
    assert done.usage.total_tokens == 3 + done.usage.completion_tokens == 3 + len(ANSWER)
    assert done.usage.prompt_tokens_details.cached_tokens == 3
    params = engine.requests[0].params
    assert (params.seed, params.temperature, params.top_p, params.max_tokens) == (7, 0.5, 0.9, 200)


def test_a_completion_has_16_tokens_unless_told_otherwise_and_a_chat_as_many_as_fit(api, engine):
    done = api.completions.create(model="scripted", prompt="abc")
    assert (done.choices[0].text, done.choices[0].finish_reason) == (ANSWER[:16], "length")
    api.chat.completions.create(model="scripted", messages=HELLO)
    assert engine.requests[1].params.max_tokens is None
    api.chat.completions.create(model="scripted", messages=HELLO, max_tokens=9, max_completion_tokens=5)
    assert engine.requests[2].params.max_tokens == 5


def test_every_setting_reaches_the_engine(api, engine):
    api.completions.create(
        model="scripted", prompt=[1, 2, 3], max_tokens=5, n=2, presence_penalty=0.5, frequency_penalty=-0.5,
        logit_bias={"5": -100, "6": 1.5}, stop=["x", "y"], logprobs=3, best_of=2, user="me",
        extra_body={"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [9], "ignore_eos": True},
    )  # fmt: skip
    params = engine.requests[0].params
    assert list(engine.requests[0].prompt) == [1, 2, 3]
    assert (params.n, params.presence_penalty, params.frequency_penalty, params.logprobs) == (2, 0.5, -0.5, 3)
    assert (params.top_k, params.min_p, params.repetition_penalty, params.ignore_eos) == (4, 0.1, 1.1, True)
    assert (params.logit_bias, params.stop, params.stop_token_ids) == ({5: -100, 6: 1.5}, ("x", "y"), (9,))


def test_what_is_left_out_is_as_the_checkpoint_recommends():
    engine = ScriptedEngine()
    with listening(app_of(engine, temperature=0.7, top_k=20)) as url:
        api = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        api.completions.create(model="scripted", prompt="a")
        api.completions.create(model="scripted", prompt="a", temperature=1e-9, extra_body={"top_k": -1})
    params = [x.params for x in engine.requests]
    assert [(x.temperature, x.top_k) for x in params] == [(0.7, 20), (0.0, 0)]


def test_several_prompts_and_choices_keep_their_numbers(api, engine):
    done = api.completions.create(model="scripted", prompt=["one", "three"], n=2, max_tokens=4, echo=True)
    assert [x.index for x in done.choices] == [0, 1, 2, 3]
    assert [x.text for x in done.choices] == ["one" + ANSWER[:4]] * 2 + ["three" + ANSWER[:4]] * 2
    assert done.usage.prompt_tokens == 3 + 5
    assert done.usage.completion_tokens == 4 * 4
    assert [len(x.prompt) for x in engine.requests] == [3, 5]


@pytest.mark.parametrize("usage", [False, True])
def test_a_streamed_completion_is_the_whole_one_in_pieces(api, usage):
    asked = {"model": "scripted", "prompt": "abc", "max_tokens": 20, "n": 2, "echo": True}
    whole = api.completions.create(**asked)
    more = {"stream_options": {"include_usage": True}} if usage else {}
    texts, reasons, used = ["", ""], [None, None], []
    for part in api.completions.create(**asked, stream=True, **more):
        assert part.object == "text_completion"
        used.append(part.usage)
        for choice in part.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [x.text for x in whole.choices]
    assert reasons == ["length", "length"]
    assert used[:-1] == [None] * (len(used) - 1)
    assert used[-1] == (whole.usage if usage else None)


def test_stop_strings(api):
    done = api.completions.create(model="scripted", prompt="abc", max_tokens=200, stop=", a")
    assert (done.choices[0].text, done.choices[0].finish_reason) == (ANSWER.split(", a")[0], "stop")


def test_logprobs_of_completions(api):
    asked = {"model": "scripted", "prompt": "abc", "max_tokens": 4, "logprobs": 2}
    found = api.completions.create(**asked).choices[0].logprobs
    assert found.tokens == list(ANSWER[:4])
    assert found.token_logprobs == [-0.5] * 4
    assert found.text_offset == [0, 1, 2, 3]
    assert found.top_logprobs[1] == {ANSWER[1]: -0.5, "a": -1, "b": -2}
    streamed = [x.choices[0].logprobs for x in api.completions.create(**asked, stream=True) if x.choices[0].text]
    assert [x.text_offset for x in streamed] == [[0], [1], [2], [3]]
    assert [x.tokens[0] for x in streamed] == found.tokens


def test_logprobs_of_the_prompt_come_with_echo(api, engine):
    asked = {"model": "scripted", "prompt": ["abc", "de"], "max_tokens": 3, "logprobs": 1, "echo": True}
    whole = api.completions.create(**asked)
    assert [x.params.prompt_logprobs for x in engine.requests] == [1, 1]
    for choice, prompt in zip(whole.choices, ("abc", "de"), strict=True):
        assert choice.text == prompt + ANSWER[:3]
        found = choice.logprobs
        assert found.token_logprobs == [None] + [-2.0] * (len(found.tokens) - 4) + [-0.5] * 3
        assert found.top_logprobs[0] is None
        assert found.top_logprobs[-1] == {ANSWER[2]: -0.5, "a": -1}
        assert found.text_offset[-3:] == [len(prompt), len(prompt) + 1, len(prompt) + 2]
    texts, lists = ["", ""], [[], []]
    for part in api.completions.create(**asked, stream=True):
        for choice in part.choices:
            texts[choice.index] += choice.text
            if choice.logprobs is not None:
                found = choice.logprobs
                lists[choice.index] += zip(
                    found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset, strict=True
                )
    assert texts == [x.text for x in whole.choices]
    for choice, found in zip(whole.choices, lists, strict=True):
        x = choice.logprobs
        assert found == list(zip(x.tokens, x.token_logprobs, x.top_logprobs, x.text_offset, strict=True))


def test_offsets_point_into_the_text_even_where_tokens_are_not_in_it():
    replacement = "\N{REPLACEMENT CHARACTER}"
    tokens = ["<s>", " Once", " upon", replacement, replacement, " a"]
    assert replies._offsets(tokens, "Once upon\N{SNOWMAN} a") == [0, 0, 4, 9, 9, 10]


def test_chat(api, engine):
    messages = [*HELLO[:1], {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    done = api.chat.completions.create(model="scripted", messages=messages, n=2)
    assert [x.message.content for x in done.choices] == [ANSWER] * 2
    assert {x.message.role for x in done.choices} == {"assistant"}
    assert done.object == "chat.completion"
    assert len(engine.requests[0].prompt) == len("<system>Be kind.<user>Hi<assistant>")
    # an answer can be sent back as it came
    api.chat.completions.create(model="scripted", messages=[*HELLO, done.choices[0].message, HELLO[1]])


def test_streamed_chat(api):
    asked = {"model": "scripted", "messages": HELLO, "logprobs": True, "top_logprobs": 1}
    parts = list(api.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(x.choices[0].delta.content or "" for x in parts[:-1]) == ANSWER
    assert parts[-2].choices[0].finish_reason == "stop"
    assert parts[-1].choices == []
    assert parts[-1].usage.completion_tokens == len(ANSWER)
    assert {x.id for x in parts} == {parts[0].id}
    assert {x.object for x in parts} == {"chat.completion.chunk"}
    first = parts[1].choices[0].logprobs.content[0]
    assert (first.token, bytes(first.bytes), first.top_logprobs[0].token) == ("G", b"G", "a")
    whole = api.chat.completions.create(**asked).choices[0].logprobs.content
    assert [x.choices[0].logprobs.content[0] for x in parts[1:-2]] == whole


def test_chat_without_a_template_and_messages_that_it_refuses():
    with listening(app_of(ScriptedEngine(), template=None)) as url:
        api = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        with pytest.raises(openai.BadRequestError, match="no chat template") as error:
            api.chat.completions.create(model="scripted", messages=HELLO)
        assert error.value.code == "no_chat_template"
    with listening(app_of(ScriptedEngine())) as url:
        api = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        with pytest.raises(openai.BadRequestError, match="refused the messages: no tools here"):
            api.chat.completions.create(model="scripted", messages=[{"role": "tool", "content": "x"}])


def test_errors_are_the_classes_that_the_client_knows(api, engine):
    ask = api.completions.create
    with pytest.raises(openai.NotFoundError) as error:
        ask(model="another", prompt="abc")
    assert (error.value.code, error.value.param, error.value.type) == (
        "model_not_found", "model", "invalid_request_error",
    )  # fmt: skip
    with pytest.raises(openai.BadRequestError, match=f"{CONTEXT} tokens.*{CONTEXT - 1} fit") as error:
        ask(model="scripted", prompt="a" * CONTEXT)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="temperature") as error:
        ask(model="scripted", prompt="abc", temperature=3)
    assert error.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="Unrecognized request argument: tools"):
        api.chat.completions.create(model="scripted", messages=HELLO, tools=[])
    with pytest.raises(openai.BadRequestError, match="outside the vocabulary"):
        ask(model="scripted", prompt=[1, 99999])
    with pytest.raises(openai.BadRequestError, match="128"):
        ask(model="scripted", prompt=["a"] * 100, n=2)
    engine.full = True
    with pytest.raises(openai.RateLimitError, match="try again") as error:
        ask(model="scripted", prompt="abc")
    assert error.value.response.headers["retry-after"] == "7"
    assert error.value.code == "queue_full"
    engine.full, engine.failed = False, RuntimeError("broken")
    with pytest.raises(openai.InternalServerError) as error:
        ask(model="scripted", prompt="abc")
    assert error.value.status_code == 503


def test_one_refused_prompt_takes_none_of_the_others_in(api, engine):
    with pytest.raises(openai.BadRequestError):
        api.completions.create(model="scripted", prompt=["abc", "a" * CONTEXT])
    assert not engine.requests


def test_a_key():
    with listening(app_of(ScriptedEngine(), Settings(api_key="right"))) as url:
        assert openai.OpenAI(base_url=f"{url}/v1", api_key="right").models.list().data
        with pytest.raises(openai.AuthenticationError) as error:
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").completions.create(model="scripted", prompt="abc")
        assert error.value.code == "invalid_api_key"


def test_a_timeout_ends_the_work(engine, url):
    engine.step_seconds = 60
    api = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        api.completions.create(model="scripted", prompt="abc")
    eventually(lambda: engine.aborted and not engine.running)


def test_leaving_a_stream_ends_the_work(api, engine):
    engine.step_seconds = 0.01
    engine.answer = "x" * 100_000
    stream = api.chat.completions.create(model="scripted", messages=HELLO, n=2, stream=True)
    for part in stream:
        if part.choices[0].delta.content:
            break
    assert engine.running
    stream.close()
    eventually(lambda: engine.aborted and not engine.running)


def test_leaving_before_the_first_token_ends_the_work(api, engine):
    engine.step_seconds = 60
    stream = api.completions.create(model="scripted", prompt=["abc", "abd"], stream=True)
    eventually(lambda: len(engine.running) == 2)
    stream.close()
    eventually(lambda: len(engine.aborted) == 2)


def test_cancelling_a_task_ends_the_work(engine, url):
    engine.step_seconds = 60

    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as api:
            task = asyncio.create_task(api.completions.create(model="scripted", prompt="abc"))
            while not engine.running:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(ask())
    eventually(lambda: engine.aborted and not engine.running)


def test_many_at_once(engine, url):
    engine.step_seconds = 0.001

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as api:
            made = (
                api.completions.create(model="scripted", prompt="abc", max_tokens=i + 1) for i in range(len(ANSWER))
            )
            return [x.choices[0].text for x in await asyncio.gather(*made)]

    assert asyncio.run(ask()) == [ANSWER[: i + 1] for i in range(len(ANSWER))]
    assert not engine.running


def test_a_failure_in_a_stream_is_its_last_event(api, engine):
    engine.step_seconds = 0.01
    stream = api.completions.create(model="scripted", prompt="abc", stream=True, max_tokens=40)
    next(iter(stream))
    engine.failed = RuntimeError("broken")
    with pytest.raises(openai.APIError, match="engine has failed"):
        list(stream)
