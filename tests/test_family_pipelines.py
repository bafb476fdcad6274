"""Families through the whole runtime: real processes and links, tokens equal to transformers'.

One pipeline is used for all that it can show, because starting one takes seconds. The family that
all other tests use is in test_pipeline.py; every family's logits are in test_families.py.
"""

import pytest
import torch

import pipeserve
from pipeserve import SamplingParams
from pipeserve.configs import RunConfig
from pipeserve.driver import Driver
from pipeserve.errors import ConfigError

from checkpoints import PIPELINES, edit_config, expected_logits, greedy_tokens, random_prompts, tiny  # isort: skip

MAX_TOKENS = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """name -> (folder, prompts of which some begin alike, what transformers answers greedily)."""
    made = {}

    def make(name):
        if name not in made:
            folder = tiny(name, tmp_path_factory.mktemp(name))
            prompts = random_prompts(folder, (40, 3, 17, 33, 1))
            prompts += [prompts[0] + prompt for prompt in prompts[1:4]]
            expected = [greedy_tokens(folder, prompt, MAX_TOKENS) for prompt in prompts]
            made[name] = (folder, prompts, expected)
        return made[name]

    return make


@pytest.mark.parametrize(
    ("name", "layers"), [(name, layers) for name, cuts in PIPELINES.items() for layers in cuts]
)
def test_greedy_tokens_are_those_of_transformers(model, name, layers):
    """In chunks of 13, from cached prefixes the second time, preempted for want of blocks."""
    folder, prompts, expected = model(name)
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0)
    with pipeserve.LLM(
        folder,
        dtype="float32",
        pipeline_parallel_size=len(layers or (4,)),
        pipeline_layers=list(layers) if layers else None,
        max_num_batched_tokens=13,
        block_size=4,
        num_gpu_blocks_override=28,
    ) as llm:
        for _ in range(2):
            completions = llm.generate(prompts, params)
            assert [list(c.token_ids) for c in completions] == expected
        assert llm.driver.engine.stats.preemptions > 0
        assert llm.driver.engine.stats.cached_prefix_tokens > len(prompts[0])
    assert_logprobs_are_those_of_transformers(folder, completions)


def assert_logprobs_are_those_of_transformers(folder, completions):
    for completion in completions:
        ids = list(completion.prompt_token_ids + completion.token_ids)
        logits = expected_logits(folder, ids[:-1])[len(completion.prompt_token_ids) - 1 :]
        rows = torch.arange(len(completion.token_ids))
        expected = torch.log_softmax(logits, -1)[rows, torch.tensor(completion.token_ids)]
        got = torch.tensor([each.sampled for each in completion.logprobs])
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_a_model_that_contradicts_its_config_is_refused_before_anything_starts(tmp_path):
    folder = tiny("falcon_new", tmp_path)
    edit_config(folder, num_kv_heads=3)
    lines = []
    with pytest.raises(ConfigError, match=r"query_key_value.weight has shape") as caught:
        Driver(RunConfig(model=folder), lines.append)
    assert "\n" not in str(caught.value)
    assert lines == []
