"""What clients of /v1/completions exercise: public reports against other servers."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_client import EOS, byte_tokenizer
from fake_server import served
from http_answers import ask, events


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = byte_tokenizer(tmp_path_factory.mktemp("model"))
    with served(
        folder, reply=lambda prompt: b"Hello, world! \xe2\x82\xac.", max_model_len=96
    ) as it:
        yield it


def complete(server, **body):
    return ask(server, "/v1/completions", **body)


def stream(server, **body):
    return events(server, "/v1/completions", **body)


def test_a_text_and_its_usage(server):
    status, answer = complete(server, prompt="abc", max_tokens=5)
    (choice,) = answer["choices"]
    assert (status, choice["text"], choice["finish_reason"]) == (200, "Hello", "length")
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["usage"]["total_tokens"] == 8


@pytest.mark.parametrize("prompt", ["abc", [97, 98, 99], ["abc"], [[97, 98, 99]]])
def test_text_tokens_and_batches_are_the_same_prompt(server, prompt):
    _, answer = complete(server, prompt=prompt, max_tokens=5)
    assert [choice["text"] for choice in answer["choices"]] == ["Hello"]


def test_samples_of_several_prompts_are_numbered_through(server):
    _, answer = complete(server, prompt=["a", "b"], n=2, max_tokens=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("prompt", ["abc", [97, 98, 99]])
def test_logprobs_cover_what_is_told(server, echo, prompt):
    """llama.cpp#27174, lm-eval#4158, sglang#1998, sglang#40298."""
    _, answer = complete(server, prompt=prompt, max_tokens=2, logprobs=1, echo=echo)
    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    told = "abcHe" if echo else "He"
    assert choice["text"] == told == "".join(logprobs["tokens"])
    assert logprobs["text_offset"] == list(range(len(told)))
    assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == len(told)
    if echo:
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][-1] == max(logprobs["top_logprobs"][-1].values())


def test_a_prompt_is_scored_without_output(server):
    """lm-eval#1411."""
    _, answer = complete(server, prompt="abc", max_tokens=0, logprobs=1, echo=True)
    (choice,) = answer["choices"]
    assert choice["text"] == "abc" and choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == 3
    assert answer["usage"]["completion_tokens"] == 0
    (event,) = stream(server, prompt="abc", max_tokens=0, logprobs=1, echo=True)
    assert event["choices"] == answer["choices"]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_says_what_a_whole_answer_says(server, echo, logprobs, n):
    body = {"prompt": ["abc", "xyz"], "max_tokens": 9, "echo": echo, "logprobs": logprobs, "n": n}
    _, whole = complete(server, **body, stop="wo")
    told = {}
    for event in stream(server, **body, stop="wo"):
        (choice,) = event["choices"]
        own = told.setdefault(choice["index"], {"text": "", "tokens": [], "reason": None})
        assert own["reason"] is None, "something came behind the end"
        own["text"] += choice["text"]
        own["tokens"] += choice["logprobs"]["tokens"] if choice["logprobs"] else []
        own["reason"] = choice["finish_reason"]
    for choice in whole["choices"]:
        own = told.pop(choice["index"])
        assert own["text"] == choice["text"]
        assert own["reason"] == choice["finish_reason"] == "stop"
        assert own["tokens"] == (choice["logprobs"]["tokens"] if choice["logprobs"] else [])
    assert not told


def test_usage_comes_last_and_by_itself(server):
    """llama.cpp#15444, ogx#6541, TGI#3003."""
    plain = stream(server, prompt="abc", max_tokens=3)
    assert not any("usage" in event for event in plain)
    asked = stream(server, prompt="abc", max_tokens=3, stream_options={"include_usage": True})
    assert asked[-1]["choices"] == []
    assert asked[-1]["usage"]["completion_tokens"] == 3
    assert asked[-2]["choices"][0]["finish_reason"] == "length"
    assert not any("usage" in event for event in asked[:-1])


def test_both_names_of_max_tokens(server):
    """ik_llama#2321; guidellm sends both."""
    _, one = complete(server, prompt="abc", max_completion_tokens=4)
    _, both = complete(server, prompt="abc", max_completion_tokens=4, max_tokens=9)
    assert one["usage"]["completion_tokens"] == both["usage"]["completion_tokens"] == 4


def test_null_is_as_if_absent(server):
    names = ["max_tokens", "stop", "seed", "n", "temperature", "logit_bias", "logprobs", "user"]
    status, answer = complete(server, prompt="abc", **dict.fromkeys(names))
    assert status == 200 and answer["usage"]["completion_tokens"] == 16


def test_a_character_of_several_tokens_comes_whole(server):
    """mlx-vlm#1076, qwisp#134."""
    texts = [e["choices"][0]["text"] for e in stream(server, prompt="abc", max_tokens=18)]
    assert "".join(texts) == "Hello, world! €."
    assert not any("�" in text for text in texts)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Whose model writes what is no UTF-8, and the end of the text."""
    folder = byte_tokenizer(tmp_path_factory.mktemp("model"))
    reply = lambda prompt: [*b"a\xffb\xe2\x82", EOS, *b"cd"]  # noqa: E731
    with served(folder, reply=reply, max_model_len=96) as it:
        yield it


def test_bytes_that_are_no_character_neither_stop_a_stream_nor_vanish(odd):
    """mlx-vlm#1076, qwisp#134: and the end of the text is a stop, in both."""
    _, whole = complete(odd, prompt="abc", max_tokens=9, logprobs=0)
    (choice,) = whole["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("a�b�", "stop")
    assert whole["usage"]["completion_tokens"] == len(choice["logprobs"]["tokens"]) == 6
    told = [event["choices"][0] for event in stream(odd, prompt="abc", max_tokens=9)]
    assert "".join(each["text"] for each in told) == "a�b�"
    assert told[-1]["finish_reason"] == "stop"


def test_benchmarks_ask_for_so_many_tokens(odd):
    """TGI#1944."""
    _, answer = complete(odd, prompt="abc", max_tokens=8, min_tokens=8, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["choices"][0]["finish_reason"] == "length"
    assert odd.fake.added[-1].params.min_tokens == 8


def test_a_stop_string_is_never_shown(server):
    """aprender#2019."""
    texts = [
        e["choices"][0]["text"] for e in stream(server, prompt="a", stop="world", max_tokens=18)
    ]
    assert "".join(texts) == "Hello, "


def test_a_clients_own_id_may_come_twice_at_once(server):
    """vllm#10583, sglang#19035."""
    body = {"prompt": "abc", "max_tokens": 40, "request_id": "mine"}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: complete(server, **body), range(8)))
    assert {answer["id"] for _, answer in answers} == {"cmpl-mine"}
    assert len({answer["choices"][0]["text"] for _, answer in answers}) == 1


@pytest.mark.parametrize(
    ("body", "part", "code"),
    [
        ({"prompt": "a", "max_tokens": -1}, "max_tokens", None),
        ({"prompt": "a", "temperature": -1}, "temperature", None),
        ({"prompt": "a", "top_p": 0}, "top_p", None),
        ({"prompt": "a", "n": 0}, "n", None),
        ({"prompt": "a", "n": 100_000}, "n", None),
        ({"prompt": "a", "best_of": 3}, "best_of", None),
        ({"prompt": "a", "suffix": "b"}, "suffix", None),
        ({"prompt": "a", "response_format": {"type": "json_object"}}, "response_format", None),
        ({"prompt": "a", "logit_bias": {"9999": 1}}, "logit_bias", None),
        ({"prompt": "a", "max_tokens": "many"}, "max_tokens", None),
        ({"prompt": "a", "logprobs": 1000}, "logprobs", None),
        ({"prompt": "a", "stop": ["x"] * 1000}, "stop", None),
        ({"prompt": []}, "prompt", None),
        ({}, "prompt", None),
        ({"prompt": [97, 9999]}, "9999", None),
        ({"prompt": "a" * 90, "max_tokens": 20}, "max_model_len", "context_length_exceeded"),
        ({"prompt": "a" * 200}, "max_model_len", "context_length_exceeded"),
        ({"prompt": "a" * 2_000_000}, "max_model_len", "context_length_exceeded"),
        ({"prompt": ""}, "empty", None),  # vllm#7283, vllm#7632
        ({"prompt": ["a", ""]}, "prompt 1", None),
        ({"prompt": [[]]}, "empty", None),
        ({"prompt": "a", "stop": 5}, "stop", None),
        ({"prompt": "a", "stop": "a" * 70_000}, "stop", None),
        ({"prompt": "a", "bad_words": ["a" * 70_000]}, "bad_words", None),
        ({"prompt": "a", "guided_json": {}}, "guided_json", None),
        ({"prompt": "a", "priority": 1}, "--order priority", None),
    ],
)
def test_what_is_wrong_is_said_in_openais_shape(server, body, part, code):
    """kserve#3886, vllm#37011."""
    status, answer = complete(server, **body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["code"] == code
    assert part in answer["error"]["message"] or part == answer["error"]["param"]


@pytest.fixture(scope="module")
def marking(tmp_path_factory):
    """Whose tokenizer puts a token ahead of each text."""
    folder = byte_tokenizer(tmp_path_factory.mktemp("model"))
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    mark, text = (
        {"SpecialToken": {"id": "<eos>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    )
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [mark, text],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [EOS], "tokens": ["<eos>"]}},
    }
    file.write_text(json.dumps(tokenizer))
    with served(folder, max_model_len=96) as it:
        yield it


@pytest.mark.parametrize("given", ["left out", None, True, False])
def test_add_special_tokens(marking, given):
    """As vLLM: of a completion by default, of a chat, whose template has them, where asked for."""
    adds = {} if given == "left out" else {"add_special_tokens": given}
    ids = [97] if given is False else [EOS, 97]
    body = {"max_tokens": 2, "return_token_ids": True, **adds}
    _, answer = complete(marking, prompt=["a", "a"], echo=True, **body)
    for choice in answer["choices"]:
        assert choice["prompt_token_ids"] == ids and choice["text"].startswith("a")
    assert ask(marking, "/tokenize", prompt="a", **adds)[1]["tokens"] == ids
    path, messages = "/v1/chat/completions", [{"role": "user", "content": "a"}]
    told = events(marking, path, messages=messages, **body)
    first = told[0]["prompt_token_ids"][0]
    assert (first == EOS) == (given is True)
