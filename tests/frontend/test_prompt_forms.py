"""What a prompt may be, and what is refused by the name of its type."""

import re
from collections import UserDict, deque

import numpy as np
import pytest
import torch
from fake_client import FakeClient, byte_tokenizer
from transformers import AutoTokenizer

from pipeserve import SamplingParams
from pipeserve.errors import ConfigError
from pipeserve.frontend.llm import LLM
from pipeserve.frontend.prompt_forms import plain_messages

USER = {"role": "user", "content": "hi"}
CHAT = b"user: hi\nassistant: "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def asked(folder):
    """The prompts, as bytes, that reach the driver."""
    driver = FakeClient(folder)
    llm = LLM.on(driver)

    def ask(prompts):
        driver.added.clear()
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1))
        return [bytes(request.prompt) for request in driver.added]

    ask.client, ask.tokenizer = driver, AutoTokenizer.from_pretrained(folder)
    return ask


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("ab", [b"ab"]),
        (["ab", "c"], [b"ab", b"c"]),
        ([97, 98], [b"ab"]),
        ((97, 98), [b"ab"]),
        ([[97], [98]], [b"a", b"b"]),
        ([np.int64(97), np.int32(98)], [b"ab"]),
        ({"prompt": "ab"}, [b"ab"]),
        ({"prompt_token_ids": [97]}, [b"a"]),
        ({"prompt": "text of it", "prompt_token_ids": (97, 98)}, [b"ab"]),  # as vLLM: ids win
        ({"prompt": "ab", "prompt_token_ids": None}, [b"ab"]),
        ([{"prompt": "a"}], [b"a"]),
        ([{"prompt": "a"}, {"prompt_token_ids": [98]}, "c", [100]], [b"a", b"b", b"c", b"d"]),
        ([USER], [CHAT]),
        ([[USER], [USER]], [CHAT, CHAT]),
        ({"messages": [USER]}, [CHAT]),
        ([[USER], "a", [97]], [CHAT, b"a", b"a"]),
        (UserDict(prompt="ab"), [b"ab"]),
        ({"input_ids": [97, 98], "attention_mask": [1, 1]}, [b"ab"]),
        ({"input_ids": [[97, 98], [99, 0]], "attention_mask": [[1, 1], [1, 0]]}, [b"ab", b"c"]),
        ({"input_ids": torch.tensor([[97, 98]])}, [b"ab"]),
        ([{"input_ids": [97]}, {"input_ids": [[98]]}], [b"a", b"b"]),
        ([], []),
    ],
    ids=str,
)
def test_forms_that_are_taken(asked, prompts, expected):
    assert asked(prompts) == expected


@pytest.mark.parametrize("messages", ["hi", ["hi"], [1, 2], [[1]], [[]], USER, [[USER], "hi"]])
def test_a_chat_takes_conversations_alone(folder, messages):
    """Text would go to the model without its template."""
    driver = FakeClient(folder)
    with pytest.raises(
        ConfigError, match=r"conversation \d is of type \w+, must be a list of mess"
    ):
        LLM.on(driver).chat(messages)
    assert not driver.added


def test_what_a_tokenizer_returns(asked):
    """verl, trl: a BatchEncoding is one prompt or a batch, and not two texts."""
    chat = asked.tokenizer.apply_chat_template([USER], add_generation_prompt=True)
    assert type(chat).__name__ == "BatchEncoding" and asked(chat) == [CHAT]
    assert asked(asked.tokenizer(["ab", "c"])) == [b"ab", b"c"]
    assert asked(asked.tokenizer("ab", return_tensors="pt")) == [b"ab"]
    asked.tokenizer.pad_token = "<eos>"
    padded = asked.tokenizer(["ab", "c"], return_tensors="np", padding=True)
    assert asked(padded) == [b"ab", b"c"]


def test_the_salt_of_a_prompt(asked):
    asked([{"prompt": "a", "cache_salt": "mine"}, "a"])
    assert [request.cache_salt for request in asked.client.added] == ["mine", ""]


@pytest.mark.parametrize(
    ("prompts", "name"),
    [
        (None, "NoneType"),
        (b"ab", "bytes"),
        (True, "bool"),
        (1.5, "float"),
        (7, "int"),
        ({97}, "set"),
        (range(3), "range"),
        (deque([97]), "deque"),
        (np.array([97, 98]), "ndarray"),
        (np.array([[97]]), "ndarray"),
        (torch.tensor([97]), "Tensor"),
        ((text for text in "ab"), "generator"),
        (map(str, "ab"), "map"),
        ({"a": 1}.keys(), "dict_keys"),
        ([None], "NoneType"),
        (["a", None], "NoneType"),
        (["a", b"b"], "bytes"),
        ([True, False], "bool"),
        ([97, True], "bool"),
        ([97, None], "NoneType"),
        ([np.array([97])], "ndarray"),
        ([torch.tensor(97)], "Tensor"),
        ([97, torch.tensor(98)], "Tensor"),
        ([[97, [98]]], "list"),
        ({"prompt": 7}, "int"),
        ({"prompt": [97]}, "list"),
        ({"prompt": b"a"}, "bytes"),
        ({"prompt_token_ids": "ab"}, "str"),
        ({"prompt_token_ids": np.array([97])}, "ndarray"),
        ({"messages": "hi"}, "str"),
        ({"input_ids": 5}, "int"),
        ([{"role": "user", "content": 7}], "int"),
        ([{"role": "user", "content": [7]}], "int"),
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", repr(value)),
)
def test_what_is_refused_names_its_type(asked, prompts, name):
    with pytest.raises(ConfigError) as caught:
        asked(prompts)
    message = str(caught.value)
    assert f"of type {name}" in message or f"that is of type {name}" in message
    assert "\n" not in message and len(message) < 200
    assert not asked.client.num_unfinished and not asked.client.num_looks


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"promt": "a"}, "the prompt has 'promt'; a prompt is text, a list of token ids"),
        ({"prompt": "a", "multi_modal_data": {}}, "the prompt has 'multi_modal_data'"),
        ({"prompt_embeds": torch.zeros(2, 3)}, "the prompt has 'prompt_embeds'"),
        ({"encoder_prompt": "a", "decoder_prompt": "b"}, "'encoder_prompt', 'decoder_prompt'"),
        ({}, "a dict without any of prompt, prompt_token_ids, messages"),
        ({"prompt": None}, "a dict without any of"),
        (USER, "the prompt is one message; give a conversation"),
        ([{"content": "hi"}], "'content'"),
        ([USER, {"content": "hi"}], "the prompt is one message"),
        ([[USER, {"content": "hi"}]], "message 1 has no role"),
        ([97, 1.0], "1.0 is no token id"),
        ([97, "b"], "'b' is no token id"),
        ([2**31], "2147483648 is no token id; this model's are 0 to 257"),
        ([2**80], "is no token id"),
        ([-1], "-1 is no token id"),
        ([{"input_ids": [[97], [98]]}], "input_ids of 2 prompts"),
        ({"prompt": "a", "cache_salt": 7}, "cache_salt is 7, must be text"),
        ("a\ud800", "the prompt has half a surrogate pair"),
        ([{"role": "user", "content": "\udc00"}], "message 0 has half a surrogate pair"),
    ],
    ids=repr,
)
def test_what_is_refused_says_why(asked, prompts, message):
    with pytest.raises(ConfigError) as caught:
        asked(prompts)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("params", [{"temperature": 0}, "greedy", 7, [{"temperature": 0}]])
def test_sampling_params_of_another_type(folder, params):
    with pytest.raises(ConfigError, match=r"sampling_params are of type (dict|str|int); give pip"):
        LLM.on(FakeClient(folder)).generate(["a"], params)


# ---- conversations ------------------------------------------------------------------------------


def test_parts_of_text_are_joined(asked):
    """vllm#9358. By newlines, as vLLM and llama.cpp do."""
    parts = [{"type": "text", "text": "hi"}]
    assert asked([{"role": "user", "content": parts}]) == [CHAT]
    parts = [{"type": "text", "text": "a"}, "b", {"text": "c"}, {"type": "input_text", "text": "d"}]
    assert asked([{"role": "user", "content": parts}]) == [b"user: a\nb\nc\nd\nassistant: "]
    assert asked([{"role": "user", "content": []}]) == [b"user: \nassistant: "]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "file", None])
def test_other_parts_are_refused_by_name(asked, kind):
    content = [{"type": "text", "text": "look"}, {"type": kind, kind: {"url": "data:,"}}]
    with pytest.raises(ConfigError, match=f"message 1 has a part of type {kind!r}; only text"):
        asked([USER, {"role": "user", "content": content}])


def test_what_a_template_may_need_stays():
    """transformers' templates want the arguments of a call as an object, OpenAI sends text."""
    function = {"name": "f", "arguments": '{"x": [1, "y"]}'}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": function}]}
    result = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "4"}]}
    plain_call, plain_result = plain_messages([call, result])
    assert plain_result == {**result, "content": "4"}
    assert plain_call["content"] is None and plain_call["tool_calls"][0]["id"] == "1"
    assert plain_call["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": [1, "y"]}}
    assert function["arguments"] == '{"x": [1, "y"]}'  # the caller's own is as it was
    for arguments in (None, "", {}, "null"):  # "null": xinference#5060
        call = {"function": {"name": "f", "arguments": arguments}}
        (plain,) = plain_messages([{"role": "assistant", "tool_calls": [call]}])
        assert plain["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize("message", [{}, {"content": None}, {"content": "", "tool_calls": []},
                                     {"tool_calls": None}])  # fmt: skip
def test_no_content_is_no_text(message):
    """And not the word None, nor a branch of the template that looks for calls."""
    assert plain_messages([{"role": "assistant", **message}]) == (
        {"role": "assistant", "content": ""},
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"function": {"name": "f", "arguments": "{x"}}, "arguments are no JSON object: '{x'"),
        # sglang#28035: JSON, but what a template asks for its items
        ({"function": {"name": "f", "arguments": '"x"'}}, "arguments are no JSON object: '\"x\"'"),
        ({"function": {"name": "f", "arguments": [1]}}, r"are no JSON object: '\[1\]'"),
        ({"id": "1"}, "a tool call without function"),
        ("f()", "a tool call without function"),
    ],
)
def test_a_tool_call_that_is_none(call, message):
    with pytest.raises(ConfigError, match=f"message 0 has .*{message}"):
        plain_messages([{"role": "assistant", "tool_calls": [call]}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages[9].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 // 0 }}",
        "{{ messages[0].content.nothing.at_all }}",
        "{{ none.x() }}",
        "{% for m in messages %}{{ m.content",
        "{{ messages[0].tool_calls[0].function.name }}",
        "{{ 'x' * (10 ** 30) }}",
        "{{ (1).real.denominator.missing.missing }}",
    ],
)
def test_a_template_that_raises_is_one_line(tmp_path, template):
    llm = LLM.on(FakeClient(byte_tokenizer(tmp_path, chat_template=template)))
    with pytest.raises(ConfigError, match="prompt 0: the model's chat template refuses") as caught:
        llm.chat([USER])
    assert "\n" not in str(caught.value)


def test_no_template_is_one_line(tmp_path):
    llm = LLM.on(FakeClient(byte_tokenizer(tmp_path, chat_template=None)))
    with pytest.raises(ConfigError, match="no chat template; give a prompt, not messages"):
        llm.chat([USER])
