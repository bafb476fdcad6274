"""Sampling over real stage processes: the same draws however a request is scheduled, the samples
of a prompt, and the prompt's own logprobs. All in float32.

One pipeline serves all tests of a model: nothing is outstanding between two of them, so each gets a
fresh engine over the same stages, with the limits that it needs.
"""

import itertools
import time
from dataclasses import replace

import pytest
import torch
from other_engine import renew

import pipeserve
from pipeserve import SamplingParams
from pipeserve.wire.step_messages import Sampled

from checkpoints import random_prompts, tiny_llama, transformers_model  # isort: skip

pytestmark = pytest.mark.processes

BLOCK_SIZE = 4
MAX_TOKENS = 10


def start(folder, num_stages):
    return pipeserve.LLM(
        folder,
        dtype="float32",
        pipeline_parallel_size=num_stages,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=512,
        max_num_batched_tokens=512,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=4)
    return folder, random_prompts(folder, lengths=(1, 3, 17, 16, 40, 9, 33, 5, 12, 21))


@pytest.fixture(scope="module", params=[1, 3], ids="P{}".format)
def llm(model, request):
    with start(model[0], request.param) as llm:
        yield llm


@pytest.fixture(autouse=True)
def as_it_started(llm):
    renew(llm)


def one_of_each():
    """For each of the ten prompts another way of sampling; low temperatures repeat themselves."""
    ways = [
        {},
        {"top_p": 0.9, "min_p": 0.05},
        {"repetition_penalty": 1.8, "temperature": 0.7},
        {"presence_penalty": 1.5, "top_k": 20},
        {"frequency_penalty": 1.1, "temperature": 0.5},
        {"logit_bias": {5: 4.0, 9: 3.0}},
        {"allowed_token_ids": tuple(range(3, 30)), "frequency_penalty": 2.0},
        {"temperature": 0, "repetition_penalty": 2.0},
        {"stop_token_ids": tuple(range(3, 60)), "min_tokens": 8},
        {"prompt_logprobs": 2, "logprobs": 1, "repetition_penalty": 1.3},
    ]
    return [
        SamplingParams(max_tokens=MAX_TOKENS, seed=i, ignore_eos=True, **way)
        for i, way in enumerate(ways)
    ]


def tokens(completions):
    return [completion.token_ids for completion in completions]


def alone(llm, prompts, params):
    return [llm.generate([p], [way])[0] for p, way in zip(prompts, params, strict=True)]


def lose_what_is_outstanding(driver):
    """As after a fault, but that the stages live: their answers are thrown away, and the engine is
    told that all KV is gone."""
    outstanding = set(driver.engine.outstanding) - set(driver._early)
    while outstanding:
        for received in driver.fleet.receive(1.0):
            if isinstance(message := received.message, Sampled):
                outstanding.remove(message.index)
    driver._early.clear()
    driver.engine.lost(time.monotonic())
    driver._may_plan = True


def lose_now_and_then(llm, monkeypatch, at_looks):
    """Before each of these looks; how many were outstanding each time. Only so often: faults
    without end would let nothing be finished."""
    driver, num_lost = llm.client, []
    outputs, number = driver.outputs, itertools.count()

    def outputs_or_lose(timeout_s):
        if next(number) in at_looks:
            num_lost.append(len(driver.engine.outstanding))
            lose_what_is_outstanding(driver)
        return outputs(timeout_s)

    monkeypatch.setattr(driver, "outputs", outputs_or_lose)
    return num_lost


# ---- the same draws -----------------------------------------------------------------------------


def test_a_token_depends_on_its_request_alone(llm, model, monkeypatch):
    """Alone, in a batch, in small chunks, after preemptions and after faults."""
    _, prompts = model
    params = one_of_each()
    expected = alone(llm, prompts, params)
    assert len(set(tokens(expected))) == len(prompts)

    renew(llm)
    assert tokens(llm.generate(prompts, params)) == tokens(expected)
    renew(llm, max_num_batched_tokens=7)
    assert tokens(llm.generate(prompts, params)) == tokens(expected)
    renew(llm, num_blocks=16, enable_prefix_caching=False)
    assert tokens(llm.generate(prompts, params)) == tokens(expected)
    assert llm.client.engine.stats.preemptions > 0

    renew(llm, max_num_batched_tokens=16)
    num_lost = lose_now_and_then(llm, monkeypatch, at_looks=(2, 4, 7, 10))
    assert tokens(llm.generate(prompts, params)) == tokens(expected)
    assert len(num_lost) == 4 and all(num_lost)


def test_rules_reach_the_stage(llm, model):
    """Each changes the tokens that it is made for."""
    prompt = model[1][2]
    ways = {
        "plain": {},
        "allowed": {"allowed_token_ids": (7, 8, 9)},
        "biased": {"logit_bias": {77: 100}},
        "balanced": {"logit_bias": {77: 50, 78: 49}, "frequency_penalty": 2},
        "never twice": {
            "allowed_token_ids": tuple(range(50)),
            "repetition_penalty": 1e6,
            "logit_bias": dict.fromkeys(range(50), 100),
        },
        "only the likeliest": {"temperature": 1.0, "seed": 3, "min_p": 1.0},
        "drawn": {"temperature": 1.0, "seed": 3},
    }
    params = [
        SamplingParams(max_tokens=24, ignore_eos=True, **{"temperature": 0, **way})
        for way in ways.values()
    ]
    output = dict(zip(ways, tokens(llm.generate([prompt] * len(ways), params)), strict=True))
    assert set(output["allowed"]) <= {7, 8, 9}
    assert output["biased"] == (77,) * 24
    assert set(output["balanced"]) == {77, 78}
    assert len(set(output["never twice"])) == 24
    assert not set(output["never twice"]) & set(prompt)
    assert output["only the likeliest"] == output["plain"] != output["drawn"]


# ---- samples of a prompt ------------------------------------------------------------------------


def test_samples_share_the_prompt_and_draw_as_if_alone(llm, model):
    """Every full block of the prompt but the last one's positions is computed once."""
    _, prompts = model
    params = SamplingParams(n=4, seed=11, max_tokens=MAX_TOKENS, ignore_eos=True)
    got = llm.generate(prompts, params)
    shared = sum((len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE for prompt in prompts)
    assert llm.client.engine.stats.cached_prefix_tokens == 3 * shared
    renew(llm, enable_prefix_caching=False)
    each = [replace(params, n=1, seed=11 + i) for _ in prompts for i in range(4)]
    apart = tokens(llm.generate([prompt for prompt in prompts for _ in range(4)], each))
    assert [output.token_ids for completion in got for output in completion.outputs] == apart
    assert len({output.token_ids for completion in got for output in completion.outputs}) > 30


def test_samples_without_a_cache_and_with_little_room(llm, model):
    _, prompts = model
    params = SamplingParams(n=3, seed=5, max_tokens=MAX_TOKENS, ignore_eos=True)
    expected = llm.generate(prompts, params)
    for limits in ({"enable_prefix_caching": False}, {"num_blocks": 14}):
        renew(llm, **limits)
        got = llm.generate(prompts, params)
        assert [c.outputs for c in got] == [c.outputs for c in expected]


# ---- the prompt's logprobs ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers_llama(model):
    return transformers_model(model[0])


@torch.inference_mode()
def reference_logprobs(transformers_llama, prompt, num_logprobs):
    """(of each prompt token but the first, [the likeliest there]) by transformers."""
    logits = transformers_llama(torch.tensor([prompt])).logits[0]
    logprobs = torch.log_softmax(logits.double(), -1)
    own = [logprobs[i, token].item() for i, token in enumerate(prompt[1:])]
    top = logprobs[:-1].topk(num_logprobs)
    return own, [
        dict(zip(i, v, strict=True))
        for i, v in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"num_blocks": 41, "max_num_batched_tokens": 24, "policy": "sarathi_serve"},
    ],
    ids=["whole", "chunked", "preempted"],
)
def test_prompt_logprobs_are_those_of_transformers(llm, model, transformers_llama, limits):
    """The longest prompt has more tokens than the last stage scores at a time."""
    folder, prompts = model
    prompts = [*prompts, *random_prompts(folder, lengths=(150,), seed=1)]
    renew(llm, **limits)
    plain = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    params = [replace(plain, prompt_logprobs=3 if i % 3 else 0) for i in range(len(prompts))]
    params[3] = plain
    got = llm.generate([*prompts, prompts[4]], [*params, plain])
    assert got[4].token_ids == got[-1].token_ids
    assert got[3].prompt_logprobs is None
    assert (llm.client.engine.stats.preemptions > 0) == ("num_blocks" in limits)
    for prompt, one, completion in zip(prompts, params, got, strict=False):
        if one.prompt_logprobs is None:
            continue
        first, *others = completion.prompt_logprobs
        own, top = reference_logprobs(transformers_llama, prompt, one.prompt_logprobs)
        assert first is None
        assert [entry.sampled for entry in others] == pytest.approx(own, abs=1e-4)
        for entry, likeliest in zip(others, top, strict=True):
            assert list(entry.top) == list(likeliest)
            assert list(entry.top.values()) == pytest.approx(list(likeliest.values()), abs=1e-4)


def test_prompt_logprobs_survive_faults(llm, model, transformers_llama, monkeypatch):
    _, prompts = model
    renew(llm, max_num_batched_tokens=8)
    num_lost = lose_now_and_then(llm, monkeypatch, at_looks=(1, 3, 6, 9, 12))
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0, ignore_eos=True)
    for prompt, completion in zip(prompts, llm.generate(prompts, params), strict=True):
        own, _ = reference_logprobs(transformers_llama, prompt, 1)
        got = [entry.sampled for entry in completion.prompt_logprobs[1:]]
        assert got == pytest.approx(own, abs=1e-4)
    assert len(num_lost) == 5 and all(num_lost)


def test_prompt_logprobs_skip_the_cache_and_fill_it(llm, model):
    _, prompts = model
    plain = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    scored = replace(plain, prompt_logprobs=0)
    stats = llm.client.engine.stats
    first = llm.generate([prompts[4]], scored)[0]
    again = llm.generate([prompts[4]], scored)[0]
    assert stats.cached_prefix_tokens == 0
    assert again.prompt_logprobs == first.prompt_logprobs
    assert llm.generate([prompts[4]], plain)[0].token_ids == first.token_ids
    assert stats.cached_prefix_tokens == (len(prompts[4]) - 1) // BLOCK_SIZE * BLOCK_SIZE
