"""Requests that nobody should send: every one is refused with 4xx, or answered, and the server stays up."""

from __future__ import annotations

import json
import socket
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import CONTEXT, ScriptedEngine, app_of, listening

schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.checks")

POSTS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
FIELDS = (
    "n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "seed",
    "frequency_penalty", "stop", "stop_token_ids", "logit_bias", "logprobs", "stream", "stream_options", "model",
    "user", "ignore_eos", "best_of", "echo", "prompt",
)  # fmt: skip
ODD = (
    -1, 10**30, -(10**400), 1e308, 0.5, "", "7", [], {}, [[]], [None], {"a": 1}, "x" * 1000, "\ud800", ["\udfff"], "\0",
    [1] * 5000, {str(x): 1 for x in range(2000)}, {"-1": 0}, {"99999999999": 0}, [[["deep"]]], [-5], [2**31],
)  # fmt: skip
RAW = (
    b"", b"{", b"null", b"[]", b'"text"', b"NaN", b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "seed": 1e999}',
    b'{"prompt": "\xff\xfe"}', b'\xef\xbb\xbf{"prompt": "a"', b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000,
    b'{"prompt": "\\ud800"}', b'{"prompt": "a", "prompt": 5}', b"\x00" * 100,
    b'{"messages": [{"role": "user", "content": "\\udc00"}]}',
)  # fmt: skip


@pytest.fixture(scope="module")
def url():
    with listening(app_of(ScriptedEngine())) as found:
        yield found
        assert httpx.get(f"{found}/health").status_code == 200


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url, timeout=60) as made:
        yield made


def refused(answer: httpx.Response) -> str:
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text)
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"].endswith(".")
    return str(error["message"])


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("body", RAW, ids=range(len(RAW)))
def test_what_is_no_request(client, path, body):
    refused(client.post(path, content=body, headers={"Content-Type": "application/json"}))


@pytest.mark.parametrize("field", FIELDS)
def test_values_that_a_field_cannot_have(client, field):
    taken = 0
    for value in (*ODD, True, None):
        answer = client.post(
            "/v1/completions", content=json.dumps({"prompt": "a", "max_tokens": 2, field: value}),
            headers={"Content-Type": "application/json"},
        )  # fmt: skip
        if answer.status_code == 200:
            taken += 1
        else:
            assert field in refused(answer)
    assert taken < len(ODD) - 10


def test_messages_that_are_none(client):
    for message in ({}, {"role": "user"}, {"role": "king", "content": ""}, {"role": "user", "content": 5}, "Hi", None,
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
                    {"role": "user", "content": "Hi", "tool_calls": []}):  # fmt: skip
        assert "messages" in refused(client.post("/v1/chat/completions", json={"messages": [message]}))
    refused(client.post("/v1/chat/completions", json={"messages": []}))
    refused(client.post("/v1/chat/completions", json={**CHAT, "top_logprobs": 2}))
    refused(client.post("/v1/chat/completions", json={**CHAT, "stream_options": {"include_usage": True}}))


def test_prompts_as_long_as_the_context_and_as_the_body(client):
    assert str(CONTEXT) in refused(client.post("/v1/completions", json={"prompt": [1] * CONTEXT}))
    assert client.post("/v1/completions", json={"prompt": [1] * (CONTEXT - 1)}).status_code == 200
    assert str(CONTEXT) in refused(client.post("/v1/completions", json={"prompt": "word " * 100_000}))


def test_what_is_no_http(url, client):
    where = urlsplit(url)
    for raw in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"GET\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\n\r\n", b"\0" * 5000,
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ):  # fmt: skip
        with socket.create_connection((where.hostname, where.port), timeout=30) as open_one:
            open_one.sendall(raw)
            open_one.shutdown(socket.SHUT_WR)
            answer = b""
            try:
                while piece := open_one.recv(65536):
                    answer += piece
            except ConnectionResetError:
                pass
        assert b" 500 " not in answer[:30]
    assert client.get("/health").status_code == 200


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), x, max_size=4),
    max_leaves=8,
)


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(POSTS), body=st.dictionaries(st.sampled_from((*FIELDS, "messages", "tokens")), json_values))
def test_any_json(client, path, body):
    answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    if answer.status_code != 200:
        refused(answer)


document = schemathesis.openapi.from_dict(app_of(ScriptedEngine()).openapi())
CHECKS = [
    checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
    checks.response_schema_conformance, checks.negative_data_rejection,
]  # fmt: skip


@document.parametrize()
@settings(max_examples=15, suppress_health_check=list(HealthCheck))
def test_the_openapi_document(case, url):
    """Answers are as the document says, and what it does not allow is refused."""
    case.call_and_validate(base_url=url, checks=CHECKS)
