"""vLLM's `SamplingParams`, field by field: each works as there, or is refused by its name."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from fake_client import EOS, FakeClient, byte_tokenizer

from pipeserve import SamplingParams
from pipeserve.errors import ConfigError
from pipeserve.frontend.llm import LLM
from pipeserve.frontend.params import check_params, params_from
from pipeserve.sampling_params import REFUSED

# vllm/sampling_params.py of 0.32 and of its main branch in November 2026, its private fields and
# those that only `__post_init__` sets left out; and what older versions had.
WORKS = {
    "n": 2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.1,
    "seed": 7,
    "stop": ["x"],
    "stop_token_ids": [3],
    "ignore_eos": True,
    "max_tokens": 3,
    "min_tokens": 2,
    "logprobs": 1,
    "prompt_logprobs": 1,
    "detokenize": False,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "include_stop_str_in_output": True,
    "logit_bias": {"5": 1.0},
    "allowed_token_ids": [97, 98],
    "bad_words": ["no"],
    "skip_reading_prefix_cache": True,
}
NOT_HERE = {
    "structured_outputs",
    "flat_logprobs",
    "logprob_token_ids",
    "prompt_logprob_token_ids",
    "prompt_logprob_start",
    "output_kind",
    "stream_interval",
    "skip_clone",
    "extra_args",
    "thinking_token_budget",
    "repetition_detection",
    "routed_experts_prompt_start",
    "trace_decode_token_ids",
}
OLDER = {
    "best_of",
    "use_beam_search",
    "length_penalty",
    "early_stopping",
    "logits_processors",
    "guided_decoding",
    "truncate_prompt_tokens",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("model"))


def _run(folder, reply, prompt="x", **params):
    driver = FakeClient(folder, reply=lambda prompt: [*reply, EOS])
    values = {"temperature": 0, "max_tokens": 20, **params}
    (completion,) = LLM.on(driver).generate(prompt, SamplingParams(**values))
    return completion


def test_every_field_of_vllm_is_known():
    assert {item.name for item in fields(SamplingParams)} == WORKS.keys() | NOT_HERE | OLDER
    assert REFUSED.keys() == NOT_HERE | OLDER


def test_the_page_names_every_field():
    page = (Path(__file__).parent.parent.parent / "docs" / "generate.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("|") and "`" in line]
    for names, words in ((WORKS, "work"), (NOT_HERE, "are refused"), (OLDER, "of older")):
        (row,) = [row for row in rows if row.startswith(f"| {words}")]
        assert set(re.findall(r"`(\w+)`", row)) == set(names)


@pytest.mark.parametrize("name", WORKS)
def test_what_works_is_taken(folder, name):
    values = {"temperature": 1.0, name: WORKS[name]}
    driver = FakeClient(folder)
    LLM.on(driver).generate("ab", SamplingParams(**values))
    assert getattr(driver.added[0].params, name) != getattr(SamplingParams(), name)
    assert params_from(values, SamplingParams()) == check_params(SamplingParams(**values))


@pytest.mark.parametrize("name", sorted(NOT_HERE | OLDER))
def test_what_is_not_here_is_refused_by_name(folder, name):
    driver = FakeClient(folder)
    message = f"{name} is a parameter of vLLM that pipeserve does not take: "
    with pytest.raises(ConfigError, match=message):
        params_from({name: 1}, SamplingParams())
    with pytest.raises(ConfigError, match=message):
        LLM.on(driver).generate("a", SamplingParams(**{name: {"json": "{}"}}))
    assert not driver.added


@pytest.mark.parametrize("name", sorted(WORKS.keys() | NOT_HERE | OLDER))
def test_none_is_as_if_left_out(name):
    """llama.cpp#25515. But `SamplingParams(max_tokens=None)` asks for all there is room for, as in
    vLLM; in JSON null is as if absent there, too."""
    assert params_from({name: None}, SamplingParams(max_tokens=9)).max_tokens == 9
    expected = SamplingParams(max_tokens=None if name == "max_tokens" else 16)
    assert check_params(SamplingParams(**{name: None})) == expected


def test_minus_one_as_vllm_writes_it():
    params = SamplingParams(top_k=-1, seed=-1, logprobs=-1, prompt_logprobs=-1)
    assert check_params(params, vocab_size=50) == SamplingParams(logprobs=50, prompt_logprobs=50)
    assert check_params(check_params(params), vocab_size=50).logprobs == 50


def test_max_tokens_none_is_until_the_context_is_full(folder):
    driver = FakeClient(folder, max_model_len=40)
    LLM.on(driver).generate([97] * 30, SamplingParams(max_tokens=None))
    assert driver.added[0].params.max_tokens == 10
    driver = FakeClient(folder, max_model_len=10**6)  # the pool is smaller
    LLM.on(driver).generate([97] * 1590, SamplingParams(max_tokens=None))
    assert driver.added[0].params.max_tokens == 1600 + 1 - 1590


# ---- what text is made ---------------------------------------------------------------------------


def test_include_stop_str_in_output(folder):
    assert _run(folder, b"one. END two", stop=["END"]).text == "one. "
    with_it = {"include_stop_str_in_output": True}
    completion = _run(folder, b"one. END two", stop=["END"], **with_it)
    assert (completion.text, completion.finish_reason) == ("one. END", "stop")
    assert _run(folder, b"ab!c", stop_token_ids=[ord("!")]).text == "ab"
    assert _run(folder, b"ab!c", stop_token_ids=[ord("!")], **with_it).text == "ab!"
    assert _run(folder, b"ab", **with_it).text == "ab"  # eos is special
    assert _run(folder, b"ab", **with_it, skip_special_tokens=False).text == "ab<eos>"


def test_text_flows_where_the_stop_string_is_kept(folder):
    llm = LLM.on(FakeClient(folder, reply=lambda prompt: list(b"aENb")))
    params = SamplingParams(max_tokens=4, stop=["END"], include_stop_str_in_output=True)
    assert [delta.text for delta in llm.stream("x", params)] == ["a", "E", "N", "b"]


def test_skip_special_tokens(folder):
    reply = [97, EOS, 98]
    assert _run(folder, reply, ignore_eos=True, max_tokens=3).text == "ab"
    shown = _run(folder, reply, ignore_eos=True, max_tokens=3, skip_special_tokens=False)
    assert shown.text == "a<eos>b"
    # A token that ends the text is none of it, special or not, as in vLLM.
    assert _run(folder, reply, skip_special_tokens=False).text == "a"


def test_detokenize(folder, monkeypatch):
    monkeypatch.setattr(
        "pipeserve.frontend.tokenizer.Tokenizer._loaded", None
    )  # is not even loaded
    completion = _run(folder, b"abc", [97], detokenize=False, max_tokens=3, ignore_eos=True)
    assert (completion.text, completion.token_ids) == ("", (97, 98, 99))


def test_skip_reading_prefix_cache(folder):
    from pipeserve.core.blocks import BlockPool
    from pipeserve.core.nouns import Request
    from pipeserve.core.request_state import RequestState

    limits = FakeClient(folder).limits
    pool = BlockPool(limits.num_blocks, limits.block_size)
    for skips in (False, True):
        params = SamplingParams(skip_reading_prefix_cache=skips)
        record = RequestState(
            Request(id=0, prompt=(1,) * 40, params=params), 0, 0, 0.0, limits, pool
        )
        assert len(record.matchable_keys) == (0 if skips else 2)
        assert len(record.keys) == 2  # others may read what this one writes
