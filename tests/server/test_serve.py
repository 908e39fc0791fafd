"""``kvcli serve`` and ``kvcli bench serve`` as commands, on the real engine with a tiny model."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from serving import eventually

from kvcli.artifact.reader import open_artifact
from kvcli.cli.serve import parse_size
from kvcli.errors import UsageError
from kvcli.models.loading import load
from kvcli.runtime import kvrt
from kvcli.runtime.runner import ModelRunner

try:
    kvrt.library("cpu")
except kvrt.NativeError as missing:
    pytest.skip(f"needs the CPU kernels: {missing}", allow_module_level=True)

START = 300  # seconds that a busy machine may take to import and load


@pytest.fixture(scope="module")
def artifact(tinystories, run_kvcli, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("serve") / "artifact"
    done = run_kvcli("calibrate", tinystories, "--bits", 5, "--context", 512, "--tokens", 1024, "-o", out)
    assert done.returncode == 0, done.stderr
    return Path(out)


class Serving:
    """A running ``kvcli serve``."""

    def __init__(self, artifact: Path, env: dict[str, str], log: Path, *options: str) -> None:
        self.log = log
        with log.open("w") as stderr:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "kvcli", "serve", str(artifact), "--port", "0", "--memory", "4MiB", *options],
                stdout=subprocess.PIPE, stderr=stderr, env={**env, "OMP_NUM_THREADS": "1"}, text=True,
            )  # fmt: skip
        self.url = self._wait()

    def _wait(self) -> str:
        end = time.monotonic() + START
        while time.monotonic() < end and self.popen.poll() is None:
            if found := re.search(r"http://127\.0\.0\.1:\d+", self.log.read_text()):
                try:
                    httpx.get(f"{found[0]}/ready")
                    return found[0]
                except httpx.TransportError:
                    pass
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.popen.send_signal(number)
        out, _ = self.popen.communicate(timeout=120)
        return self.popen.returncode, out


@pytest.fixture(scope="module")
def serving(artifact, clean_env, tmp_path_factory) -> Iterator[Serving]:
    log = tmp_path_factory.mktemp("log") / "log"
    started = Serving(artifact, {**clean_env, "KVCLI_API_KEY": "secret"}, log, "--deterministic", "--queue", "40")
    yield started
    started.popen.kill()
    started.popen.communicate()


@pytest.fixture
def client(serving) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=serving.url, timeout=START, headers={"Authorization": "Bearer secret"}) as made:
        yield made


def complete(client: httpx.Client, **more: object) -> dict:
    body = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, **more}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.slow
def test_the_start_says_what_one_needs(serving, tinystories):
    said = serving.log.read_text()
    for words in (tinystories.name, "effective bits at 512 tokens", "sequences of 512", "curl http", "$KVCLI_API_KEY"):
        assert words in said
    assert "secret" not in said


@pytest.mark.slow
def test_streamed_or_not_alone_or_in_a_crowd_an_answer_is_the_same(client):
    alone = complete(client)["choices"][0]
    assert alone["finish_reason"] == "length"
    crowd = complete(client, prompt=["Once upon a time", "The dog", "Lily and Tom went to the park. " * 8], n=3)
    assert [x["text"] for x in crowd["choices"][:3]] == [alone["text"]] * 3
    streamed = ""
    body = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                streamed += json.loads(line[6:])["choices"][0]["text"]
    assert streamed == alone["text"]
    tokens = client.post("/tokenize", json={"prompt": "Once upon a time"}).json()["tokens"]
    assert complete(client, prompt=tokens)["choices"][0]["text"] == alone["text"]


@pytest.mark.slow
def test_seeds_stops_and_logprobs(client):
    drawn = [complete(client, temperature=1, seed=x, n=2)["choices"] for x in (1, 1, 2)]
    texts = [[x["text"] for x in choices] for choices in drawn]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]
    whole = complete(client)["choices"][0]["text"]
    stop = whole[10:14]
    found = complete(client, stop=[stop])["choices"][0]
    assert (found["text"], found["finish_reason"]) == (whole.split(stop)[0], "stop")
    logprobs = complete(client, logprobs=2)["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == whole
    for chosen, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert chosen == max(top.values()) <= 0
    for odd in ({"seed": 2**63 - 1, "n": 3}, {"seed": -(2**63)}, {"temperature": 2, "top_p": 1e-300}):
        complete(client, **{"temperature": 1, **odd})


@pytest.mark.slow
def test_a_client_that_leaves_frees_its_pages(client, serving):
    body = {"prompt": "Once", "max_tokens": 500, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    eventually(lambda: "kvcli_pages_used 0.0" in client.get("/metrics").text, 60)


@pytest.mark.slow
def test_no_room_for_a_prompt_or_in_the_queue(client):
    refused = client.post("/v1/completions", json={"prompt": [5] * 512})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "512 tokens" in refused.json()["error"]["message"]
    never = client.post("/v1/completions", json={"prompt": ["a"] * 128})
    assert (never.status_code, never.json()["error"]["param"]) == (400, "n")
    most = int(never.json()["error"]["message"].split()[5])
    assert most > 40
    many = {"prompt": [[5]] * most, "max_tokens": 1}
    busy = {"prompt": "Once", "max_tokens": 500, "ignore_eos": True, "stream": True, "n": most}
    with client.stream("POST", "/v1/completions", json=busy) as answer:
        lines = answer.iter_lines()  # which closes the connection when it goes
        next(lines)
        full = client.post("/v1/completions", json=many)
    assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
    assert int(full.headers["Retry-After"]) >= 1
    eventually(lambda: client.post("/v1/completions", json=many).status_code == 200, 60)


@pytest.mark.slow
def test_bench_serve_prints_what_its_clients_saw(serving, run_kvcli):
    done = run_kvcli(
        "bench", "serve", serving.url, f"{serving.url}/v1", "--requests", 4, "--concurrency", 2, "--tokens", 8,
        "--prompt-tokens", 20, "--json", env={"KVCLI_API_KEY": "secret"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ours, again = found["results"]
    for row in (ours, again):
        assert (row["finished"], row["failed"], row["prompt_tokens"], row["completion_tokens"]) == (4, 0, 20, 8)
        assert 0 < row["ttft_s"]["p50"] <= row["ttft_s"]["p99"] <= row["median_s"] * 4
        assert row["itl_s"]["mean"] > 0
        assert row["tokens_per_s"] == pytest.approx(8 * row["requests_per_s"])
    assert found["ratios"] == {again["name"]: pytest.approx(ours["tokens_per_s"] / again["tokens_per_s"])}
    refused = run_kvcli("bench", "serve", serving.url, "--requests", 1, "--prompt-tokens", 5)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "401: Missing API key" in refused.stderr


@pytest.mark.slow
def test_the_harness_runs_against_it(serving, tmp_path, monkeypatch):
    """lm-evaluation-harness, with a task that generates."""
    lm_eval = pytest.importorskip("lm_eval")
    data = tmp_path / "task.jsonl"
    data.write_text("".join(json.dumps({"q": f"Once upon a time there were {i}", "a": "x"}) + "\n" for i in range(3)))
    (tmp_path / "task.yaml").write_text(
        "task: stories\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: " + str(data) + "\n"
        'output_type: generate_until\ntest_split: test\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
        'generation_kwargs:\n  until: ["."]\n  max_gen_toks: 16\n  temperature: 0\n'
        "metric_list:\n  - metric: exact_match\n"
    )
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    models = httpx.get(f"{serving.url}/v1/models", headers={"Authorization": "Bearer secret"}).json()["data"]
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": models[0]["id"],
            "base_url": f"{serving.url}/v1/completions", "tokenizer_backend": None, "num_concurrent": 2,
            "max_length": 512,
        },
        tasks=["stories"], task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )  # fmt: skip
    assert len(found["samples"]["stories"]) == 3
    assert all(x["filtered_resps"][0] for x in found["samples"]["stories"])


@pytest.mark.slow
def test_the_harness_scores_continuations_against_it(serving, artifact, client, monkeypatch):
    """lm-evaluation-harness, as its tasks of multiple choice do: echo with logprobs."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    model = LocalCompletionsAPI(
        base_url=f"{serving.url}/v1/completions", tokenizer_backend="huggingface", tokenizer=str(artifact),
        model=client.get("/v1/models").json()["data"][0]["id"], batch_size=2, num_concurrent=1, max_length=256,
    )  # fmt: skip
    begin = "Once upon a time"
    pairs = [
        (begin, complete(client)["choices"][0]["text"]),
        (begin, " zebras flew"),
        ("The dog", " was big and happy"),
    ]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = model.loglikelihood(requests)
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        prompt, rest = model._encode_pair(context, continuation)
        expected, likeliest = forced(artifact, prompt, rest)
        assert len(rest) > 1
        assert logprob == pytest.approx(expected, abs=1e-3)
        assert greedy == likeliest


def forced(artifact: Path, prompt: list[int], rest: list[int]) -> tuple[float, bool]:
    """The continuation's log-probability by the runner, and whether it is the greedy answer."""
    opened = open_artifact(artifact)
    loaded = load(str(artifact), dtype=opened.plan.dtype)
    ids = torch.tensor([*prompt, *rest])
    runner = ModelRunner(loaded, opened.plan, opened.tensors(), capacity=len(ids), threads=1, deterministic=True)
    table, _ = runner.log_probs(ids, scored=len(rest))
    wanted = ids[len(prompt) :]
    return float(table.gather(1, wanted[:, None]).sum()), bool((table.argmax(-1) == wanted).all())


@pytest.mark.slow
def test_sigterm_finishes_what_runs_and_exits_0(serving, client):
    """Last of those that share the server."""
    body = {"prompt": "Once upon a time", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        serving.popen.send_signal(signal.SIGTERM)
        rest = [x for x in lines if x.startswith("data: ")]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
    out, _ = serving.popen.communicate(timeout=120)
    assert (serving.popen.returncode, out) == (0, "")
    assert "Traceback" not in serving.log.read_text()


@pytest.mark.slow
def test_refusals_are_one_sentence(tinystories, artifact, run_kvcli):
    def refused(code: int, *options: object, words: str) -> None:
        done = run_kvcli("serve", artifact, *options)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("kvcli: ")
        assert words in done.stderr

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused(1, "--port", port, words=f"cannot listen on http://127.0.0.1:{port}: Address already in use.")
    refused(2, "--port", 0, "--host", "0.0.0.0", words="set KVCLI_API_KEY, or say --insecure.")
    refused(4, "--port", 0, "--memory", "1KiB", words="")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("5", 5),
        ("1GiB", 2**30),
        ("1.5 G", 1_500_000_000),
        ("512MB", 512_000_000),
        ("2k", 2000),
        ("3KiB", 3072),
        ("7b", 7),
    ],
)
def test_sizes(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "0", "-1", "1XB", "GiB", "1 2", "nan", "1e9", "1GiBs"])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="no size"):
        parse_size(text)
