"""Chats, and an engine that fails, on the real engine with a tiny model."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from pathlib import Path

import httpx
import pytest
from serving import eventually, listening

from kvcli.engine import AsyncEngine, EngineConfig
from kvcli.errors import KvcliError
from kvcli.models.loading import LoadedModel, load
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime import kvrt
from kvcli.runtime.packed_model import PackedModel
from kvcli.server import process
from kvcli.server.app import create_app
from kvcli.server.served import ServedModel, Settings

try:
    kvrt.library("cpu")
except kvrt.NativeError as missing:
    pytest.skip(f"needs the CPU kernels: {missing}", allow_module_level=True)

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
HELLO = [{"role": "user", "content": "Tell me of a dog."}]
RENDERED = "user: Tell me of a dog.\nassistant:"


@pytest.fixture(scope="module")
def loaded(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The tiny model with a chat template, which its own tokenizer has not."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tinystories, folder)
    folder.chmod(0o755)
    settings = folder / "tokenizer_config.json"
    words = {**json.loads(settings.read_text()), "chat_template": TEMPLATE}
    settings.unlink()
    settings.write_text(json.dumps(words))
    return load(str(folder), dtype="float32")


def made(loaded: LoadedModel) -> AsyncEngine:
    fmt = KVFormat(4, group=16)
    layers = tuple(LayerPlan(x.num_kv_heads, x.head_dim, fmt, fmt) for x in loaded.geometry)
    model = PackedModel(loaded, CachePlan(layers, residual_window=16, sink_tokens=4), {})
    return AsyncEngine(model, EngineConfig(memory=4 << 20, threads=1, deterministic=True, max_num_seqs=4))


def streamed(answer: httpx.Response) -> list[dict]:
    lines = [x for x in answer.text.splitlines() if x.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(x[6:]) for x in lines[:-1]]


def test_a_chat_is_the_completion_of_its_template(loaded: LoadedModel) -> None:
    engine = made(loaded)
    engine.start()
    served = ServedModel.of("tiny", loaded)
    settings = {"max_tokens": 24, "temperature": 0}
    try:
        with (
            listening(create_app(engine, served, Settings())) as url,
            httpx.Client(base_url=url, timeout=120) as client,
        ):
            assert client.get("/v1/models").json()["data"][0]["chat"] is True
            chat = {"messages": HELLO, **settings, "logprobs": True}
            whole = client.post("/v1/chat/completions", json=chat).json()
            tokens = client.post("/tokenize", json={"messages": HELLO}).json()["tokens"]
            assert tokens == loaded.tokenizer(loaded.tokenizer.bos_token + RENDERED, add_special_tokens=False).input_ids
            plain = client.post("/v1/completions", json={"prompt": tokens, **settings}).json()
            assert whole["choices"][0]["message"]["content"] == plain["choices"][0]["text"] != ""
            assert whole["usage"]["prompt_tokens"] == len(tokens)
            events = streamed(client.post("/v1/chat/completions", json={**chat, "stream": True}))
            parts = [x["choices"][0] for x in events]
            assert "".join(x["delta"].get("content") or "" for x in parts) == plain["choices"][0]["text"]
            logprobs = [y for x in parts if x["logprobs"] for y in x["logprobs"]["content"]]
            assert logprobs == whole["choices"][0]["logprobs"]["content"]
            # the next turn begins as this one did, and with what was answered
            turn = [*HELLO, whole["choices"][0]["message"], {"role": "user", "content": "And then?"}]
            again = client.post("/v1/chat/completions", json={"messages": turn, **settings}).json()
            assert again["usage"]["prompt_tokens"] > len(tokens) + 20
    finally:
        engine.stop()


def test_a_failing_kernel_ends_streams_turns_ready_red_and_ends_the_process(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = made(loaded)
    step, steps = engine._engine.runner.step, itertools.count()

    def failing(slots: list[int], tokens: list[int]) -> object:
        if next(steps) == 5:  # not when the client has read so far: the answer may be complete by then
            raise kvrt.NativeError("a kernel failed in decoding.")
        return step(slots, tokens)

    monkeypatch.setattr(engine._engine.runner, "step", failing)
    monkeypatch.setattr(process, "LINGER_SECONDS", 5)
    taken = process.bind("127.0.0.1", 0)
    url, seen = process.url("127.0.0.1", taken.getsockname()[1]), dict[str, object]()

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/ready").status_code == 200
        except httpx.TransportError:  # the port is bound, but nobody listens yet
            return False

    def client() -> None:
        eventually(ready, 60)
        body = {"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
            seen["stream"] = [line for line in answer.iter_lines() if line]
        for path in ("/ready", "/health"):
            seen[path] = httpx.get(f"{url}{path}").status_code
        seen["next"] = httpx.post(f"{url}/v1/completions", json={"prompt": "Once"}).status_code
        seen["metrics"] = httpx.get(f"{url}/metrics").text

    thread = threading.Thread(target=client)
    thread.start()
    with pytest.raises(KvcliError, match=r"the engine failed: NativeError: a kernel failed in decoding\.") as error:
        process.run(create_app(engine, ServedModel.of("tiny", loaded), Settings()), engine, taken, drain_seconds=1)
    thread.join()
    assert error.value.exit_code == 1
    first, *_, last, done = seen["stream"]  # type: ignore[misc]
    assert json.loads(first[6:])["choices"][0]["text"]
    assert done == "data: [DONE]"
    assert "the engine failed" in json.loads(last[6:])["error"]["message"]
    assert [seen[x] for x in ("/ready", "/health", "next")] == [503, 503, 503]
    assert "kvcli_engine_up 0.0" in str(seen["metrics"])
