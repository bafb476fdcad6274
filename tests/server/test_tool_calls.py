"""What of a model's text is a call of a tool, however it comes in pieces."""

import json

import pytest
from fake_client import EOS, byte_tokenizer
from fake_server import served
from http_answers import ask, events

from pipeserve.server.openai.bodies import ChatBody
from pipeserve.server.openai.tools import ToolCalls
from pipeserve.server.options import ServerOptions

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


def call(**arguments):
    return f"<tool_call>{json.dumps({'name': 'look', 'arguments': arguments})}</tool_call>"


CODE = {"code": 'print("</tool_call>") # \\', "more": "<tool_call>{}</tool_call>"}
TEXTS = {
    "a call alone": (call(a=1), "", [{"a": 1}]),
    "text before and between": (
        f"Well.\n{call(a=1)}\n{call(b=2)} Bye.",
        "Well.\n Bye.",
        [{"a": 1}, {"b": 2}],
    ),
    "no arguments (vllm#28806, vllm#11392)": (call(), "", [{}]),
    "marks within a text (vllm#45167)": (f"{call(**CODE)}{call(b=2)}", "", [CODE, {"b": 2}]),
    "a call without its end": (f"a{call(a=1)[:-12]}", "a", [{"a": 1}]),
    "cut off": ('<tool_call>{"name": "look", "arg', '<tool_call>{"name": "look", "arg', []),
    "cut off within a text, and another": (
        f'<tool_call>{{"name": "lo</tool_call>b{call(a=1)}',
        '<tool_call>{"name": "lo</tool_call>b',
        [{"a": 1}],
    ),
    # vllm#43995, local-inference-lab/vllm#684, software-agent-sdk#2887: sent back, they end all
    "arguments that are text": (
        '<tool_call>{"name": "look", "arguments": "up"}</tool_call>',
        '<tool_call>{"name": "look", "arguments": "up"}</tool_call>',
        [],
    ),
    "an object written as text": (
        '<tool_call>{"name": "look", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        [{"a": 1}],
    ),
    "null": ('<tool_call>{"name": "look", "arguments": null}</tool_call>', "", [{}]),
    "a list": (
        '<tool_call>{"name": "look", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "look", "arguments": [1]}</tool_call>',
        [],
    ),
    "no call": ("<tool_call>look(up)</tool_call>", "<tool_call>look(up)</tool_call>", []),
    "nearly a mark": ("1 <tool 2 <tool_call", "1 <tool 2 <tool_call", []),
    "an end alone": ("a</tool_call>b", "a</tool_call>b", []),
}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("kind", TEXTS)
def test_pieces_of_any_size_are_the_same_calls(kind, size):
    text, content, arguments = TEXTS[kind]
    calls = ToolCalls(ChatBody(messages=HI, tools=TOOLS), "hermes")
    parts = []
    for place in range(0, len(text), size):
        parts += calls.push(text[place : place + size])
    parts += calls.flush()
    assert "".join(part.get("content", "") for part in parts) == content
    told = [each for part in parts for each in part.get("tool_calls", ())]
    assert [json.loads(each["function"]["arguments"]) for each in told] == arguments
    assert [each["index"] for each in told] == list(range(len(arguments)))


def test_one_call_where_one_was_asked_for():
    calls = ToolCalls(ChatBody(messages=HI, tools=TOOLS, parallel_tool_calls=False), "hermes")
    parts = [*calls.push(call(a=1) + call(b=2) + "."), *calls.flush()]
    assert [list(part) for part in parts] == [["tool_calls"], ["content"]]


def test_a_long_text_that_looks_like_calls_takes_no_time():
    """Each letter is looked at a few times, not as often as there are ends."""
    for text in ('<tool_call>"' + "</tool_call>" * 5_000, '<tool_call>"</tool_call>' * 2_000):
        calls = ToolCalls(ChatBody(messages=HI, tools=TOOLS), "hermes")
        parts = [*calls.push(text), *calls.flush()]
        assert "".join(part["content"] for part in parts) == text


@pytest.fixture(scope="module")
def marking(tmp_path_factory):
    """Whose tokenizer has the marks as special tokens."""
    folder = byte_tokenizer(tmp_path_factory.mktemp("model"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = folder / name
        file.write_text(file.read_text().replace("<eos>", "<tool_call>"))
    reply = lambda prompt: [EOS, *call(a=1)[len("<tool_call>") :].encode()]  # noqa: E731
    with served(
        folder, ServerOptions(tool_call_parser="hermes"), reply=reply, max_model_len=300
    ) as it:
        yield it


def test_marks_that_are_special_tokens(marking):
    """vllm#25281: they were left out of the text, and no call was found."""
    length = len(call(a=1)) - len("<tool_call>") + 1
    body = {"messages": HI, "max_tokens": length, "ignore_eos": True}
    _, answer = ask(marking, CHAT, tools=TOOLS, **body)
    (told,) = answer["choices"][0]["message"]["tool_calls"]
    assert json.loads(told["function"]["arguments"]) == {"a": 1}
    assert any(
        "tool_calls" in e["choices"][0]["delta"] for e in events(marking, CHAT, tools=TOOLS, **body)
    )
    _, answer = ask(marking, CHAT, **body)
    assert "<tool_call>" not in answer["choices"][0]["message"]["content"]
