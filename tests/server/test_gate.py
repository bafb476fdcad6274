"""Who is let in, and what a request may be before anybody looks into it."""

import socket

import httpx
import pytest
from fake_client import byte_tokenizer
from fake_server import served
from http_answers import ask

from pipeserve.server.options import ServerOptions

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = byte_tokenizer(tmp_path_factory.mktemp("model"))
    options = ServerOptions(max_body_bytes=12_000, allowed_origins=("https://a.example",))
    with served(
        folder, options, keys=("secret-1", "secret-2", " schlüsselà "), names=("fake", "other")
    ) as it:
        yield it


def bearing(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/version", "/nowhere"])
def test_a_key_is_asked_for_everywhere(server, path):
    answer = httpx.get(f"{server.url}{path}")
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{server.url}{path}", headers=bearing("secret-3")).status_code == 401
    assert httpx.get(f"{server.url}{path}", headers=bearing("secret-2")).status_code != 401


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"Bearer schl\xc3\xbcssel\xc3\xa0", 200),  # omlx#1804
        (b"Bearer schl\xfcssel", 401),  # sglang#38122
        (b"Bearer \xff\xfe", 401),
        (b"bearer   secret-1", 200),
        (b"Bearer", 401),
        (b"Basic secret-1", 401),
    ],
)
def test_keys_are_bytes(server, header, status):
    with httpx.Client() as client:
        request = client.build_request("GET", f"{server.url}/v1/models")
        request.headers = httpx.Headers([*request.headers.raw, (b"Authorization", header)])
        assert client.send(request).status_code == status


@pytest.mark.parametrize("path", ["/health", "/ready", "/health/"])
def test_but_not_by_who_looks_after_it(server, path):
    assert httpx.get(f"{server.url}{path}").status_code == 200


def test_models(server):
    headers = bearing("secret-1")
    data = httpx.get(f"{server.url}/v1/models", headers=headers).json()["data"]
    assert [card["id"] for card in data] == ["fake", "other"]
    card = httpx.get(f"{server.url}/v1/models/other", headers=headers).json()
    assert card["max_model_len"] == 64
    status, answer = ask(server, COMPLETIONS, headers, prompt="a", model="gpt-5")
    assert status == 404 and answer["error"]["code"] == "model_not_found"
    assert ask(server, COMPLETIONS, headers, prompt="a", model="other")[1]["model"] == "other"


def test_an_id_goes_through_or_is_made(server):
    headers = {**bearing("secret-1"), "X-Request-Id": "mine-1"}
    assert httpx.get(f"{server.url}/version", headers=headers).headers["x-request-id"] == "mine-1"
    headers["X-Request-Id"] = "a b"
    made = httpx.get(f"{server.url}/version", headers=headers).headers["x-request-id"]
    assert len(made) == 32


def test_a_browser_may_ask_first(server):
    headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{server.url}{COMPLETIONS}", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    headers["Origin"] = "https://b.example"
    assert httpx.options(f"{server.url}{COMPLETIONS}", headers=headers).status_code == 400


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"", 400),
        (b"[]", 400),
        (b"null", 400),
        (b'"text"', 400),
        (b'{"prompt": "\xff\xfe"}', 400),
        (b'{"prompt": "a", "temperature": NaN}', 400),
        (b'{"prompt": "a", "temperature": 1e999}', 400),
        (b'{"prompt": "a", "max_tokens": 1e400}', 400),
        (b'{"prompt": "a", "seed": 99999999999999999999999999}', 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": "a", "user": ' + b"[" * 3000 + b"]" * 3000 + b"}", 400),
        (b'{"prompt": "' + b"a" * 20_000 + b'"}', 413),
        (b'{"prompt": [' + b"1," * 3000 + b"-1]}", 400),
        (b'{"prompt": [1.5]}', 400),
        (b'{"prompt": {"a": 1}}', 400),
        (b'{"prompt": "a", "logit_bias": {"a": 1}}', 400),
        (b'{"prompt": "a", "logit_bias": {"\\ud800": 1}}', 400),
        (b'{"prompt": "a", "model": "\\ud800"}', 400),
        (b'{"prompt": "a", "request_id": "\\ud800"}', 400),
        (b'{"prompt": "a", "request_id": "' + b"a" * 1000 + b'"}', 400),  # in each event
        (b'{"prompt": "a", "stop": "' + b"a" * 9_000 + b'", "n": 200}', 400),
        (b'{"prompt": "a"' + b"".join(b', "%d": 1' % each for each in range(1000)) + b"}", 400),
        (b'{"messages": ' + b"[" * 4000 + b"]" * 4000 + b"}", 400),
    ],
)
def test_bodies_that_are_none(server, content, status):
    headers = {**bearing("secret-1"), "Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}{COMPLETIONS}", content=content, headers=headers)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_a_body_that_does_not_end_costs_its_connection_alone(server, monkeypatch):
    monkeypatch.setattr("pipeserve.server.gate._BODY_S", 0.3)
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret-1\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        assert ask(server, COMPLETIONS, bearing("secret-1"), prompt="a")[0] == 200
        slow.settimeout(20)
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")
