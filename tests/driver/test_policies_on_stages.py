"""Every policy on real stage processes: the same tokens (in float32, where that is promised).

One pipeline serves all policies in turn, each in an engine of its own with limits that make it work
(little KV, small budgets).
"""

import pytest
import torch
from other_engine import renew

import pipeserve
from pipeserve import SamplingParams
from pipeserve.core.policies import POLICIES, get_policy

from checkpoints import random_prompts, tiny_llama, transformers_model  # isort: skip

pytestmark = pytest.mark.processes

NEVER_PREEMPT = {"orca", "request_level", "sarathi"}
BLOCK_SIZE = 4


@torch.inference_mode()
def reference(folder: str, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """The likeliest token after each prefix, from transformers, one prompt at a time."""
    model = transformers_model(folder)
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(max_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


def start(folder: str, num_stages: int, layers: list[int] | None = None) -> pipeserve.LLM:
    return pipeserve.LLM(
        folder,
        dtype="float32",
        pipeline_parallel_size=num_stages,
        pipeline_layers=layers,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=64,
        max_model_len=128,
        max_num_batched_tokens=128,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tiny_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=4)
    prompts = random_prompts(folder, lengths=(1, 3, 17, 16, 40, 9, 33, 5, 28, 12))
    return folder, prompts, reference(folder, prompts, 12)


@pytest.fixture(scope="module", params=[2, 3], ids="P{}".format)
def tiny_pipeline(tiny, request):
    with start(tiny[0], request.param) as llm:
        yield llm


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_gives_the_same_tokens(tiny, tiny_pipeline, policy):
    """And preempts exactly where it knows how to: KV is scarce."""
    _, prompts, expected = tiny
    whole_prompts = get_policy(policy).traits.whole_prompts
    renew(
        tiny_pipeline,
        policy,
        num_blocks=16,
        max_num_seqs=7,
        max_num_batched_tokens=128 if whole_prompts else 24,
        enable_prefix_caching=False,
    )
    params = SamplingParams(temperature=0, max_tokens=len(expected[0]), ignore_eos=True)
    assert [list(c.token_ids) for c in tiny_pipeline.generate(prompts, params)] == expected
    preemptions = tiny_pipeline.client.engine.stats.preemptions
    assert policy == "uniform" or (preemptions == 0) == (policy in NEVER_PREEMPT)  # it keeps a room
