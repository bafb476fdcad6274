"""Logits of a Llama's stages against transformers', in float32: any cut, any chunks, any option.

The other families: test_families.py.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import expected_logits, random_prompts, tiny_llama, transformers_model
from cut_model import Stages, assert_close, run_mixed

from pipeserve.stages.config.families import read_config
from pipeserve.stages.config.model_config import RopeConfig

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
MODELS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 6},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "linear_rope": {"rope_parameters": LINEAR},
    "llama3_rope": {"rope_parameters": LLAMA3, "head_dim": 16},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide_heads": {"head_dim": 32},
    "sharded": {"shard_bytes": 40_000},
}
CUTS = [(4,), (1, 3), (3, 1), (2, 0, 2), (0, 4), (4, 0), (1, 2, 1), (1, 1, 1, 1)]
ATTENTIONS = ["cpu", "reference"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """name -> (folder, a prompt of 70 ids, transformers' logits), each made once."""
    made = {}

    def make(name):
        if name not in made:
            folder = tiny_llama(tmp_path_factory.mktemp(name), **MODELS[name])
            (prompt,) = random_prompts(folder, (70,))
            made[name] = (folder, prompt, expected_logits(folder, prompt))
        return made[name]

    return make


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_llama(checkpoint, name, attention):
    folder, prompt, expected = checkpoint(name)
    stages = Stages(folder, attention=attention)
    assert_close(stages.logits(prompt, 16), expected)


@pytest.mark.parametrize("name", ["linear_rope", "llama3_rope"])
def test_rope_scaling_matters_here(checkpoint, name):
    """Without this, a stage that ignores rope scaling could pass the test above."""
    folder, prompt, expected = checkpoint(name)
    config = read_config(folder)
    unscaled = replace(config, rope=RopeConfig(theta=config.rope.theta))
    got = Stages(folder, config=unscaled).logits(prompt, 70)
    assert (got - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", ["linear_rope", "llama3_rope"])
def test_config_in_the_spelling_before_transformers_5(checkpoint, name, tmp_path):
    folder, prompt, expected = checkpoint(name)
    raw = json.loads(Path(folder, "config.json").read_text())
    scaling = raw.pop("rope_parameters")
    raw["rope_theta"] = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    raw["rope_scaling"] = scaling
    raw["torch_dtype"] = raw.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    old = read_config(tmp_path)
    assert old == read_config(folder)
    assert_close(Stages(folder, config=old).logits(prompt, 70), expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("budget", [1, 3, 16, 70])
@pytest.mark.parametrize("layers", CUTS)
def test_every_cut_and_budget(checkpoint, layers, budget, attention):
    folder, prompt, expected = checkpoint("gqa")
    stages = Stages(folder, layers, attention=attention, block_size=4)
    assert_close(stages.logits(prompt, budget), expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("block_size", [4, 16])
def test_requests_mixed_in_a_microbatch(checkpoint, block_size, attention):
    """Random chunks of six requests, decodes among them, over scattered blocks."""
    folder, _, _ = checkpoint("gqa")
    prompts = random_prompts(folder, (70, 41, 23, 16, 5, 1), seed=1)
    expected = [expected_logits(folder, prompt) for prompt in prompts]
    stages = Stages(
        folder, attention=attention, block_size=block_size, num_blocks=256 // block_size
    )
    run_mixed(stages, prompts, expected, seed=block_size)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("length", [9, 20])
def test_a_chunk_reads_blocks_that_the_same_microbatch_fills(checkpoint, attention, length):
    """A shared prefix of two blocks; its reader is a chunk of one token (9) or of several (20)."""
    folder, prompt, _ = checkpoint("gqa")
    reader = prompt[:8] + random_prompts(folder, (length - 8,), seed=2)[0]
    expected = torch.cat([expected_logits(folder, ids)[-1:] for ids in (prompt[:11], reader)])
    stages = Stages(folder, attention=attention, block_size=4)
    spans = [(0, 11, [9, 2, 30], 1), (8, length, [9, 2, 31, 7, 5], 1)]
    assert_close(stages.run(spans, [prompt, reader]), expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_block_used_again_holds_nothing_of_its_last_owner(checkpoint, attention):
    folder, prompt, expected = checkpoint("gqa")
    stages = Stages(folder, attention=attention, num_blocks=5)
    assert_close(stages.logits(prompt, 16), expected)
    for pool in stages.pools:
        pool.keys_LKBPH.fill_(torch.inf)
    assert_close(stages.logits(prompt, 1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_microbatch_that_wants_no_logits(checkpoint, dtype):
    folder, prompt, _ = checkpoint("gqa")
    got = Stages(folder, dtype=dtype).run([(0, 20, [3, 1], 0)], [prompt])
    assert got.shape == (0, 256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_transformers_in_that_precision(checkpoint, dtype):
    """As near to float32 as transformers itself comes in this dtype, give or take half as much."""
    folder, prompt, expected = checkpoint("gqa")
    got = Stages(folder, dtype=dtype).logits(prompt, 16)
    with torch.inference_mode():
        theirs = transformers_model(folder).to(dtype)(torch.tensor([prompt])).logits[0].float()
    ours, limit = ((x - expected).pow(2).mean().sqrt() for x in (got, theirs))
    assert ours < 1.5 * limit
