"""Clients that go away, queues that are full, pipelines that end: nothing is left behind."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fake_client import byte_tokenizer
from fake_server import served
from http_answers import ask, events, until

from pipeserve.server.options import ServerOptions

COMPLETIONS = "/v1/completions"


@pytest.fixture
def folder(tmp_path):
    return byte_tokenizer(tmp_path)


@pytest.mark.parametrize("streams", [False, True])
def test_who_hangs_up_ends_its_request(folder, streams):
    """vllm#54947."""
    with served(folder, step_s=0.01, max_model_len=1_500) as server:
        body = json.dumps({"prompt": "a", "max_tokens": 1_400, "stream": streams, "n": 2}).encode()
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as connected:
            connected.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            until(lambda: server.fake.num_unfinished == 2)
            if streams:
                assert connected.recv(1 << 16).startswith(b"HTTP/1.1 200")
        until(lambda: server.fake.num_unfinished == 0)
        until(lambda: server.pipeline.num_unfinished == 0 and server.service.num_open == 0)


def test_a_full_queue_is_told_and_others_go_on(folder):
    options = ServerOptions(max_queue=2)
    with served(folder, options, step_s=0.02, max_model_len=1_500) as server:
        long = threading.Thread(
            target=ask, args=(server, COMPLETIONS), kwargs={"prompt": "a", "n": 2, "max_tokens": 50}
        )
        long.start()
        until(lambda: server.pipeline.num_unfinished == 2)
        answer = httpx.post(f"{server.url}{COMPLETIONS}", json={"prompt": "a"})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "queue_full"
        long.join()
        assert ask(server, COMPLETIONS, prompt="a", max_tokens=2)[0] == 200


def test_a_burst_does_not_get_past_the_bound(folder):
    """Those whose prompts are being made token ids have a place in the queue, too."""
    options = ServerOptions(max_queue=10)
    with served(folder, options, step_s=0.05, max_model_len=1_500) as server:
        most = []
        submit = server.fake.submit

        def counting(requests):
            submit(requests)
            most.append(server.fake.num_unfinished)

        server.fake.submit = counting
        body = {"messages": [{"role": "user", "content": "a"}], "n": 2, "max_tokens": 10}
        with ThreadPoolExecutor(40) as pool:
            path = "/v1/chat/completions"
            answers = list(pool.map(lambda _: ask(server, path, **body)[0], range(40)))
        assert set(answers) == {200, 429} and max(most) <= 10
        assert answers.count(200) >= 5


@pytest.mark.parametrize("streams", [False, True])
def test_a_deadline_ends_a_request(folder, streams):
    options = ServerOptions(request_timeout=0.3)
    with served(folder, options, step_s=0.02, max_model_len=1_500) as server:
        if streams:
            last = events(server, COMPLETIONS, prompt="a", max_tokens=1_400)[-1]
            assert "0.3 s" in last["error"]["message"]
        else:
            status, answer = ask(server, COMPLETIONS, prompt="a", max_tokens=1_400)
            assert status == 504 and "0.3 s" in answer["error"]["message"]
        until(lambda: server.fake.num_unfinished == 0)
        assert ask(server, COMPLETIONS, prompt="a", max_tokens=2)[0] == 200


@pytest.mark.parametrize("streams", [False, True])
def test_the_end_of_the_pipeline_is_told(folder, streams):
    with served(folder, step_s=0.01, max_model_len=1_500, dies_at_look=30) as server:
        if streams:
            last = events(server, COMPLETIONS, prompt="a", max_tokens=1_400)[-1]
            assert last["error"]["type"] == "server_error"
        else:
            status, answer = ask(server, COMPLETIONS, prompt="a", max_tokens=1_400)
            assert status == 503
            assert "pid" not in answer["error"]["message"]
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert httpx.get(f"{server.url}/ready").status_code == 503
        assert ask(server, COMPLETIONS, prompt="a")[0] == 503


def test_health_is_of_the_pipeline(folder, monkeypatch):
    """trtllm#12313, #13713; who was lost, and why, is told (vllm#11996, #39863)."""
    monkeypatch.setattr("pipeserve.server.app._STATUS_S", 0.3)
    with served(folder) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        stages = httpx.get(f"{server.url}/ready").json()["stages"]
        assert [stage["stage"] for stage in stages] == [0, 1]
        assert set(stages[0]) == {"stage", "rank", "host", "pid"}
        assert "pipeserve:pipeline_ready{" in httpx.get(f"{server.url}/metrics").text
        server.pipeline.trouble = "stage 1 died"
        until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
        told = httpx.get(f"{server.url}/ready").json()["error"]["message"]
        assert told == "the pipeline re-forms: stage 1 died"
        assert httpx.get(f"{server.url}/health").status_code == 200
        metrics = httpx.get(f"{server.url}/metrics").text
        assert 'pipeserve:pipeline_ready{engine="0",model_name="fake"} 0.0' in metrics
        labels = 'engine="0",host="host",model_name="fake",stage="1"'
        assert f"pipeserve:stage_losses_total{{{labels}}} 1.0" in metrics
        lost = 'pipeserve:lost_stage{engine="0",model_name="fake",reason="stage 1 died"} 1.0'
        assert lost in metrics
        server.pipeline.trouble = ""
        until(lambda: httpx.get(f"{server.url}/ready").status_code == 200)
        assert "pipeserve:lost_stage{" not in httpx.get(f"{server.url}/metrics").text
        server.pipeline.is_silent = True
        until(lambda: httpx.get(f"{server.url}/health").status_code == 503)


def test_a_stream_that_waits_is_not_silent(folder, monkeypatch):
    """litellm#34819, ds4#222, FastFlowLM#735, MTPLX#358: what is in between hangs up."""
    monkeypatch.setattr("pipeserve.server.answers._BEAT_S", 0.05)
    with served(folder, max_model_len=100) as server:
        server.pipeline.is_silent = True
        body = {"prompt": "a", "max_tokens": 3, "stream": True}
        with httpx.stream("POST", f"{server.url}{COMPLETIONS}", json=body) as answer:
            lines = answer.iter_lines()
            assert answer.status_code == 200 and next(lines) == next(lines) + ": "
            server.pipeline.is_silent = False
            told = [line for line in lines if line.startswith("data: ")]
        assert len(told) == 4 and told[-1] == "data: [DONE]"
        server.pipeline.is_silent = True
        with httpx.stream("POST", f"{server.url}{COMPLETIONS}", json=body) as answer:
            next(answer.iter_lines())
        until(lambda: server.fake.num_unfinished == server.service.num_open == 0)


def test_what_goes_wrong_after_a_wait_is_an_event(folder, monkeypatch):
    monkeypatch.setattr("pipeserve.server.answers._BEAT_S", 0.05)
    options = ServerOptions(request_timeout=0.3)
    with served(folder, options) as server:
        server.pipeline.is_silent = True
        (told,) = events(server, COMPLETIONS, prompt="a")
        assert told["error"]["type"] == "timeout_error"


def test_answers_are_logged_where_it_is_wanted(folder, caplog):
    """And not what was asked."""
    caplog.set_level("INFO", "pipeserve.server")
    for wanted in (False, True):
        with served(folder, ServerOptions(log_requests=wanted)) as server:
            header = {"X-Request-Id": "mine"}
            ask(server, COMPLETIONS, header, prompt="secret", max_tokens=2)
            ask(server, COMPLETIONS, header, prompt="secret", temperature=-1)
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == (2 if wanted else 0)
    assert lines[0].startswith(f"mine 127.0.0.1 POST {COMPLETIONS}: 200, ")
    assert f"{COMPLETIONS}: 400, " in lines[1] and "secret" not in "".join(lines)


def test_who_drains_takes_nothing_new_and_finishes_the_rest(folder):
    with served(folder, step_s=0.02, max_model_len=1_000) as server:
        answers = []
        running = threading.Thread(
            target=lambda: answers.append(ask(server, COMPLETIONS, prompt="a", max_tokens=30))
        )
        running.start()
        until(lambda: server.pipeline.num_unfinished == 1)
        server.service.is_draining = True
        assert ask(server, COMPLETIONS, prompt="a")[0] == 503
        running.join()
        assert answers[0][0] == 200 and answers[0][1]["usage"]["completion_tokens"] == 30


def test_a_failure_of_ours_is_said_in_openais_shape(folder, monkeypatch):
    """And costs neither the connection nor the server."""
    with served(folder) as server:
        monkeypatch.setattr(server.service, "encode_chat", lambda body: 1 / 0)
        with httpx.Client(base_url=server.url) as client:
            for stream in (False, True):
                body = {"messages": [{"role": "user", "content": "a"}], "stream": stream}
                answer = client.post("/v1/chat/completions", json=body)
                assert answer.status_code == 500
                assert answer.json()["error"]["type"] == "server_error"
                assert "division" not in answer.text
            assert client.post(COMPLETIONS, json={"prompt": "a"}).status_code == 200
        assert server.service.num_open == 0
