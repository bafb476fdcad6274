"""Fields beyond OpenAI's that clients of vLLM send and read, and what is not offered."""

import pytest
from fake_client import byte_tokenizer
from fake_server import served
from http_answers import ask, events

from pipeserve.server.options import ServerOptions

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
BODIES = {COMPLETIONS: {"prompt": "ab"}, CHAT: {"messages": HI}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Whose chats are all of what a template may be told."""
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{{ reasoning_effort }}{{ enable_thinking }}"
    )
    folder = byte_tokenizer(tmp_path_factory.mktemp("model"), template)
    with served(folder, reply=lambda prompt: b"one two three four", max_model_len=200) as it:
        yield it


def asked(server, **body):
    """The prompt that a chat became."""
    status, answer = ask(server, CHAT, max_tokens=2, return_token_ids=True, **body)
    assert status == 200, answer
    return bytes(answer["prompt_token_ids"]).decode()


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("more", "reason", "why"),
    [
        ({"stop": ["zzz", "tw"]}, "stop", "tw"),
        ({"stop_token_ids": [ord("w")]}, "stop", ord("w")),
        ({"max_tokens": 3}, "length", None),
    ],
)
def test_what_ended_it_is_told(server, path, more, reason, why):
    body = {"max_tokens": 30, **BODIES[path], **more}
    (choice,) = ask(server, path, **body)[1]["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == (reason, why)
    *before, last = [event["choices"][0] for event in events(server, path, **body)]
    assert (last["finish_reason"], last["stop_reason"]) == (reason, why)
    assert all(each["stop_reason"] is None for each in before)


@pytest.mark.parametrize("path", BODIES)
def test_ids_are_told(server, path):
    """Where vLLM does: those of a chat's prompt, which is that of all choices, beside them."""
    body = {"max_tokens": 3, "return_token_ids": True, "n": 2, "temperature": 1, **BODIES[path]}
    whole, told = ask(server, path, **body)[1], events(server, path, **body)
    assert all(choice["token_ids"] == [*b"one"] for choice in whole["choices"])
    if path == CHAT:
        assert [*b"user: hi\n"] == whole["prompt_token_ids"] == told[0]["prompt_token_ids"]
        assert not any("prompt_token_ids" in event for event in told[1:])
    else:
        assert all(choice["prompt_token_ids"] == [*b"ab"] for choice in whole["choices"])
        firsts = [event["choices"][0].get("prompt_token_ids") for event in told]
        assert [each for each in firsts if each] == [[*b"ab"]] * 2
    for index in range(2):
        mine = [e["choices"][0] for e in told if e["choices"][0]["index"] == index]
        assert [token for each in mine for token in each.get("token_ids", ())] == [*b"one"]


def test_a_chat_s_prompt_is_scored(server):
    body = {"messages": HI, "max_tokens": 2, "prompt_logprobs": 1}
    whole, told = ask(server, CHAT, **body)[1], events(server, CHAT, **body)
    assert whole["prompt_logprobs"] == told[0]["prompt_logprobs"]
    first, second, *_ = whole["prompt_logprobs"]
    assert first is None and second[str(ord("s"))]["decoded_token"] == "s"


def test_tokens_by_their_ids(server):
    """vllm#19368: tokens of one text are told apart."""
    body = {"max_tokens": 2, "return_tokens_as_token_ids": True}
    _, answer = ask(server, COMPLETIONS, prompt="ab", logprobs=1, echo=True, **body)
    logprobs = answer["choices"][0]["logprobs"]
    names = [f"token_id:{byte}" for byte in b"abon"]
    assert logprobs["tokens"] == names
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert names[2] in logprobs["top_logprobs"][2]
    _, answer = ask(server, CHAT, messages=HI, logprobs=True, top_logprobs=1, **body)
    entry = answer["choices"][0]["logprobs"]["content"][0]
    assert entry["token"] == entry["top_logprobs"][0]["token"] == names[2]
    assert entry["bytes"] == [ord("o")]


def test_a_chat_may_repeat_what_it_goes_on_with(server):
    messages = [*HI, {"role": "assistant", "content": "It is"}]
    body = {"messages": messages, "continue_final_message": True, "echo": True, "max_tokens": 3}
    _, answer = ask(server, CHAT, **body)
    deltas = [event["choices"][0]["delta"] for event in events(server, CHAT, **body)]
    text = "".join(delta.get("content", "") for delta in deltas)
    assert answer["choices"][0]["message"]["content"] == text == "It isone"


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"reasoning_effort": "low"}, "lowTrue"),
        ({"reasoning_effort": "none"}, "noneFalse"),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": "x"}}, "lowx"),
        ({"messages": [{"role": "developer", "content": "Be brief."}, *HI]}, "system: Be brief.\n"),
        # sglang#40082, ogx#6069, halogen-server#3, llama.cpp#20215: refused, or left out
        (
            {
                "messages": [
                    {"role": "system", "content": "A"},
                    {"role": "developer", "content": "B"},
                ]
            },
            "system: A\n\nB\n",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}]}, "no"),
    ],
)
def test_what_a_template_is_told(server, body, part):
    assert part in asked(server, **{"messages": HI, **body})


def test_a_template_that_knows_developers_is_told_of_them(tmp_path):
    template = "{% for m in messages %}{% if m.role == 'developer' %}!{% endif %}{% endfor %}"
    messages = [{"role": "developer", "content": "Be brief."}, *HI]
    with served(byte_tokenizer(tmp_path, template)) as server:
        assert asked(server, messages=messages) == "!"


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "neutral",
    [
        {"use_beam_search": False, "length_penalty": 1.0, "early_stopping": False},
        {"logit_bias": {}, "bad_words": [], "stop": [], "stop_token_ids": []},  # vllm#1045
        {"thinking_token_budget": -1, "stream_interval": 1, "routed_experts_prompt_start": 0},
        {"top_logprobs": 0, "logprobs": None},  # vllm#14351
        {"modalities": ["text"], "functions": [], "web_search_options": None, "audio": None},
        {"include_reasoning": True, "vllm_xargs": None, "metadata": {"a": "b"}, "store": False},
    ],
)
def test_what_changes_nothing_may_be_said(server, path, neutral):
    assert ask(server, path, max_tokens=2, **BODIES[path], **neutral)[0] == 200


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        (CHAT, "functions", [{"name": "look"}]),
        (CHAT, "modalities", ["text", "audio"]),
        (CHAT, "web_search_options", {"search_context_size": "low"}),
        (COMPLETIONS, "use_beam_search", True),
        (COMPLETIONS, "truncate_prompt_tokens", 5),
        (COMPLETIONS, "length_penalty", 2),
        # local-inference-lab/vllm#264: all of the vocabulary at each position, past the limit
        (COMPLETIONS, "logprobs", -1),
        (COMPLETIONS, "prompt_logprobs", -1),
        (CHAT, "prompt_logprobs", -1),
    ],
)
def test_what_would_change_an_answer_is_refused(server, path, name, value):
    status, answer = ask(server, path, max_tokens=2, **BODIES[path], **{name: value})
    assert status == 400 and name in answer["error"]["message"]


def test_all_log_probabilities_where_the_server_gives_them(tmp_path):
    with served(byte_tokenizer(tmp_path), ServerOptions(max_logprobs=-1)) as server:
        assert ask(server, COMPLETIONS, prompt="a", logprobs=-1, max_tokens=1)[0] == 200
        body = {"messages": HI, "logprobs": True, "top_logprobs": -1, "max_tokens": 1}
        _, answer = ask(server, CHAT, **body)
        assert server.fake.added[-1].params.logprobs == server.fake.vocab_size
        assert len(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 1


def test_an_answer_s_id_is_that_of_its_header(server):
    header = {"X-Request-Id": "mine-7"}
    assert ask(server, COMPLETIONS, header, prompt="a", max_tokens=1)[1]["id"] == "cmpl-mine-7"
    assert ask(server, CHAT, header, messages=HI, max_tokens=1)[1]["id"] == "chatcmpl-mine-7"
    body = {"messages": HI, "max_tokens": 1, "request_id": "own"}
    assert ask(server, CHAT, header, **body)[1]["id"] == "chatcmpl-own"


def test_usage_of_several_samples_that_stream(server):
    """vllm#8625, kubeai#283: counted wrong, or in each chunk."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"max_tokens": 5, "n": 3, "temperature": 1}
    for path, more in BODIES.items():
        usage = ask(server, path, **body, **more)[1]["usage"]
        told = events(server, path, stream_options=options, **body, **more)
        assert told[-1]["choices"] == [] and told[-1]["usage"] == usage
        assert usage["completion_tokens"] == 15
        counts = [event["usage"]["completion_tokens"] for event in told]
        assert counts == sorted(counts) and counts[-2] == 15
