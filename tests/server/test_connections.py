"""HTTP as clients, proxies and idlers really speak it: public reports against other servers."""

import json
import os
import random
import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import pytest
from fake_client import byte_tokenizer
from fake_server import served
from http_answers import ask, until

from pipeserve.errors import ConfigError
from pipeserve.server.listening import HttpProtocol, bound_sockets, check_certificate, url_of
from pipeserve.server.options import ServerOptions

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = byte_tokenizer(tmp_path_factory.mktemp("model"))
    with served(folder, max_model_len=1_600) as it:
        yield it


@contextmanager
def connected(server):
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as it:
        it.settimeout(20)
        yield it


def request(body, *lines, version="1.1"):
    """Of a completion, in bytes."""
    content = json.dumps(body).encode()
    head = [
        f"POST {COMPLETIONS} HTTP/{version}",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        *lines,
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + content


def rest_of(connection):
    """What comes until the server hangs up."""
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


SHORT = {"prompt": "abc", "max_tokens": 3}
CLOSE = "Connection: close"


@pytest.mark.parametrize(
    "sent",
    [
        request(SHORT, CLOSE),
        request(SHORT, version="1.0"),
        request(SHORT, CLOSE, "Expect: 100-continue"),
        request({**SHORT, "stream": True}, version="1.0"),
    ],
)
def test_each_way_to_ask(server, sent):
    with connected(server) as it:
        it.sendall(sent)
        answer = rest_of(it)
    assert b"200 OK" in answer and b"length" in answer
    if b"HTTP/1.0" in sent:  # which knows no chunks: uvicorn#1360, aiohttp#476
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b"chunked" not in head.lower()
        assert json.loads(body) if b"stream" not in sent else body.endswith(b"data: [DONE]\n\n")
        assert body[:1] in b"{d"


def test_who_offers_http_2_is_answered_by_http_1(server):
    """uvicorn#2722, vllm#57203, langchain4j#3016, lmstudio#1079: Java's client does."""
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
    with connected(server) as it:
        for _ in range(2):
            it.sendall(request(SHORT, *offer))
            told = b""
            while b'"completion_tokens":3' not in told:
                told += it.recv(1 << 16)


def test_a_body_is_not_read_as_a_head(server):
    """What is cut out of a head stays where it is in a body, one that nobody waits for too."""
    text = {"prompt": "\r\nUpgrade: h2c\r\n", "max_tokens": 1, "model": "none"}
    content = json.dumps(text).encode().replace(rb"\r\n", b"\r\n")  # no JSON, and refused
    head = f"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    with connected(server) as it:
        it.sendall(head)
        time.sleep(0.05)
        it.sendall(content + request(SHORT, CLOSE))
        assert b'"completion_tokens":3' in rest_of(it)


def test_requests_that_do_not_wait_for_answers(server):
    with connected(server) as it:
        it.sendall(request({**SHORT, "stream": True}) * 2 + request(SHORT, CLOSE))
        answers = rest_of(it)
        assert answers.count(b"200 OK") == 3 and answers.count(b"data: [DONE]") == 2


@pytest.mark.parametrize(
    "begin",
    [
        b"GET /",
        b"GET / HTTP/1.1\r\nX-Long: ",
        b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;",
        b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Trailer: ",
    ],
)
def test_what_is_no_body_has_an_end_too(server, begin):
    """CVE-2025-48956 (vllm), nodejs/llhttp#213: memory went with as long a head as was sent."""
    with connected(server) as it:
        it.sendall(begin)
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                it.sendall(b"a" * (1 << 16))
    assert ask(server, COMPLETIONS, **SHORT)[0] == 200


def test_a_long_body_in_small_chunks(server):
    content = json.dumps({**SHORT, "user": "a" * 200_000}).encode()
    chunks = (content[place : place + 20] for place in range(0, len(content), 20))
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}{COMPLETIONS}", content=chunks, headers=headers)
    assert answer.status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/metrics", "/v1/models/"])
def test_a_balancer_asks_by_head(server, path):
    """parbaked#564, omi#2985."""
    answer = httpx.head(server.url + path)
    assert answer.status_code == 200 and not answer.content


@pytest.mark.parametrize(
    "path", ["/v1/models/", "/v1//models", "//v1/models", "//v1//models//", "/v1/models/?a=//b/"]
)
def test_slashes_too_many_are_none(server, path):
    """loom#25, litellm#8350, litellm-vscode-chat#54; "/v1/models/" was a model without a name."""
    assert httpx.get(server.url + path).json()["object"] == "list"
    assert httpx.post(f"{server.url}/{COMPLETIONS}/", json=SHORT).status_code == 200


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET http://elsewhere/v1/models HTTP/1.1", b"200"),  # by a proxy
        (b"OPTIONS * HTTP/1.1", b"404"),
        (b"CONNECT elsewhere:443 HTTP/1.1", b"400"),
        (b"GET /v1/models/\xff\xfe HTTP/1.1", b"400"),
        (b"GET /v1/models/%ff%fe HTTP/1.1", b"404"),
        (b"GET /../../etc/passwd HTTP/1.1", b"404"),
        (b"PRI * HTTP/2.0", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00", b"400"),  # TLS
    ],
)
def test_lines_that_are_asked_by(server, line, status):
    with connected(server) as it:
        it.sendall(line + b"\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert rest_of(it).startswith(b"HTTP/1.1 " + status)


def test_what_is_not_there_is_said_in_openais_shape(server):
    for answer, status in (
        (httpx.get(f"{server.url}/v1/embeddings"), 404),
        (httpx.get(f"{server.url}{COMPLETIONS}"), 405),
        (httpx.options(f"{server.url}/health"), 405),
    ):
        assert answer.status_code == status and answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "status", "part"),
    [
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415, "application/json"),
        ({}, 415, "application/json"),  # vllm#11171
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415, "gzip"),
        ({"Content-Type": "application/json; charset=utf-8"}, 200, ""),
    ],
)
def test_what_a_body_is_said_to_be(server, headers, status, part):
    content = json.dumps(SHORT).encode()
    answer = httpx.post(server.url + COMPLETIONS, content=content, headers=headers)
    assert answer.status_code == status and part in answer.text


def test_who_does_not_ask_is_not_waited_for(server, monkeypatch):
    """xinference#5213, uvicorn#1192."""
    monkeypatch.setattr("pipeserve.server.listening._HEAD_S", 0.3)
    for sent in (b"", b"GET /health HT", b"\r\n", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET"):
        with connected(server) as it:
            it.sendall(sent)
            rest_of(it)


def test_who_does_not_read_is_cut_off(server, monkeypatch):
    """opencti#13908, anything-llm#6202."""
    monkeypatch.setattr("pipeserve.server.listening._UNREAD_S", 0.5)
    with connected(server) as it:
        it.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        it.sendall(request({"prompt": "a", "max_tokens": 1500, "n": 64, "stream": True}))
        until(lambda: server.service.num_open == 1)
        until(lambda: server.service.num_open == 0 and server.fake.num_unfinished == 0, 60)


def test_who_reads_slowly_gets_all_of_it(server):
    with connected(server) as it:
        it.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        it.sendall(request({"prompt": "a", "max_tokens": 300, "n": 2, "stream": True}, CLOSE))
        time.sleep(0.5)
        answer = rest_of(it)
    assert answer.count(b'"index":') == 600 and b"data: [DONE]" in answer


def test_a_long_answer_may_take_a_slow_client_long():
    """NeMo-Gym#3364: it was cut off, after all of it had been computed. Who reads on is waited for,
    however much is left; who reads next to nothing is not."""
    protocol, looks, unread = HttpProtocol.__new__(HttpProtocol), [], [900_000, 850_000, 800_000]
    transport = SimpleNamespace(
        get_write_buffer_size=lambda: unread.pop(0), abort=lambda: looks.append("abort")
    )
    loop = SimpleNamespace(call_later=lambda wait_s, *call: looks.append(call))
    flow = SimpleNamespace(pause_writing=lambda: None)
    vars(protocol).update(transport=transport, loop=loop, flow=flow)
    protocol.pause_writing()
    for _ in range(2):
        look, *before = looks.pop()
        look(*before)
    unread.append(799_000)
    look, *before = looks.pop()
    look(*before)
    assert looks == ["abort"]


def test_half_a_connection_is_none(server):
    with connected(server) as it:
        it.sendall(request({"prompt": "a", "max_tokens": 1500}))
        it.shutdown(socket.SHUT_WR)
        rest_of(it)
    until(lambda: server.service.num_open == 0 and server.fake.num_unfinished == 0)


def test_200_streams_that_break_off_anywhere_leave_nothing(server):
    """vllm#320, codex-lb#2041."""

    def one(number):
        rng = random.Random(number)
        body = {"prompt": "a", "max_tokens": rng.choice((3, 1500)), "stream": rng.random() < 0.8}
        body["n"] = rng.choice((1, 1, 2))
        sent = request(body)
        with connected(server) as it:
            it.sendall(sent[: rng.randrange(len(sent)) if rng.random() < 0.3 else len(sent)])
            for _ in range(rng.randrange(4)):
                it.settimeout(rng.random())
                try:
                    if not it.recv(rng.choice((1, 500, 1 << 16))):
                        break
                except TimeoutError:
                    break
            if rng.random() < 0.5:  # a reset, and no end of file
                it.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    httpx.get(f"{server.url}/health")
    before = len(os.listdir("/proc/self/fd")), server.num_tasks()
    threads = [threading.Thread(target=one, args=(number,)) for number in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: server.service.num_open == server.pipeline.num_unfinished == 0, 60)
    until(lambda: server.fake.num_unfinished == 0)
    until(lambda: len(os.listdir("/proc/self/fd")) <= before[0] and server.num_tasks() <= before[1])
    assert httpx.post(f"{server.url}{COMPLETIONS}", json=SHORT).status_code == 200


# ---- addresses ----------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded():
    """vllm#7514, vllm#8204."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: .*in use"):
            bound_sockets(ServerOptions(port=port))


@pytest.mark.parametrize("host", ["999.1.1.1", "192.0.2.1", "no.such.host.invalid"])
def test_an_address_that_is_not_here_is_told(host):
    with pytest.raises(ConfigError, match=f"--host {host}"):
        bound_sockets(ServerOptions(host=host, port=0))


def test_what_is_no_certificate_is_told(tmp_path):
    """And nobody is asked for a password."""
    text, locked = tmp_path / "text", tmp_path / "locked"
    text.write_text("nothing")
    locked.write_text(
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMAA=\n-----END ENCRYPTED PRIVATE KEY-----\n"
    )
    for name in (text, locked, tmp_path, tmp_path / "none"):
        options = ServerOptions(ssl_certfile=str(name), ssl_keyfile=str(name))
        with pytest.raises(ConfigError, match="--ssl-certfile"):
            check_certificate(options)


def test_hosts_of_six(tmp_path):
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    options = ServerOptions(host="::1", port=0)
    try:
        (own,) = bound_sockets(options)
    except ConfigError:
        pytest.skip("no IPv6 here")
    with own:
        assert url_of(options, [own]) == f"http://[::1]:{own.getsockname()[1]}"
    with served(byte_tokenizer(tmp_path), options) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
