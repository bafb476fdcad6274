"""The Python API over a driver whose tokens a function makes."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from fake_client import EOS, VOCAB_SIZE, FakeClient, byte_tokenizer

import pipeserve
from pipeserve import SamplingParams
from pipeserve.errors import CapacityError, ConfigError, StageError
from pipeserve.frontend.completion import completed
from pipeserve.frontend.detokenizer import Detokenizer
from pipeserve.frontend.llm import LLM
from pipeserve.frontend.params import check_params, params_from, seeded
from pipeserve.frontend.tokenizer import Tokenizer
from pipeserve.launch.inputs.flags import given_params, sampling_flags
from pipeserve.sampling_params import OPTIONS

ROOT = Path(__file__).parent.parent.parent


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
    llm = LLM.on(FakeClient(folder))
    params = [_greedy(max_tokens=3), _greedy(max_tokens=1), _greedy(max_tokens=2)]
    first, second, third = llm.generate(["abc", [97, 98], "z"], params)
    assert [len(c.token_ids) for c in (first, second, third)] == [3, 1, 2]
    assert first.prompt_token_ids == (97, 98, 99) and second.prompt_token_ids == (97, 98)
    assert bytes(first.token_ids).decode() == first.text
    assert third.finish_reason == "length" and third.logprobs is None


def test_text_of_a_token_that_the_model_does_not_have(folder):
    """Tokenizers may know more ids than the model has rows: padded or added ones."""
    driver = FakeClient(folder)
    driver.vocab_size = ord("b")
    llm = LLM.on(driver)
    assert llm.generate("a", _greedy())
    for prompt in ("ab", [{"role": "user", "content": "z"}]):
        with pytest.raises(ConfigError, match="is no token id; this model's are 0 to 97"):
            llm.generate(prompt, _greedy())


def test_one_prompt_as_text_ids_or_chat(folder):
    driver = FakeClient(folder)
    llm = LLM.on(driver)
    assert len(llm.generate("abc", _greedy())) == 1
    assert len(llm.generate([97, 98], _greedy())) == 1
    assert len(llm.chat([{"role": "user", "content": "hi"}], _greedy())) == 1
    assert len(llm.chat([[{"role": "user", "content": "a"}]] * 2, _greedy())) == 2
    assert bytes(driver.added[2].prompt) == b"user: hi\nassistant: "
    assert llm.generate([], _greedy()) == []


def test_eos_is_a_token_but_no_text(folder):
    llm = LLM.on(FakeClient(folder, reply=lambda prompt: [104, 105, EOS, 106]))
    stopped, ignored = llm.generate(["a", "a"], [_greedy(), _greedy(ignore_eos=True)])
    assert (stopped.token_ids, stopped.text) == ((104, 105, EOS), "hi")
    assert stopped.finish_reason == "stop"
    assert (ignored.token_ids, ignored.text) == ((104, 105, EOS, 106), "hij")


def test_stop_token_ids_end_without_their_text(folder):
    llm = LLM.on(FakeClient(folder, reply=_says("ab!c")))
    (completion,) = llm.generate("x", _greedy(max_tokens=9, stop_token_ids=[ord("!")]))
    assert (completion.text, completion.finish_reason) == ("ab", "stop")


def test_a_stop_string_over_tokens_ends_the_request_on_the_driver(folder):
    driver = FakeClient(folder, reply=_says("one. END two"))
    (completion,) = LLM.on(driver).generate("x", _greedy(max_tokens=12, stop="END"))
    assert (completion.text, completion.finish_reason) == ("one. ", "stop")
    assert completion.token_ids == tuple(b"one. END")
    assert driver.aborted == [(0, "stop")] and driver.num_unfinished == 0


def test_what_comes_behind_a_stop_string_is_dropped(folder, monkeypatch):
    """Two tokens may come with one look, of which the first ends the text."""
    driver = FakeClient(folder, reply=_says("abXcd"))
    one = driver.outputs
    monkeypatch.setattr(driver, "outputs", lambda timeout_s: [*one(timeout_s), *one(timeout_s)])
    (answer,) = LLM.on(driver).generate("q", _greedy(max_tokens=9, stop=("X",)))
    assert (answer.text, answer.finish_reason) == ("ab", "stop")
    assert driver.aborted == [(0, "stop")]


def test_stop_strings_wait_for_min_tokens(folder):
    llm = LLM.on(FakeClient(folder, reply=_says("a.b.c.d.")))
    params = _greedy(max_tokens=8, min_tokens=4, stop=[".", "never"])
    assert llm.generate("x", params)[0].text == "a.b.c"


def test_text_held_back_for_a_stop_string_is_given_at_the_end(folder):
    llm = LLM.on(FakeClient(folder, reply=_says("abEN")))
    assert llm.generate("x", _greedy(stop=["END"]))[0].text == "abEN"


def test_stream_never_shows_half_a_character(folder):
    llm = LLM.on(FakeClient(folder, reply=_says("\u00e9\u00e9")))
    deltas = list(llm.stream("x", _greedy()))
    assert [delta.text for delta in deltas] == ["", "\u00e9", "", "\u00e9"]
    assert [delta.finish_reason for delta in deltas] == [None, None, None, "length"]


def test_deltas_of_many_prompts_come_as_they_come(folder):
    llm = LLM.on(FakeClient(folder))
    assert [delta.index for delta in llm.stream(["a", "b"], _greedy(max_tokens=2))] == [0, 1, 0, 1]


def test_an_abandoned_stream_ends_its_requests(folder):
    driver = FakeClient(folder)
    llm = LLM.on(driver)
    stream = llm.stream(["a", "b"], _greedy(max_tokens=50))
    next(stream)
    assert driver.num_unfinished == 2
    stream.close()
    assert driver.num_unfinished == 0
    assert driver.aborted == [(0, "abort"), (1, "abort")]
    assert len(llm.generate("c", _greedy())[0].token_ids) == 4


def test_a_stream_never_read_submits_nothing(folder):
    driver = FakeClient(folder)
    LLM.on(driver).stream("a", _greedy()).close()
    assert driver.added == []


def test_two_streams_read_in_turn(folder):
    llm = LLM.on(FakeClient(folder))
    first, second = llm.stream("abc", _greedy()), llm.stream("xyz", _greedy())
    texts = ["", ""]
    for one, other in zip(first, second, strict=True):
        texts = [texts[0] + one.text, texts[1] + other.text]
    assert texts == [c.text for c in llm.generate(["abc", "xyz"], _greedy())]


def test_logprobs(folder):
    llm = LLM.on(FakeClient(folder))
    (completion,) = llm.generate("a", _greedy(logprobs=0))
    assert [entry.sampled for entry in completion.logprobs] == [-0.5] * 4


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", CapacityError, "prompt 1: the prompt of request 1 is empty"),
        ([], CapacityError, "prompt 1: the prompt of request 1 is empty"),
        ("a" * 64, CapacityError, "prompt 1: the prompt has 64 tokens and the context 64"),
        ([VOCAB_SIZE], ConfigError, f"prompt 1: {VOCAB_SIZE} is no token id"),
        ([1, "a"], ConfigError, "prompt 1: 'a' is no token id"),
    ],
)
def test_a_bad_prompt_among_good_ones(folder, prompt, error, message):
    driver = FakeClient(folder)
    llm = LLM.on(driver)
    with pytest.raises(error, match=message):
        llm.generate(["good", prompt], _greedy())
    assert driver.num_unfinished == 0 and driver.num_looks == 0
    errors = []
    deltas = llm.stream(
        ["good", prompt, "good"], _greedy(), on_error=lambda *found: errors.append(found)
    )
    assert {delta.index for delta in deltas} == {0, 2}
    assert errors[0][0] == 1 and isinstance(errors[0][1], error)


def test_a_dead_stage_is_told_and_close_still_works(folder):
    driver = FakeClient(folder, dies_at_look=2)
    with pytest.raises(StageError, match="stage 1"), LLM.on(driver) as llm:
        llm.generate("a", _greedy())
    assert driver.closed and driver.num_unfinished == 0


def test_text_is_made_between_looks_and_keeps_no_result_waiting(folder, monkeypatch):
    """At most that of 16 outputs, or of one prompt, lies between two looks."""
    client = FakeClient(folder)
    llm = LLM.on(client)
    made = []  # how many looks there were before each text

    def count(kind, name):
        method = getattr(kind, name)

        def counted(*arguments):
            made.append(client.num_looks)
            return method(*arguments)

        monkeypatch.setattr(kind, name, counted)

    count(Detokenizer, "push")
    count(Tokenizer, "encode")
    first = llm.stream(["a"] * 40, _greedy(max_tokens=2))
    assert [next(first).index for _ in range(40)] == list(range(40))
    assert len(made) > 70 and max(Counter(made[40:]).values()) == 16
    made.clear()
    second = llm.stream(["b"] * 5, _greedy(max_tokens=1))
    next(second)
    assert len(set(made[:5])) == 5
    assert len(list(first)) == 40 and len(list(second)) == 4


def test_what_came_before_a_death_is_handed_out_first(folder):
    deltas = []
    stream = LLM.on(FakeClient(folder, dies_at_look=2)).stream(["a"] * 40, _greedy())
    with pytest.raises(StageError, match="stage 1"):
        for delta in stream:
            deltas.append(delta)
    assert [delta.index for delta in deltas] == list(range(40))


def test_ctrl_c_ends_the_requests_and_closes(folder, monkeypatch):
    driver = FakeClient(folder)
    monkeypatch.setattr(driver, "outputs", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), LLM.on(driver) as llm:
        llm.generate("a", _greedy())
    assert driver.closed and driver.num_unfinished == 0


def test_text_needs_a_tokenizer_and_ids_do_not(tmp_path):
    llm = LLM.on(FakeClient(tmp_path))
    with pytest.raises(ConfigError, match="no tokenizer"):
        llm.generate("a", _greedy())
    with pytest.raises(ConfigError, match="use stop_token_ids"):
        llm.generate([97], _greedy(stop=["x"]))
    (completion,) = llm.generate([97], _greedy())
    assert (completion.text, len(completion.token_ids)) == ("", 4)


def test_a_request_has_its_priority_and_so_have_its_samples(folder):
    client = FakeClient(folder, order="priority")
    LLM.on(client).generate(["a", "b"], SamplingParams(n=2, max_tokens=1), priority=[4, -1])
    assert [request.priority for request in client.added] == [4, 4, -1, -1]
    LLM.on(client).chat([{"role": "user", "content": "a"}], priority=7)
    assert client.added[-1].priority == 7


@pytest.mark.parametrize(
    ("order", "priority", "message"),
    [
        ("fcfs", 1, "the order is fcfs: start with --order priority"),
        ("priority", [1, 2], "2 priorities for 1 prompts"),
        ("priority", 1.5, "must be a whole number"),
        ("priority", 2**63, "must be a whole number of 64 bits"),  # vllm#37127
        ("priority", -(2**63) - 1, "must be a whole number of 64 bits"),
    ],
)
def test_a_priority_that_cannot_be_kept_to_is_refused(folder, order, priority, message):
    client = FakeClient(folder, order=order)
    with pytest.raises(ConfigError, match=message):
        LLM.on(client).generate(["a"], priority=priority)
    assert not client.added


def test_a_tokenizer_that_cannot_be_read_is_found_before_anything_runs(tmp_path):
    """Also where ids are given and no end of text is looked for."""
    (tmp_path / "tokenizer.json").write_text("{")
    client = FakeClient(tmp_path)
    with pytest.raises(ConfigError, match="tokenizer"):
        LLM.on(client).generate([[97]], _greedy(ignore_eos=True))
    assert not client.added
    (answer,) = LLM.on(client).generate([[97]], _greedy(ignore_eos=True, detokenize=False))
    assert len(answer.token_ids) == 4 and answer.text == ""


def test_as_many_params_as_prompts(folder):
    with pytest.raises(ConfigError, match="1 sampling_params for 2 prompts"):
        LLM.on(FakeClient(folder)).generate(["a", "b"], [_greedy()])


def test_seeds_follow_from_the_run_s_seed_and_the_request(folder):
    def seeds(run_seed):
        driver = FakeClient(folder, seed=run_seed)
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
        ({"max_tokens": True}, "max_tokens is True"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5, over max_tokens 4"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_k": 2**70}, "must be 0 to 2147483647"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"seed": -2}, "seed is -2, must be 0 to"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"stop": [""]}, "stop has an empty string"),
        ({"stop": [1]}, "stop is [1], must be a list of strings"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids is ['a']"),
        ({"stop_token_ids": [-1]}, "stop_token_ids has -1"),
        ({"stop_token_ids": [9]}, "stop_token_ids has 9, token ids are 0 to 8"),
        ({"ignore_eos": 1}, "ignore_eos is 1"),
        ({"logprobs": -2}, "logprobs is -2, must be 0 to 256; or -1, all"),
        ({"logprobs": 10}, "logprobs is 10, the vocabulary has 9"),
        ({"logprobs": 10**6}, "logprobs is 1000000, must be 0 to 256"),
        ({"prompt_logprobs": -2}, "prompt_logprobs is -2"),
        ({"prompt_logprobs": 10}, "prompt_logprobs is 10, the vocabulary has 9"),
        ({"prompt_logprobs": True}, "prompt_logprobs is True, must be a whole number"),
        ({"n": 0}, "n is 0, must be 1 to 16384"),
        ({"n": 2.0}, "n is 2.0, must be a whole number"),
        ({"n": 2, "temperature": 0}, "n is 2 at temperature 0"),
        ({"min_p": -0.1}, "min_p is -0.1, must be 0"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"min_p": True}, "min_p is True, must be a finite number"),
        ({"temperature": 10**400}, "must be a finite number"),
        ({"logit_bias": {"9" * 5000: 1.0}}, "which is no token id"),
        ({"detokenize": 0}, "detokenize is 0, must be true or false"),
        ({"include_stop_str_in_output": "no"}, "include_stop_str_in_output is 'no'"),
        ({"stop": ["x"], "detokenize": False}, "detokenize is false: no text is made"),
        ({"stop": ["\ud83d"]}, "stop has half a surrogate pair"),
        ({"bad_words": ["\udfff"]}, "bad_words has half a surrogate pair"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, must be over 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1, must be -2 to 2"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ({"frequency_penalty": -2.1}, "frequency_penalty is -2.1"),
        ({"frequency_penalty": "0.5"}, "frequency_penalty is '0.5'"),
        ({"logit_bias": [1]}, "logit_bias is [1], must map token ids to numbers"),
        ({"logit_bias": {"a": 1}}, "logit_bias has 'a', which is no token id"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias has -1, token ids are 0 to 8"),
        ({"logit_bias": {"9": 1.0}}, "logit_bias has 9, token ids are 0 to 8"),
        ({"logit_bias": {1: 100.5}}, "logit_bias of token 1 is 100.5, must be -100 to 100"),
        ({"logit_bias": {1: float("-inf")}}, "logit_bias of token 1 is -inf"),
        ({"logit_bias": {1: None}}, "logit_bias of token 1 is None"),
        ({"bad_words": "word"}, "bad_words is 'word', must be a list of strings"),
        ({"bad_words": [""]}, "bad_words has an empty text"),
        ({"bad_words": ["a", " "]}, "bad_words has an empty text"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"allowed_token_ids": [1.0]}, "allowed_token_ids is [1.0], must be a list of whole"),
        ({"stop_token_ids": [-1]}, "stop_token_ids has -1, token ids are 0 to 8"),
        ({"allowed_token_ids": [9]}, "allowed_token_ids has 9, token ids are 0 to 8"),
    ],
)
def test_wrong_params(values, message):
    with pytest.raises(ConfigError) as caught:
        check_params(SamplingParams(**values), vocab_size=9)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_bad_word_that_is_fewer_tokens_behind_a_space(tmp_path):
    """vllm#23886, vllm#32557."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"no": 0, "\u0120no": 1, "w": 2, "\u0120now": 3, "\u0120": 4, "n": 5, "o": 6}
    merges = [("n", "o"), ("\u0120", "no"), ("\u0120no", "w")]
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    driver = FakeClient(tmp_path)
    LLM.on(driver).generate([0], _greedy(bad_words=["now"]))
    assert driver.added[0].bad_word_ids == ((0, 2), (3,))


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty", "presence_penalty"])
def test_a_whole_number_goes_to_the_stages_as_a_float(name):
    """No message has room for one of more than 64 bits: such a temperature ended the pipeline."""
    given = 10**20 if name != "presence_penalty" else 1
    value = getattr(check_params(SamplingParams(**{name: given})), name)
    assert type(value) is float and value == given


def test_numbers_of_numpy():
    params = check_params(
        SamplingParams(
            temperature=np.float32(0.5),
            top_p=np.float64(0.5),
            max_tokens=np.int64(3),
            seed=np.uint8(7),
            stop_token_ids=[np.int32(2)],
            logit_bias={np.int64(5): np.float16(1)},
        ),
        vocab_size=9,
    )
    assert params == SamplingParams(
        temperature=0.5, top_p=0.5, max_tokens=3, seed=7, stop_token_ids=(2,), logit_bias={5: 1.0}
    )
    assert {type(params.temperature), type(params.max_tokens)} == {float, int}
    with pytest.raises(ConfigError, match=r"temperature is np.True_, must be a finite"):
        check_params(SamplingParams(temperature=np.bool_(True)))


def test_right_params_come_back_as_tuples():
    params = check_params(
        SamplingParams(
            stop="x",
            stop_token_ids=[1, 2],
            bad_words=["a"],
            allowed_token_ids=[3],
            logit_bias={"5": 1, 6: -100},
        ),
        vocab_size=9,
    )
    assert (params.stop, params.stop_token_ids) == (("x",), (1, 2))
    assert (params.bad_words, params.allowed_token_ids) == (("a",), (3,))
    assert params.logit_bias == {5: 1, 6: -100}
    assert params_from({"top_k": 3}, params).top_k == 3
    assert params_from({"top_k": -1}, params).top_k == 0
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        params_from({"temprature": 1}, params)


# ---- samples, prompt logprobs, bad words --------------------------------------------------------


def test_samples_are_requests_of_their_own_with_seeds_side_by_side(folder):
    driver = FakeClient(folder)
    params = [SamplingParams(n=3, seed=7, max_tokens=2), SamplingParams(max_tokens=2)]
    first, second = LLM.on(driver).generate(["ab", "c"], params)
    assert [request.params.seed for request in driver.added[:3]] == [7, 8, 9]
    assert [request.sample_of for request in driver.added] == [None, 0, 0, None]
    assert [request.prompt for request in driver.added[:3]] == [(97, 98)] * 3
    assert [output.index for output in first.outputs] == [0, 1, 2]
    assert first.outputs[0].text == first.text and len(second.outputs) == 1
    unseeded = FakeClient(folder)
    LLM.on(unseeded).generate("ab", SamplingParams(n=3))
    assert len({request.params.seed for request in unseeded.added}) == 3


def test_a_prompt_is_finished_with_the_last_of_its_samples(folder):
    """Samples that end at different times, one at a stop string, are put together in order."""
    replies = iter([b"abcdef", b"xy!", b"mno"])
    driver = FakeClient(folder, reply=lambda prompt: list(next(replies)))
    params = SamplingParams(n=3, max_tokens=5, stop=["!"])
    deltas = list(LLM.on(driver).stream("q", params))
    assert [delta.finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert {delta.index for delta in deltas} == {0}
    (completion,) = [done for _, done in completed(iter(deltas))]
    assert [output.text for output in completion.outputs] == ["abcde", "xy", "mnomn"]
    assert [output.finish_reason for output in completion.outputs] == ["length", "stop", "length"]
    assert driver.aborted == [(1, "stop")]


def test_prompt_logprobs_come_with_the_first_sample_alone(folder):
    driver = FakeClient(folder)
    params = SamplingParams(n=2, prompt_logprobs=1, max_tokens=3)
    (completion,) = LLM.on(driver).generate("abc", params)
    assert [request.params.prompt_logprobs for request in driver.added] == [1, None]
    first, *others = completion.prompt_logprobs
    assert first is None and [entry.sampled for entry in others] == [-98.0, -99.0]
    (plain,) = LLM.on(FakeClient(folder)).generate("abc", _greedy())
    assert plain.prompt_logprobs is None


def test_bad_words_become_token_ids_with_and_without_a_space(folder):
    """Bytes behind a space are those of the word, behind one of their own."""
    driver = FakeClient(folder)
    llm = LLM.on(driver)
    llm.generate("x", _greedy(bad_words=["no", " é"]))
    assert driver.added[0].bad_word_ids == ((110, 111), tuple("é".encode()))
    assert driver.added[0].params.bad_words == ("no", " é")


def test_bad_words_of_whole_word_tokens(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"yes": 0, "\u0120yes": 1, "no": 2, "\u0120": 3, "n": 4, "o": 5}
    tokenizer = Tokenizer(models.BPE(vocab=words | {"e": 6, "s": 7, "y": 8, "ye": 9},
                                     merges=[("y", "e"), ("ye", "s"), ("\u0120", "yes"),
                                             ("n", "o")]))  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    driver = FakeClient(tmp_path)
    LLM.on(driver).generate([0], _greedy(bad_words=["yes", "no"]))
    assert driver.added[0].bad_word_ids == ((0,), (1,), (2,))
    LLM.on(driver).generate([0], _greedy(bad_words=["ye"]))
    assert driver.added[1].bad_word_ids == ((9,),)  # behind a space: that, behind one
    with pytest.raises(ConfigError, match="bad_words has '%', which is no token"):
        LLM.on(driver).generate([0], _greedy(bad_words=["%"]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"allowed_token_ids": [EOS], "min_tokens": 1}, "every one of allowed_token_ids ends"),
        ({"allowed_token_ids": [97], "bad_words": ["a"]}, "every one of allowed_token_ids is in"),
        (
            {"allowed_token_ids": [97, 98], "bad_words": ["a"], "stop_token_ids": [98],
             "min_tokens": 2},
            "every one of allowed_token_ids ends",
        ),
    ],
)  # fmt: skip
def test_rules_that_leave_no_token_are_refused(folder, values, message):
    driver = FakeClient(folder)
    with pytest.raises(ConfigError, match=f"prompt 0: {message}"):
        LLM.on(driver).generate("x", _greedy(**values))
    assert driver.added == []
    values.pop("min_tokens", None)
    values["allowed_token_ids"] = [EOS, 99]
    LLM.on(driver).generate("x", _greedy(**values))


def test_bad_words_need_a_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match="no tokenizer; use logit_bias"):
        LLM.on(FakeClient(tmp_path)).generate([97], _greedy(bad_words=["x"]))


def test_rules_have_flags_that_can_be_typed():
    kinds = {flag.name: get_args(flag.annotation)[0] for flag in sampling_flags()}
    assert kinds["logit_bias"] == list[str] | None
    assert kinds["allowed_token_ids"] == str | None
    assert kinds["bad_words"] == list[str] | None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"logit_bias": ["12=-5", "3=0.5"]}, {"logit_bias": {12: -5.0, 3: 0.5}}),
        ({"allowed_token_ids": "4,5"}, {"allowed_token_ids": (4, 5)}),
        ({"bad_words": ["a", "b"]}, {"bad_words": ("a", "b")}),
        ({"n": 2, "min_p": 0.5}, {"n": 2, "min_p": 0.5}),
    ],
)
def test_flags_give_params(flags, expected):
    values = given_params({"model": "m", "top_p": None, "stop": [], **flags})
    params = params_from(values, SamplingParams())
    assert {name: getattr(params, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"logit_bias": ["12"]}, "--logit-bias 12 is not ID=NUMBER"),
        ({"logit_bias": ["a=1"]}, "logit_bias has 'a', which is no token id"),
        ({"logit_bias": ["1=x"]}, "--logit-bias 1=x is not"),
        ({"allowed_token_ids": "4,x"}, "--allowed-token-ids 4,x is no list"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(ConfigError, match=message):
        params_from(given_params(flags), SamplingParams())


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_option_is_checked(option):
    """None has a type that is let through whatever the value, or a number without limits."""
    for wrong in (object(), float("nan"), -(10**12)):
        with pytest.raises(ConfigError, match=f"^{option.name} is "):
            check_params(replace(SamplingParams(), **{option.name: wrong}))
