"""What clients of /v1/chat/completions exercise: public reports against other servers."""

import json

import pytest
from fake_client import byte_tokenizer
from fake_server import served
from http_answers import ask, events

from pipeserve.server.options import ServerOptions

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALLS = (
    'Well. <tool_call>\n{"name": "look", "arguments": {"where": "up"}}\n</tool_call>\n'
    '<tool_call>{"name": "look", "arguments": {}}</tool_call>'
)


def calling_with(arguments):
    function = {"name": "look", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = byte_tokenizer(tmp_path_factory.mktemp("model"))
    with served(folder, reply=lambda prompt: b"Hello there.", max_model_len=200) as it:
        yield it


@pytest.fixture(scope="module")
def calling(tmp_path_factory):
    """Whose model calls tools."""
    template = (
        "{{ messages[-1]['content'] }}{% if tools %}[{{ tools[0].function.name }}]{% endif %}"
    )
    folder = byte_tokenizer(tmp_path_factory.mktemp("model"), template)
    options = ServerOptions(tool_call_parser="hermes")
    reply = lambda prompt: CALLS.encode()  # noqa: E731
    with served(folder, options, reply=reply, max_model_len=500) as it:
        yield it


def test_a_message_and_its_usage(server):
    status, answer = ask(server, CHAT, messages=HI, max_tokens=5)
    (choice,) = answer["choices"]
    assert status == 200 and answer["object"] == "chat.completion"
    assert choice["message"] == {"role": "assistant", "content": "Hello", "refusal": None}
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 5


def test_a_stream_says_the_role_first_and_has_a_delta_to_the_last(server):
    """simonw/llm#1159."""
    told = events(server, CHAT, messages=HI, max_tokens=5, stream_options={"include_usage": True})
    usage = told.pop()
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 5
    deltas = [event["choices"][0]["delta"] for event in told]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello"
    reasons = [event["choices"][0]["finish_reason"] for event in told]
    assert reasons == [None] * (len(told) - 1) + ["length"]
    assert {event["object"] for event in told} == {"chat.completion.chunk"}
    assert len({event["id"] for event in told}) == 1


@pytest.mark.parametrize("top", [0, 2])
def test_logprobs_have_the_shape_of_chats(server, top):
    body = {"messages": HI, "max_tokens": 3, "logprobs": True, "top_logprobs": top}
    _, answer = ask(server, CHAT, **body)
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == list("Hel")
    assert content[0]["bytes"] == [ord("H")]
    assert all(len(entry["top_logprobs"]) == min(top, 1) for entry in content)
    streamed = [
        entry
        for event in events(server, CHAT, **body)
        for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        [*HI, {"role": "assistant", "content": None, "tool_calls": []}, *HI],  # open-webui#12441
        [{"role": "system", "content": "Be kind."}, *HI],
        [{"role": "user", "content": "hi", "name": "Ann"}],
    ],
)
def test_histories_that_people_send(server, messages):
    status, _ = ask(server, CHAT, messages=messages, max_tokens=2)
    assert status == 200


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"messages": []}, "messages"),
        ({}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"messages": HI, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": HI, "tools": TOOLS}, "--tool-call-parser"),
        ({"messages": HI, "tools": [{"type": "function"}], "tool_choice": "auto"}, "tool 0"),
        ({"messages": HI, "tool_choice": "required"}, "tools"),
        ({"messages": HI, "chat_template": "{{ 1 }}"}, "chat_template"),
        ({"messages": HI, "response_format": {"type": "json_schema"}}, "response_format"),
        ({"messages": HI, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"messages": HI, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        # Histories that broke servers: vllm#4041, llama.cpp#25510
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": {"a": 1}}]}, "tool_calls"),
        ({"messages": [calling_with("{")]}, "no JSON"),
        ({"messages": [calling_with("[" * 100_000)]}, "no JSON"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "role"),
        (
            {"messages": HI, "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
        ),
    ],
)
def test_what_is_wrong_is_said(server, body, part):
    status, answer = ask(server, CHAT, **body)
    assert status == 400
    assert part in answer["error"]["message"] or part == answer["error"]["param"]


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_a_template_does_not_come_in_by_the_back_door(server, path):
    """vllm#25794, sglang#28135."""
    kwargs = {"chat_template": "{{ 'mine' }}"}
    status, answer = ask(server, path, messages=HI, chat_template_kwargs=kwargs)
    assert status == 400 and answer["error"]["param"] == "chat_template_kwargs"


@pytest.mark.parametrize("key", ["role", "content"])
@pytest.mark.parametrize("more", [{}, {"continue_final_message": True}, {"stream": True}])
def test_half_a_surrogate_pair_is_no_text(server, key, more):
    """Rapid-MLX#730, colibri#1589."""
    messages = [{"role": "user", "content": "hi", key: "\ud83d"}]
    status, answer = ask(server, CHAT, messages=messages, **more)
    assert status == 400 and "surrogate" in answer["error"]["message"]


def test_no_error_names_a_path(server):
    tools = [{"type": "function", "function": {"name": "\ud83d"}}]
    for body in ({"documents": [{"a": "\ud83d"}]}, {"tools": tools, "tool_choice": "none"}):
        _, answer = ask(server, CHAT, messages=HI, chat_template_kwargs={"x": "\ud83d"}, **body)
        assert str(server.fake.model_folder) not in json.dumps(answer)


def test_a_model_that_writes_half_a_surrogate_pair(tmp_path):
    """hermes-agent#84281: what it calls goes out all the same."""
    written = '<tool_call>{"name": "look", "arguments": {"a": "\\ud83d"}}</tool_call>'
    none = '<tool_call>{"name": "look", "arguments": {"a": NaN}}</tool_call>'
    for text in (written, none):
        options = ServerOptions(tool_call_parser="hermes")
        body = {"messages": HI, "tools": TOOLS, "max_tokens": len(text)}
        reply = lambda prompt, text=text: text.encode()  # noqa: E731
        folder = byte_tokenizer(tmp_path)
        with served(folder, options, reply=reply, max_model_len=500) as server:
            _, answer = ask(server, CHAT, **body)
            message = answer["choices"][0]["message"]
            deltas = [event["choices"][0]["delta"] for event in events(server, CHAT, **body)]
        if text is none:
            assert message["content"] == none and "tool_calls" not in message
        else:
            (call,) = message["tool_calls"]
            assert json.loads(call["function"]["arguments"]) == {"a": "?"}
            assert any("tool_calls" in delta for delta in deltas)


def test_tools_that_are_not_to_be_used_are_not_shown_to_the_model(server):
    status, _ = ask(server, CHAT, messages=HI, tools=TOOLS, tool_choice="none", max_tokens=2)
    assert status == 200


def test_calls_of_tools_are_told_as_such(calling):
    _, answer = ask(calling, CHAT, messages=HI, tools=TOOLS, max_tokens=len(CALLS))
    choice = answer["choices"][0]
    assert bytes(calling.fake.added[-1].prompt) == b"hi[look]"
    calls = choice["message"]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["look", "look"]
    assert json.loads(calls[0]["function"]["arguments"]) == {"where": "up"}
    assert len({call["id"] for call in calls}) == 2


def test_a_stream_of_tool_calls_is_the_whole_answer(calling):
    num_tokens = len(CALLS)
    body = {"messages": HI, "tools": TOOLS, "max_tokens": num_tokens, "stop": ["</tool_call>\n\n"]}
    _, whole = ask(calling, CHAT, **body)
    message = whole["choices"][0]["message"]
    content, calls = "", []
    for event in events(calling, CHAT, **body):
        delta = event["choices"][0]["delta"]
        content += delta.get("content", "")
        calls += delta.get("tool_calls", [])
    assert content == message["content"] == "Well. "
    assert [call["index"] for call in calls] == [0, 1]
    assert [call["function"] for call in calls] == [c["function"] for c in message["tool_calls"]]
