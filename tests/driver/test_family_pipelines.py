"""Families through the whole runtime: greedy tokens and logprobs equal to transformers'.

Every family with its stages in this process (local_fleet.py), some as real processes. One pipeline
is used for all that it can show. The family that all other tests use is in test_pipeline.py; every
family's logits are in test_families.py.
"""

import pytest
import torch

import pipeserve
from pipeserve import SamplingParams
from pipeserve.configs import RunConfig
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.errors import ConfigError

from checkpoints import (  # isort: skip
    PIPELINES, TINY, edit_config, greedy_tokens, random_prompts, tiny, transformers_model,
)  # fmt: skip
from local_fleet import LocalFleet, local_llm  # isort: skip

MAX_TOKENS = 8
CUTS = [(4,), (3, 1), (1, 2, 1), (1, 1, 1, 1)]
RUNS = [(name, layers) for place, name in enumerate(TINY) for layers in CUTS[place % 2 :: 2]]
"""A model, and the layers of each stage: every other model over odd numbers of stages, the rest
over even ones. The logits of each at every cut are in test_families.py."""
SCARCE = {
    "max_num_batched_tokens": 13,
    "block_size": 4,
    "num_gpu_blocks_override": 28,
    "policy": "sarathi_serve",
}
"""Prompts of up to 73 tokens in chunks; room for two of them, of which one is preempted."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """name -> (folder, prompts of which some begin alike, transformers' greedy answers, and its
    log-probabilities at each position of each prompt with its answer)."""
    made = {}

    def make(name):
        if name not in made:
            folder = tiny(name, tmp_path_factory.mktemp(name))
            prompts = random_prompts(folder, (40, 3, 17, 33, 1))
            prompts += [prompts[0] + prompt for prompt in prompts[1:4]]
            theirs = transformers_model(folder)
            answers = greedy_tokens(folder, prompts, MAX_TOKENS)
            texts = [a + b for a, b in zip(prompts, answers, strict=True)]
            with torch.inference_mode():
                logits = [theirs(torch.tensor([ids])).logits[0] for ids in texts]
            made[name] = (folder, prompts, answers, [x.log_softmax(-1) for x in logits])
        return made[name]

    return make


@pytest.mark.parametrize(("name", "layers"), RUNS)
def test_every_family_over_some_number_of_stages(model, name, layers):
    """In chunks of 13 and preempted for want of blocks: first with the prompts scored, for which
    they are computed whole, then from cached prefixes."""
    folder, prompts, answers, expected = model(name)
    with local_llm(folder, layers, **SCARCE) as llm:
        stats = llm.client.engine.stats
        scored = llm.generate(prompts, greedy(prompt_logprobs=0))
        num_preempted = stats.preemptions
        stats.cached_prefix_tokens = 0
        completions = llm.generate(prompts, greedy())
    assert 0 < num_preempted < stats.preemptions
    assert stats.cached_prefix_tokens > len(prompts[0])
    for each in (scored, completions):
        assert [list(c.token_ids) for c in each] == answers
        assert_logprobs_of_outputs(each, expected)
    assert_logprobs_of_prompts(scored, expected)


@pytest.mark.processes
@pytest.mark.parametrize(("name", "layers"), PIPELINES.items())
def test_some_families_as_processes(model, name, layers):
    """In chunks of 13, from cached prefixes the second time, preempted for want of blocks."""
    folder, prompts, answers, expected = model(name)
    with pipeserve.LLM(
        folder,
        dtype="float32",
        pipeline_parallel_size=len(layers),
        pipeline_layers=list(layers),
        **SCARCE,
    ) as llm:
        for _ in range(2):
            completions = llm.generate(prompts, greedy())
            assert [list(c.token_ids) for c in completions] == answers
        assert llm.client.engine.stats.preemptions > 0
        assert llm.client.engine.stats.cached_prefix_tokens > len(prompts[0])
    assert_logprobs_of_outputs(completions, expected)


def greedy(**more):
    return SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0, **more)


def assert_logprobs_of_outputs(completions, expected):
    for completion, logprobs_TV in zip(completions, expected, strict=True):
        first = len(completion.prompt_token_ids) - 1
        assert_close(completion.logprobs, logprobs_TV[first:], completion.token_ids)


def assert_logprobs_of_prompts(completions, expected):
    for completion, logprobs_TV in zip(completions, expected, strict=True):
        first, *others = completion.prompt_logprobs
        assert first is None
        assert_close(others, logprobs_TV, completion.prompt_token_ids[1:])


def assert_close(got, logprobs_TV, ids):
    """`got`: of `ids`, each after a position of which `logprobs_TV` has a row."""
    assert len(got) == len(ids)
    expected = logprobs_TV[torch.arange(len(ids)), torch.tensor(ids, dtype=torch.int64)]
    torch.testing.assert_close(
        torch.tensor([each.sampled for each in got]), expected, rtol=0, atol=1e-4
    )


def test_a_model_that_contradicts_its_config_is_refused_before_anything_is_read(tmp_path):
    folder = tiny("falcon_new", tmp_path)
    edit_config(folder, num_kv_heads=3)
    setup = checkpoint_setup(RunConfig(model=folder))
    with pytest.raises(ConfigError, match=r"query_key_value.weight has shape") as caught:
        Driver(setup, fleet=LocalFleet)
    assert "\n" not in str(caught.value)
