"""What was reported of other servers, each named by its test: tried against this one."""

import json

import httpx
import pytest
from fake_client import EOS, VOCAB_SIZE, byte_tokenizer
from fake_server import served
from http_answers import ask, events

from pipeserve.server.options import ServerOptions

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
NESTED = {"command": 'mkdir -p a/{b,c}; echo "}" \\\\', "deep": {"list": [{}, [1, {"x": "é"}]]}}
CALL = f'<tool_call>\n{{"name": "look", "arguments": {json.dumps(NESTED)}}}\n</tool_call>'


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = byte_tokenizer(tmp_path_factory.mktemp("model"))
    with served(folder, reply=lambda prompt: b"one two three four", max_model_len=200) as it:
        yield it


@pytest.fixture(scope="module")
def calling(tmp_path_factory):
    folder = byte_tokenizer(tmp_path_factory.mktemp("model"))
    options = ServerOptions(tool_call_parser="hermes")
    reply = lambda prompt: [*CALL.encode(), EOS]  # noqa: E731
    with served(folder, options, reply=reply, max_model_len=600) as it:
        yield it


def test_each_chunk_has_a_reason_or_null_and_the_last_has_no_text(server):
    """vllm#19650 (none), sglang#3912 (''), vllm#35705, vllm-ascend#8327 (text beside the reason),
    vllm#30866 (content null)."""
    choices = [event["choices"][0] for event in events(server, CHAT, messages=HI, max_tokens=5)]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == "length" and choices[-1]["delta"] == {}
    assert all(choice["delta"]["content"] is not None for choice in choices[:-1])


def test_a_stream_that_echoes_with_logprobs(server):
    """vllm#2703 (the stream broke off), vllm#1504 (with n, an exception), vllm-metal#680."""
    body = {"prompt": "abc", "echo": True, "logprobs": 1, "n": 2, "max_tokens": 4}
    _, whole = ask(server, COMPLETIONS, **body)
    told = events(server, COMPLETIONS, **body)
    for choice in whole["choices"]:
        mine = [event["choices"][0] for event in told]
        mine = [piece for piece in mine if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in mine) == choice["text"] == "abcone "
        names = [name for piece in mine for name in piece["logprobs"]["tokens"]]
        assert names == choice["logprobs"]["tokens"] == list("abcone ")
        assert choice["logprobs"]["token_logprobs"][0] is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_over_several_tokens(server, stream):
    """llama.cpp#11538 (it was passed over), sonar#742 (what follows it was told, too)."""
    body = {"prompt": "a", "stop": ["o thr", "zzz"], "max_tokens": 30}
    if stream:
        choices = [event["choices"][0] for event in events(server, COMPLETIONS, **body)]
    else:
        choices = ask(server, COMPLETIONS, **body)[1]["choices"]
    assert "".join(choice["text"] for choice in choices) == "one tw"
    assert choices[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "null", ["stop", "max_tokens", "max_completion_tokens", "logit_bias", "stream_options", "seed"]
)
def test_null_is_as_if_left_out(server, null):
    """vllm#19862 (max_tokens: 500), ChatDev#344 (stop)."""
    status, answer = ask(server, CHAT, messages=HI, **{"max_tokens": 3, null: None})
    assert status == 200
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("options", [{}, {"include_usage": False}, {"include_usage": None}])
def test_usage_comes_where_it_is_asked_for(server, options):
    """vllm#36379 (an empty object was enough), vllm#7262 (in each chunk)."""
    for path, body in ((CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": "a"})):
        told = events(server, path, max_tokens=3, stream_options=options, **body)
        assert all(event["choices"] and "usage" not in event for event in told)
        told = events(server, path, max_tokens=3, stream_options={"include_usage": True}, **body)
        assert [bool(event.get("usage")) for event in told] == [False] * (len(told) - 1) + [True]


@pytest.mark.parametrize("stream", [False, True])
def test_arguments_with_braces_quotes_and_lists(calling, stream):
    """vllm#21544 (a brace within a text), vllm#10395 and model_server#3838 (no JSON, streamed),
    llama.cpp#14051 (the server crashed)."""
    body = {"messages": HI, "tools": TOOLS, "max_tokens": 400}
    if stream:
        choices = [event["choices"][0] for event in events(calling, CHAT, **body)]
        parts = [part for each in choices for part in each["delta"].get("tool_calls", ())]
    else:
        choices = ask(calling, CHAT, **body)[1]["choices"]
        parts = choices[0]["message"]["tool_calls"]
    assert choices[-1]["finish_reason"] == "tool_calls"
    arguments = "".join(part["function"]["arguments"] for part in parts)
    assert json.loads(arguments) == NESTED
    assert parts[0]["function"]["name"] == "look"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", {str(VOCAB_SIZE): 5}),
        ("logit_bias", {"191222": -100}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"5": 101}),
        ("stop_token_ids", [VOCAB_SIZE]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [1 << 70]),
        ("allowed_token_ids", [VOCAB_SIZE]),
        ("allowed_token_ids", []),
        ("prompt", [VOCAB_SIZE]),
        ("prompt", [1 << 40]),
    ],
)
def test_ids_beyond_the_vocabulary_are_the_request_s_fault(server, field, value):
    """vllm#16529, vllm#6866, vllm#54195, vllm#44680, vllm#9634: one such request ended the engine.
    sglang#25800: a bias beyond 100 was taken."""
    status, answer = ask(server, COMPLETIONS, **{"prompt": "a", "max_tokens": 2, field: value})
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"
    assert ask(server, COMPLETIONS, prompt="a", max_tokens=2)[0] == 200


def test_a_conversation_of_the_assistant_alone_is_gone_on_with(server):
    """sglang#25800: an IndexError, and 500."""
    body = {"messages": [{"role": "assistant", "content": "It is"}], "max_tokens": 3}
    more = {"continue_final_message": True, "add_generation_prompt": False}
    status, answer = ask(server, CHAT, **body, **more)
    assert status == 200 and answer["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.parametrize(
    "content",
    [
        b'{: "model": "x"}',
        '{"prompt": "\u4f60\u597d"}'.encode("gbk"),
        '{"prompt": "\u4f60\u597d"}'.encode("utf-16"),
        b"",
        b"null",
        b"prompt=a",
        b'{"prompt": "a"',
    ],
)
def test_what_is_no_json_of_utf_8(server, content):
    """llamafile#116 and llama.cpp#6396: the server crashed."""
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}{COMPLETIONS}", content=content, headers=headers)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_bytes_that_are_no_text_are_replaced(tmp_path):
    """llama.cpp#11738, ramalama#752: the server ended, for its JSON would not have them."""
    with served(byte_tokenizer(tmp_path), reply=lambda prompt: b"a\xe9'b\xf0\x9f") as it:
        _, answer = ask(it, COMPLETIONS, prompt="a", max_tokens=6, logprobs=1)
        told = events(it, COMPLETIONS, prompt="a", max_tokens=6, logprobs=1)
    text = "a\ufffd'b\ufffd"
    assert answer["choices"][0]["text"] == text
    assert "".join(event["choices"][0]["text"] for event in told) == text


def test_ids_that_the_tokenizer_does_not_know(tmp_path):
    """vllm#24211, vllm#48567: the whole engine ended. Here a model has more rows than its tokenizer
    has tokens."""
    with served(byte_tokenizer(tmp_path), reply=lambda prompt: [97, 257, 98]) as it:
        _, answer = ask(it, COMPLETIONS, prompt="a", max_tokens=3, logprobs=1)
        assert answer["choices"][0]["text"] == "ab"
        assert ask(it, "/detokenize", tokens=[97, 257, 98])[1] == {"prompt": "ab"}
        assert ask(it, "/detokenize", tokens=[1 << 40])[0] == 400


def test_who_may_do_what_with_a_key(tmp_path):
    """vllm#18892 (tokenize, metrics and others were open), llama.cpp#6544, cortex#2176 (a browser
    asks first, and has no key then)."""
    options = ServerOptions(allowed_origins=("https://page.example",))
    with served(byte_tokenizer(tmp_path), options, keys=("secret",)) as it:
        asks_first = {
            "Origin": "https://page.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        first = httpx.options(it.url + CHAT, headers=asks_first)
        assert first.status_code == 200
        assert "authorization" in first.headers["access-control-allow-headers"].lower()
        paths = httpx.get(f"{it.url}/openapi.json", headers={"X-Api-Key": "secret"}).json()["paths"]
        for path, methods in [*paths.items(), ("/openapi.json", {"get": {}}), ("/no", {"get": {}})]:
            for method in methods:
                status = httpx.request(method, it.url + path).status_code
                assert (status == 401) == (path not in ("/health", "/ready")), path
        refused = httpx.post(it.url + CHAT, headers={"Origin": "https://page.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://page.example"


PARTS = [{"type": "text", "text": "It is"}]


@pytest.mark.parametrize("stream", [False, True])
def test_a_beginning_in_parts_is_gone_on_with(tmp_path, stream):
    """llama.cpp#14137 (it was dropped), llama.cpp#14353 (not gone on with)."""
    with served(byte_tokenizer(tmp_path), reply=lambda prompt: bytes(prompt[-5:])) as it:
        body = {"messages": [*HI, {"role": "assistant", "content": PARTS}], "max_tokens": 5}
        body |= {"continue_final_message": True, "add_generation_prompt": False, "echo": True}
        if stream:
            deltas = [each["choices"][0]["delta"] for each in events(it, CHAT, **body)]
            text = "".join(delta.get("content", "") for delta in deltas)
        else:
            text = ask(it, CHAT, **body)[1]["choices"][0]["message"]["content"]
    assert text == "It isIt is"


CALLED = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant"}],  # crush#3689
        [{"role": "assistant", "content": None, "tool_calls": None, "refusal": None}],
        [{"role": "assistant", "content": []}],
        # llama.cpp#13471, extended_openai_conversation#456: content null, or not there
        [{"role": "assistant", "content": None, "tool_calls": [CALLED]},
         {"role": "tool", "tool_call_id": "call_1", "content": "ok"}],
        # ninfer#110, hermes-agent#114713: a name; any-llm#1401: another field
        [{"role": "assistant", "tool_calls": [{**CALLED, "index": 0}], "annotations": []},
         {"role": "tool", "name": "look", "tool_call_id": "call_1", "content": PARTS,
          "is_error": True}],
        # vllm#10463, opencode#42613, vscode-copilot-chat#554
        [{"role": "user", "content": [{**PARTS[0], "cache_control": {"type": "ephemeral"}}],
          "id": 1947269257, "opts": {"visible": False}}],
        [{"role": "assistant", "content": [{"type": "output_text", "text": "a"}]}],
    ],
)  # fmt: skip
def test_messages_as_clients_send_them_back(calling, messages):
    body = {"messages": [*HI, *messages, *HI], "tools": TOOLS, "max_tokens": 4}
    status, answer = ask(calling, CHAT, **body)
    assert status == 200, answer


def test_alternatives_are_those_of_each_token(tmp_path):
    """sglang#39260, sglang#5761, sglang#30188: streamed, all tokens of a chunk had the first's.
    tenstorrent/vllm#343: logprobs without top_logprobs was 500."""
    with served(byte_tokenizer(tmp_path), reply=lambda prompt: "a\u00e9\U0001f389".encode()) as it:
        for top in ({}, {"top_logprobs": 2}):
            body = {"messages": HI, "logprobs": True, "max_tokens": 7, **top}
            whole = ask(it, CHAT, **body)[1]["choices"][0]["logprobs"]["content"]
            choices = [event["choices"][0] for event in events(it, CHAT, **body)]
            told = [each["logprobs"]["content"] for each in choices if each["logprobs"]]
            assert [entry for content in told for entry in content] == whole and len(whole) == 7
            assert all(bool(entry["top_logprobs"]) == bool(top) for entry in whole)
            assert not top or len({json.dumps(each["top_logprobs"]) for each in whole}) > 1


def test_usage_told_all_along_is_of_all_choices_so_far(server):
    """vllm#9357 (of one choice, and not added up), vllm#9028 (wrong behind a long prompt)."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path, body in ((CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": "a" * 150})):
        told = events(server, path, n=3, max_tokens=5, stream_options=options, **body)
        counts = [event["usage"]["completion_tokens"] for event in told]
        assert counts == sorted(counts) and counts[-1] == 15
        (prompt,) = {event["usage"]["prompt_tokens"] for event in told}
        assert prompt >= (150 if path == COMPLETIONS else 2)
