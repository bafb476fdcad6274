"""The Python API over a driver whose tokens a function makes."""

import ast
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from fake_driver import EOS, VOCAB_SIZE, FakeDriver, byte_tokenizer

import pipeserve
from pipeserve import SamplingParams
from pipeserve.errors import CapacityError, ConfigError, StageError
from pipeserve.llm import LLM
from pipeserve.params import check_params, params_from, seeded

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("model"))


def _says(text):
    return lambda prompt: list(text.encode())


def _greedy(**values):
    return SamplingParams(**{"temperature": 0, "max_tokens": 4, **values})


def test_import_is_light():
    check = (
        "import sys, pipeserve; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
    assert set(pipeserve.__all__) >= {"LLM", "SamplingParams", "Completion"}
    assert all(hasattr(pipeserve, name) for name in pipeserve.__all__)
    with pytest.raises(AttributeError):
        _ = pipeserve.Nothing


def test_results_are_in_order_of_the_prompts(folder):
    llm = LLM.on(FakeDriver(folder))
    params = [_greedy(max_tokens=3), _greedy(max_tokens=1), _greedy(max_tokens=2)]
    first, second, third = llm.generate(["abc", [97, 98], "z"], params)
    assert [len(c.token_ids) for c in (first, second, third)] == [3, 1, 2]
    assert first.prompt_token_ids == (97, 98, 99) and second.prompt_token_ids == (97, 98)
    assert bytes(first.token_ids).decode() == first.text
    assert third.finish_reason == "length" and third.logprobs is None


def test_one_prompt_as_text_ids_or_chat(folder):
    driver = FakeDriver(folder)
    llm = LLM.on(driver)
    assert len(llm.generate("abc", _greedy())) == 1
    assert len(llm.generate([97, 98], _greedy())) == 1
    assert len(llm.chat([{"role": "user", "content": "hi"}], _greedy())) == 1
    assert len(llm.chat([[{"role": "user", "content": "a"}]] * 2, _greedy())) == 2
    assert bytes(driver.added[2].prompt) == b"user: hi\nassistant: "
    assert llm.generate([], _greedy()) == []


def test_eos_is_a_token_but_no_text(folder):
    llm = LLM.on(FakeDriver(folder, reply=lambda prompt: [104, 105, EOS, 106]))
    stopped, ignored = llm.generate(["a", "a"], [_greedy(), _greedy(ignore_eos=True)])
    assert (stopped.token_ids, stopped.text) == ((104, 105, EOS), "hi")
    assert stopped.finish_reason == "stop"
    assert (ignored.token_ids, ignored.text) == ((104, 105, EOS, 106), "hij")


def test_stop_token_ids_end_without_their_text(folder):
    llm = LLM.on(FakeDriver(folder, reply=_says("ab!c")))
    (completion,) = llm.generate("x", _greedy(max_tokens=9, stop_token_ids=[ord("!")]))
    assert (completion.text, completion.finish_reason) == ("ab", "stop")


def test_a_stop_string_over_tokens_ends_the_request_on_the_driver(folder):
    driver = FakeDriver(folder, reply=_says("one. END two"))
    (completion,) = LLM.on(driver).generate("x", _greedy(max_tokens=12, stop="END"))
    assert (completion.text, completion.finish_reason) == ("one. ", "stop")
    assert completion.token_ids == tuple(b"one. END")
    assert driver.finished == [(0, "stop")] and driver.num_unfinished == 0


def test_stop_strings_wait_for_min_tokens(folder):
    llm = LLM.on(FakeDriver(folder, reply=_says("a.b.c.d.")))
    params = _greedy(max_tokens=8, min_tokens=4, stop=[".", "never"])
    assert llm.generate("x", params)[0].text == "a.b.c"


def test_text_held_back_for_a_stop_string_is_given_at_the_end(folder):
    llm = LLM.on(FakeDriver(folder, reply=_says("abEN")))
    assert llm.generate("x", _greedy(stop=["END"]))[0].text == "abEN"


def test_stream_never_shows_half_a_character(folder):
    llm = LLM.on(FakeDriver(folder, reply=_says("\u00e9\u00e9")))
    deltas = list(llm.stream("x", _greedy()))
    assert [delta.text for delta in deltas] == ["", "\u00e9", "", "\u00e9"]
    assert [delta.finish_reason for delta in deltas] == [None, None, None, "length"]


def test_deltas_of_many_prompts_come_as_they_come(folder):
    llm = LLM.on(FakeDriver(folder))
    assert [delta.index for delta in llm.stream(["a", "b"], _greedy(max_tokens=2))] == [0, 1, 0, 1]


def test_an_abandoned_stream_ends_its_requests(folder):
    driver = FakeDriver(folder)
    llm = LLM.on(driver)
    stream = llm.stream(["a", "b"], _greedy(max_tokens=50))
    next(stream)
    assert driver.num_unfinished == 2
    stream.close()
    assert driver.num_unfinished == 0
    assert driver.finished == [(0, "abort"), (1, "abort")]
    assert len(llm.generate("c", _greedy())[0].token_ids) == 4


def test_a_stream_never_read_submits_nothing(folder):
    driver = FakeDriver(folder)
    LLM.on(driver).stream("a", _greedy()).close()
    assert driver.added == []


def test_two_streams_read_in_turn(folder):
    llm = LLM.on(FakeDriver(folder))
    first, second = llm.stream("abc", _greedy()), llm.stream("xyz", _greedy())
    texts = ["", ""]
    for one, other in zip(first, second, strict=True):
        texts = [texts[0] + one.text, texts[1] + other.text]
    assert texts == [c.text for c in llm.generate(["abc", "xyz"], _greedy())]


def test_logprobs(folder):
    llm = LLM.on(FakeDriver(folder))
    (completion,) = llm.generate("a", _greedy(logprobs=0))
    assert [entry.sampled for entry in completion.logprobs] == [-0.5] * 4


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", CapacityError, "prompt 1: the prompt is empty"),
        ([], CapacityError, "prompt 1: the prompt is empty"),
        ("a" * 64, CapacityError, "prompt 1: 64 tokens, the context is 64"),
        ([VOCAB_SIZE], ConfigError, f"prompt 1: {VOCAB_SIZE} is no token id"),
        ([1, "a"], ConfigError, "prompt 1: 'a' is no token id"),
    ],
)
def test_a_bad_prompt_among_good_ones(folder, prompt, error, message):
    driver = FakeDriver(folder)
    llm = LLM.on(driver)
    with pytest.raises(error, match=message):
        llm.generate(["good", prompt], _greedy())
    assert driver.num_unfinished == 0 and driver.num_polls == 0
    errors = []
    deltas = llm.stream(
        ["good", prompt, "good"], _greedy(), on_error=lambda *found: errors.append(found)
    )
    assert {delta.index for delta in deltas} == {0, 2}
    assert errors[0][0] == 1 and isinstance(errors[0][1], error)


def test_a_dead_stage_is_told_and_close_still_works(folder):
    driver = FakeDriver(folder, dies_at_poll=2)
    with pytest.raises(StageError, match="stage 1"), LLM.on(driver) as llm:
        llm.generate("a", _greedy())
    assert driver.closed and driver.num_unfinished == 0


def test_ctrl_c_ends_the_requests_and_closes(folder, monkeypatch):
    driver = FakeDriver(folder)
    monkeypatch.setattr(driver, "poll", lambda timeout_s: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), LLM.on(driver) as llm:
        llm.generate("a", _greedy())
    assert driver.closed and driver.num_unfinished == 0


def test_text_needs_a_tokenizer_and_ids_do_not(tmp_path):
    llm = LLM.on(FakeDriver(tmp_path))
    with pytest.raises(ConfigError, match="no tokenizer"):
        llm.generate("a", _greedy())
    with pytest.raises(ConfigError, match="use stop_token_ids"):
        llm.generate([97], _greedy(stop=["x"]))
    (completion,) = llm.generate([97], _greedy())
    assert (completion.text, len(completion.token_ids)) == ("", 4)


def test_as_many_params_as_prompts(folder):
    with pytest.raises(ConfigError, match="1 sampling_params for 2 prompts"):
        LLM.on(FakeDriver(folder)).generate(["a", "b"], [_greedy()])


def test_seeds_follow_from_the_run_s_seed_and_the_request(folder):
    def seeds(run_seed):
        driver = FakeDriver(folder, seed=run_seed)
        LLM.on(driver).generate(["a", "a", "a"], [_greedy(), _greedy(seed=7), _greedy()])
        return [request.params.seed for request in driver.added]

    assert seeds(0) == seeds(0)
    first, own, third = seeds(0)
    assert own == 7 and len({first, third, *seeds(1)}) == 5
    assert 0 <= seeded(SamplingParams(), 2**62, 10**9).seed < 2**63


def test_unknown_keyword_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'pipeline_parallel_size'"):
        LLM("m", pipeline_paralel_size=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, must be 1 to"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5, must be a whole number"),
        ({"max_tokens": None}, "max_tokens is None"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5, over max_tokens 4"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2**70}, "must be 0 to 2147483647"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"seed": -1}, "seed is -1, must be 0 to"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"stop": [""]}, "stop has an empty string"),
        ({"stop": [1]}, "stop is [1], must be a list of strings"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids is ['a']"),
        ({"stop_token_ids": [-1]}, "stop_token_ids has -1"),
        ({"stop_token_ids": [9]}, "stop_token_ids has 9, token ids are 0 to 8"),
        ({"ignore_eos": 1}, "ignore_eos is 1"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"logprobs": 10}, "logprobs is 10, the vocabulary has 9"),
    ],
)
def test_wrong_params(values, message):
    with pytest.raises(ConfigError) as caught:
        check_params(SamplingParams(**values), vocab_size=9)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_right_params_come_back_as_tuples():
    params = check_params(SamplingParams(stop="x", stop_token_ids=[1, 2]))
    assert (params.stop, params.stop_token_ids) == (("x",), (1, 2))
    assert params_from({"top_k": 3}, params).top_k == 3
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        params_from({"temprature": 1}, params)


def test_params_are_checked_whole():
    """A new field of SamplingParams must be checked (or excused) here too."""
    source = (ROOT / "pipeserve" / "params.py").read_text()
    named = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    named |= {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    assert {item.name for item in fields(SamplingParams)} <= named
