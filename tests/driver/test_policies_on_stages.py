"""Every policy on real stage processes: the same tokens (in float32, where that is promised).

One pipeline serves all policies in turn: nothing is outstanding between two of them, so each gets a
fresh engine over the same stages, with limits that make it work (little KV, small budgets).
"""

from dataclasses import replace

import pytest
import torch
from other_engine import go_on_under

import pipeserve
from pipeserve import SamplingParams
from pipeserve.core.engine import Engine
from pipeserve.core.policies import POLICIES, get_policy
from pipeserve.core.view import Traits

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


def schedule_by(policy: str, llm: pipeserve.LLM, **limits: int) -> None:
    """The pipeline goes on under another policy."""
    driver = llm.client
    budget = 128 if traits(policy).whole_prompts else 24
    limits = replace(
        driver.engine.limits,
        max_num_batched_tokens=budget,
        enable_prefix_caching=False,
        **limits,
    )
    go_on_under(driver, Engine(driver.plan, get_policy(policy), limits))


def traits(policy: str) -> Traits:
    return get_policy(policy).traits


def check(policy: str, llm: pipeserve.LLM, prompts, expected, num_blocks: int) -> None:
    """Tokens as expected, and preemptions exactly where a policy knows them: KV is scarce."""
    schedule_by(policy, llm, num_blocks=num_blocks, max_num_seqs=7)
    params = SamplingParams(temperature=0, max_tokens=len(expected[0]), ignore_eos=True)
    assert [list(c.token_ids) for c in llm.generate(prompts, params)] == expected
    preemptions = llm.client.engine.stats.preemptions
    assert policy == "uniform" or (preemptions == 0) == (policy in NEVER_PREEMPT)  # it keeps a room


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
    _, prompts, expected = tiny
    check(policy, tiny_pipeline, prompts, expected, num_blocks=16)
