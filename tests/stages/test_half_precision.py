"""In bfloat16 the layers are no further from float32 than transformers' are, and logits do not tie.

SmolLM2 itself and the table: bench/accuracy.py.
"""

import pytest
import torch
from checkpoints import TINY, random_prompts, tiny
from cut_model import Stages
from half_precision import hidden_errors

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS = ("mixtral", "qwen3_moe")


@pytest.mark.parametrize("name", TINY)
def test_hidden_states_in_bfloat16(tmp_path, name):
    folder = tiny(name, tmp_path)
    prompts = random_prompts(folder, (70, 40, 20))
    errors = hidden_errors(folder, prompts, (4,))
    assert (errors.median_ratio if name in EXPERTS else errors.ratio) < 1.0


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "qwen3"])
def test_hidden_states_in_bfloat16_over_links_and_in_float16(tmp_path, name):
    folder = tiny(name, tmp_path)
    prompts = random_prompts(folder, (50, 30))
    for layers, dtype in [((1, 1, 1, 1), torch.bfloat16), ((2, 2), torch.float16)]:
        errors = hidden_errors(folder, prompts, layers, dtype, budget=16)
        assert errors.median_ratio < 1.1  # a link rounds what transformers does not


def test_logits_do_not_tie(tmp_path):
    """Of 4,096 tokens with logits of 20 and more, in bf16 a few hundred values were left."""
    folder = tiny("llama", tmp_path, vocab_size=4096, hidden_size=64, num_attention_heads=4)
    stages = Stages(folder, dtype=torch.bfloat16)
    stages.stages[-1].head.norm.weight.mul_(20)
    logits = stages.logits(list(range(3, 20)), 64)
    for row in logits:
        assert row.abs().max() > 16
        assert len(row.unique()) > 4000
