"""Bodies of requests that are nearly right, and requests with their bytes changed."""

from pipeserve.server.openai.bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

_BODIES = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
_NUMBERS = (0, 1, -1, 2, 5, 40, 10**6, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.5, 1e-300, 1e308)
_TEXTS = ("", "a", "abc", "\0", "\ud800", "\U0001f600", "é" * 50, "a" * 5000, "{{ 1/0 }}", "none",
          "auto", "required", "user", "text", "json_object", "fake", "function")  # fmt: skip
_KEYS = ("role", "content", "type", "text", "function", "name", "arguments", "tool_calls", "id",
         "include_usage", "97", "-1", "x", "\ud800", "chat_template", "messages", "self",
         )  # fmt: skip
_EXTRA = ("best_of", "guided_json", "detokenize", "skip_reading_prefix_cache", "model_copy",
          "use_beam_search", "structured_outputs", "truncate_prompt_tokens", "")  # fmt: skip


def bad_body(rng, path):
    """Something that is nearly a body of `path`."""
    if rng.random() < 0.02:
        return _anything(rng, 3)
    body = _right(rng, path)
    names = [*_BODIES[path].model_fields, *_EXTRA]
    for name in rng.sample(names, rng.randrange(6)):
        body[name] = _anything(rng, 3)
    return body


def _right(rng, path):
    if path == "/v1/completions":
        return {"prompt": "abc", "max_tokens": 3}
    if path == "/detokenize":
        return {"tokens": [97, 98]}
    if path == "/tokenize" and rng.random() < 0.5:
        return {"prompt": "abc"}
    messages = [{"role": "user", "content": "hi"}]
    if rng.random() < 0.5:
        function = {"name": "look", "arguments": rng.choice(("{}", '{"a": 1}', "{", "[1]", "5"))}
        call = {"id": "1", "type": "function", "function": function}
        messages.insert(0, {"role": "assistant", "content": None, "tool_calls": [call]})
    for _ in range(rng.randrange(3)):
        spoilt = rng.choice(messages)
        spoilt[rng.choice(_KEYS)] = _anything(rng, 3)
    body = {"messages": messages, "max_tokens": 3}
    if rng.random() < 0.3:
        function = {"name": "look", "parameters": _anything(rng, 2)}
        body["tools"] = [{"type": "function", "function": function}]
    return body


def _anything(rng, depth):
    kind = rng.randrange(9 if depth else 6)
    if kind == 0:
        return None
    if kind == 1:
        return rng.random() < 0.5
    if kind in (2, 3):
        return rng.choice(_NUMBERS)
    if kind in (4, 5):
        return rng.choice(_TEXTS)
    if kind == 6:
        return [_anything(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return [rng.choice((0, 97, 255, 256, 257, 258, -1)) for _ in range(rng.randrange(40))]
    return {rng.choice(_KEYS): _anything(rng, depth - 1) for _ in range(rng.randrange(4))}


def spoilt_bytes(rng, path, content):
    """A request of `content` in bytes, some of which are changed, doubled, or lost."""
    lines = [f"POST {path} HTTP/1.1".encode(), b"Host: x", b"Content-Type: application/json"]
    lines.append(b"Content-Length: %d" % (len(content) + rng.choice((0, 0, 0, 1, -1, 10**9))))
    lines += rng.sample(_ODD_LINES, rng.randrange(3))
    data = bytearray(b"\r\n".join(lines) + b"\r\n\r\n" + content)
    for _ in range(rng.randrange(6)):
        place = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[place] = rng.randrange(256)
            case 1:
                del data[place : place + rng.randrange(1, 20)]
            case 2:
                data[place:place] = bytes(rng.randrange(256) for _ in range(rng.randrange(20)))
            case 3:
                data[place:place] = data[place : place + rng.randrange(1, 60)]
        data = data or bytearray(b"x")
    return bytes(data)


_ODD_LINES = [
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip, chunked",
    b"Content-Length: 7",
    b"Content-Encoding: br",
    b"Connection: close",
    b"Connection: Upgrade",
    b"Upgrade: h2c",
    b"Upgrade: websocket",
    b"Expect: 100-continue",
    b"Expect: 500",
    b"Authorization: Bearer \xff",
    b"X-Request-Id: \xc3\xa9\x01",
    b"Content-Type: text/plain; charset=nowhere",
    b"Range: bytes=0-1",
    b"Cookie: " + b"a" * 9000,
    b" folded: line",
    b": no name",
]
