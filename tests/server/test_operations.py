"""What operators and intruders meet: health, metrics, keys, sizes, hosts, origins, and a log that keeps quiet."""

from __future__ import annotations

import json
import logging
import socket

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import ANSWER, ScriptedEngine, app_of, eventually, listening

from kvcli.server import logs
from kvcli.server.served import Settings

SECRET = "a very private question"


def error_of(answer: httpx.Response) -> dict[str, object]:
    found = answer.json()["error"]
    assert found.keys() == {"message", "type", "param", "code"}
    return found


def metrics_of(client: httpx.Client) -> dict[str, float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {x.name: x.value for family in families for x in family.samples if "le" not in x.labels and not x.labels}


def test_health_and_readiness_turn_red_with_the_engine(client, engine):
    assert [client.get(x).status_code for x in ("/health", "/ready")] == [200, 200]
    engine.failed = RuntimeError("broken")
    for path in ("/health", "/ready"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()) == (503, {"status": "failed"})
    assert metrics_of(client)["kvcli_engine_up"] == 0


def test_metrics(client, engine):
    engine.step_seconds = 0.001
    client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5, "n": 2})
    client.post("/v1/completions", json={"prompt": "abc", "temperature": 9})
    client.get("/no/such/path")
    found = metrics_of(client)
    assert found["kvcli_queue_length"] == 2
    assert found["kvcli_running_sequences"] == 0
    assert (found["kvcli_pages_total"], found["kvcli_pages_used"], found["kvcli_pages_free"]) == (100, 0, 100)
    assert (found["kvcli_prefix_hit_tokens_total"], found["kvcli_prefix_query_tokens_total"]) == (30, 40)
    assert found["kvcli_generated_tokens_total"] == 10
    idle = [found[f"kvcli_{x}"] for x in ("capacity_bytes", "demotions_total", "promotions_total")]
    assert idle == [4096, 3, 2]
    assert found["kvcli_effective_bits"] == 3.21
    assert found["kvcli_time_to_first_token_seconds_count"] == 2
    assert found["kvcli_inter_token_latency_seconds_count"] == 8
    assert 0 < found["kvcli_inter_token_latency_seconds_sum"] < found["kvcli_request_seconds_sum"] * 2
    assert found["kvcli_request_seconds_count"] == 1
    text = client.get("/metrics").text
    assert 'kvcli_http_requests_total{endpoint="/v1/completions",status="400"} 1.0' in text
    assert 'kvcli_http_requests_total{endpoint="other",status="404"} 1.0' in text


def test_tokens_and_back(client):
    found = client.post("/tokenize", json={"prompt": "Grüße", "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) == len("Grüße".encode())
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "Grüße"}
    chat = client.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]}).json()
    text = client.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
    assert text == "<user>Hi<assistant>"
    assert "either prompt or messages" in str(error_of(client.post("/tokenize", json={}))["message"])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/models/none", 404), ("GET", "/v1/completions", 405), ("PUT", "/", 405)],
)
def test_errors_of_the_framework_have_the_same_shape(client, method, path, status):
    answer = client.request(method, path)
    assert answer.status_code == status
    assert error_of(answer)["type"] == "invalid_request_error"
    assert answer.headers["x-request-id"].startswith("req-")


def test_an_unexpected_error_is_500_and_says_nothing_of_itself(client, engine, monkeypatch):
    monkeypatch.setattr(engine, "submit", None)
    answer = client.post("/v1/completions", json={"prompt": "abc"})
    assert answer.status_code == 500
    assert error_of(answer) == {
        "message": "Internal error; the server's log has the details.", "type": "server_error", "param": None,
        "code": "internal_error",
    }  # fmt: skip
    assert client.get("/health").status_code == 200


def test_a_key_guards_everything_but_what_monitoring_reads():
    with listening(app_of(ScriptedEngine(), Settings(api_key="right"))) as url, httpx.Client(base_url=url) as client:
        for path in ("/", "/health", "/ready", "/metrics"):
            assert client.get(path).status_code == 200
        paths = (
            "/v1/models",
            "/v1/completions",
            "/v1/chat/completions",
            "/tokenize",
            "/detokenize",
            "/openapi.json",
            "/x",
        )
        for path in paths:
            answer = client.get(path)
            assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        for header in ("right", "Basic right", "Bearer", "Bearer wrong", "Bearer righ", "Bearer right right"):
            assert client.get("/v1/models", headers={"Authorization": header}).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "bearer right"}).status_code == 200
    with listening(app_of(ScriptedEngine(), Settings(api_key="sésame"))) as url:
        for key, status in (("sésame", 200), ("sesame", 401), ("sésam", 401)):
            answer = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}".encode()})
            assert answer.status_code == status


def test_bodies_are_bounded_whether_they_say_their_size_or_not():
    engine = ScriptedEngine()
    with listening(app_of(engine, Settings(max_body_bytes=1000))) as url, httpx.Client(base_url=url) as client:
        body = json.dumps({"prompt": "a" * 200_000}).encode()
        for content in (body, iter([body[:500], body[500:]])):
            answer = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == 413
            assert "1000 bytes" in str(error_of(answer)["message"])
        assert client.post("/v1/completions", json={"prompt": "a" * 100}).status_code == 200
    assert len(engine.requests) == 1


def test_only_its_own_names_are_answered():
    hosts = Settings(allowed_hosts=frozenset({"localhost", "127.0.0.1", "[::1]"}))
    with listening(app_of(ScriptedEngine(), hosts)) as url, httpx.Client(base_url=url) as client:
        for host in ("localhost", "localhost:8000", "127.0.0.1:80", "[::1]:8000", "LocalHost"):
            assert client.get("/v1/models", headers={"Host": host}).status_code == 200
        for host in ("evil.example", "localhost.evil.example:8000", "127.0.0.1.evil.example", ""):
            answer = client.get("/v1/models", headers={"Host": host})
            assert (answer.status_code, error_of(answer)["code"]) == (403, "unknown_host")


def test_other_origins_are_off_unless_named():
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with listening(app_of(ScriptedEngine())) as url:
        assert not [
            x for x in httpx.get(f"{url}/v1/models", headers=preflight).headers if x.startswith("access-control")
        ]
        assert httpx.options(f"{url}/v1/completions", headers=preflight).status_code == 405
    settings = Settings(cors_origins=("https://a.example",), api_key="key")
    with listening(app_of(ScriptedEngine(), settings)) as url:
        answer = httpx.options(f"{url}/v1/completions", headers=preflight)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://a.example")
        other = httpx.options(f"{url}/v1/completions", headers={**preflight, "Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
        # a refusal can be read by the page that caused it
        refused = httpx.get(f"{url}/v1/models", headers=preflight)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://a.example")


def test_a_form_of_another_page_is_no_request(client, engine):
    """A page elsewhere may send text/plain without asking first."""
    body = json.dumps({"prompt": "abc"})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = client.post("/v1/completions", content=body, headers={"Content-Type": kind})
        assert answer.status_code == 400
    assert client.post("/v1/completions", content=body).status_code == 400
    assert not engine.requests


@pytest.mark.parametrize("as_json", [False, True])
def test_the_log_has_numbers_and_no_text(as_json, capsys):
    engine = ScriptedEngine()
    logs.set_up(as_json=as_json)
    try:
        with listening(app_of(engine, Settings(api_key="k"))) as url:
            client = httpx.Client(base_url=url, headers={"Authorization": "Bearer k"})
            client.post(f"/v1/completions?q={SECRET}", json={"prompt": SECRET, "max_tokens": 200})
            client.post(
                "/v1/chat/completions", json={"messages": [{"role": "user", "content": SECRET}], "stream": True}
            )
            client.post("/v1/completions", json={"prompt": SECRET, SECRET: SECRET})
            client.get(f"/{SECRET}")
            engine.submit = None
            client.post("/v1/completions", json={"prompt": SECRET})
            client.close()
    finally:
        for name in ("kvcli", "uvicorn"):
            logger = logging.getLogger(name)
            logger.handlers, logger.propagate = [], True
    said = capsys.readouterr().err
    assert SECRET not in said
    assert ANSWER not in said
    assert "Bearer" not in said
    lines = [x for x in said.splitlines() if "/v1/completions" in x]
    assert len(lines) == 3
    if as_json:
        first = json.loads(lines[0])
        assert (first["endpoint"], first["status"], first["prompt_tokens"]) == ("/v1/completions", 200, len(SECRET))
        assert first["completion_tokens"] == len(ANSWER)
    else:
        assert "status=200" in lines[0]
        assert f"prompt_tokens={len(SECRET)} completion_tokens={len(ANSWER)}" in lines[0]


def test_a_client_that_stops_sending_holds_nothing_up(client, url):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert client.post("/v1/completions", json={"prompt": "abc"}).status_code == 200
    eventually(lambda: client.get("/health").status_code == 200)
