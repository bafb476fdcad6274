"""Asking a server, and reading what it streams."""

import json
import time

import httpx


def ask(server, path, headers=None, **body):
    """(status, JSON) of a POST."""
    content = json.dumps(body)  # in ASCII: half a surrogate pair, too
    headers = {"Content-Type": "application/json", **(headers or {})}
    answer = httpx.post(f"{server.url}{path}", content=content, headers=headers, timeout=60)
    return answer.status_code, answer.json()


def events(server, path, **body):
    """The JSON objects of a stream, which ends with [DONE]."""
    body = {**body, "stream": True}
    with httpx.stream("POST", f"{server.url}{path}", json=body, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        said = (line for line in answer.iter_lines() if line and not line.startswith(":"))
        lines = [line.removeprefix("data: ") for line in said]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def until(condition, seconds=20.0):
    """Waits for it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)
