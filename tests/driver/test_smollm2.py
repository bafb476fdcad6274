"""A real model through the whole runtime, SmolLM2 135M in float32: what transformers says, under
scarce KV too, a chat over the prefix cache, and a word that is not said.

Starting it takes most of the time, so there is one pipeline, uneven, as the last stage has the
head. That the cut is no matter, and every policy, the tiny models of the other files show.
"""

from dataclasses import replace

import pytest
from checkpoints import greedy_tokens
from other_engine import renew

import pipeserve
from pipeserve import SamplingParams
from pipeserve.errors import ConfigError

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("one_thread")]

TEXTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived a fisherman who could not swim. So",
    "def add(a, b):",
    "Water boils at 100 degrees Celsius at sea level because",
]
TURNS = ["Hi!", "Name a color.", "And an animal.", "Where does it live?", "Bye!"]
BLOCK_SIZE = 4
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm():
    from pipeserve.stages.checkpoint.sources import resolve

    try:
        folder = resolve("smollm2-135m")
    except ConfigError as error:
        pytest.skip(f"smollm2-135m cannot be had here: {error}")
    with pipeserve.LLM(
        str(folder),
        dtype="float32",
        pipeline_parallel_size=3,
        pipeline_layers=[11, 10, 9],
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=256,
        max_model_len=512,
    ) as llm:
        yield llm


def tokens(completions):
    return [list(completion.token_ids) for completion in completions]


@pytest.fixture(scope="module")
def expected(llm):
    """Prompts, and what transformers says to them."""
    prompts = [llm.tokenizer.encode(text) for text in TEXTS]
    return prompts, greedy_tokens(llm.client.config.model, prompts, GREEDY.max_tokens)


def test_it_says_what_transformers_says(llm, expected):
    prompts, answers = expected
    renew(llm)
    assert tokens(llm.generate(prompts, GREEDY)) == answers


def test_it_says_so_with_scarce_kv_and_small_chunks(llm, expected):
    prompts, answers = expected
    renew(
        llm,
        "sarathi_serve",
        num_blocks=8,
        max_model_len=32,
        max_num_batched_tokens=7,
        enable_prefix_caching=False,
    )
    assert tokens(llm.generate(prompts, GREEDY)) == answers
    assert llm.client.engine.stats.preemptions > 0


def chat(llm, params):
    """Each prompt holds all that was said before."""
    messages, completions = [], []
    for turn in TURNS:
        messages.append({"role": "user", "content": turn})
        completions.append(llm.chat(messages, params)[0])
        messages.append({"role": "assistant", "content": completions[-1].text})
    return completions


def reusable_tokens(completions):
    """Positions in whole blocks that each prompt has in common with an earlier one and its output;
    the last output token's KV is never computed."""
    total, earlier = 0, []
    for completion in completions:
        prompt = completion.prompt_token_ids
        common = 0
        for ids in earlier:
            alike = [a == b for a, b in zip(ids, prompt[:-1], strict=False)]
            common = max(common, alike.index(False) if False in alike else len(alike))
        total += common // BLOCK_SIZE * BLOCK_SIZE
        earlier.append((*prompt, *completion.token_ids[:-1]))
    return total


def test_a_chat_reuses_the_prefix_and_says_the_same(llm):
    renew(llm)
    cached = chat(llm, GREEDY)
    reused = llm.client.engine.stats.cached_prefix_tokens
    assert reused == reusable_tokens(cached)
    assert reused > 0.6 * sum(len(completion.prompt_token_ids) for completion in cached)
    renew(llm, enable_prefix_caching=False)
    plain = llm.generate([list(c.prompt_token_ids) for c in cached], GREEDY)  # all at once
    assert llm.client.engine.stats.cached_prefix_tokens == 0
    assert tokens(plain) == tokens(cached)


def test_a_bad_word_is_not_said(llm):
    renew(llm)
    said = llm.generate(TEXTS[0], GREEDY)[0].text
    assert "Paris" in said
    banned = llm.generate(TEXTS[0], replace(GREEDY, bad_words=("Paris", "the")))[0].text
    assert "Paris" not in banned and banned
