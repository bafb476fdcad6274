"""Logits of the stages against transformers', in float32: any model, any cut, any chunks.

All stages run here in one process, one after the other, on KV pools that start full of NaN:
whatever reads a position that nobody wrote shows at once.
"""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import random_prompts, tiny_llama, transformers_model

from pipeserve.stages.config import ModelConfig, RopeConfig
from pipeserve.stages.inputs import build_inputs
from pipeserve.stages.kv import KVCache
from pipeserve.stages.weights import load_stage

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-4
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


class Stages:
    """A model cut into stages, each with its own KV pool."""

    def __init__(
        self,
        folder: str,
        layers=(1, 3),
        *,
        attention="cpu",
        block_size=16,
        num_blocks=64,
        config=None,
        dtype=torch.float32,
    ) -> None:
        config = config or ModelConfig.from_folder(folder)
        assert sum(layers) == config.num_layers
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.stages, self.pools = [], []
        for number, count in enumerate(layers):
            first = sum(layers[:number])
            self.stages.append(
                load_stage(
                    folder,
                    config,
                    first_layer=first,
                    stop_layer=first + count,
                    has_embedding=number == 0,
                    has_head=number == len(layers) - 1,
                    dtype=dtype,
                    attention=attention,
                )
            )
            pool = KVCache(
                config,
                num_layers=count,
                num_blocks=num_blocks,
                block_size=block_size,
                dtype=dtype,
            )
            pool.keys_LKBPH.fill_(torch.nan)
            pool.values_LKBPH.fill_(torch.nan)
            self.pools.append(pool)

    @torch.inference_mode()
    def run(self, spans, token_ids):
        """One microbatch through every stage. Returns the logits."""
        x = None
        for stage, pool in zip(self.stages, self.pools, strict=True):
            is_first = stage.embedding is not None
            inputs = build_inputs(spans, self.block_size, token_ids if is_first else None)
            x = stage(inputs.token_ids_T if is_first else x, inputs, pool)
        return x

    def logits(self, prompt, budget):
        """Of every position of `prompt`, taken `budget` tokens at a time."""
        table = list(range(self.num_blocks))
        random.Random(budget).shuffle(table)
        starts = range(0, len(prompt), budget)
        spans = [(i, min(i + budget, len(prompt)), table) for i in starts]
        return torch.cat(
            [self.run([(i, stop, table, stop - i)], [prompt]) for i, stop, table in spans]
        )


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


@torch.inference_mode()
def expected_logits(folder, prompt):
    return transformers_model(folder)(torch.tensor([prompt])).logits[0]


def assert_close(got, expected):
    assert got.shape == expected.shape
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


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
    config = ModelConfig.from_folder(folder)
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
    old = ModelConfig.from_folder(tmp_path)
    assert old == ModelConfig.from_folder(folder)
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
    rng = random.Random(block_size)
    free = rng.sample(range(stages.num_blocks), stages.num_blocks)
    tables = [[free.pop() for _ in range(-(-len(p) // block_size))] for p in prompts]
    done = [0] * len(prompts)
    sizes = []
    while live := [i for i, prompt in enumerate(prompts) if done[i] < len(prompt)]:
        chosen = rng.sample(live, rng.randint(1, len(live)))
        chunks = []
        for i in chosen:
            stop = min(done[i] + rng.choice((1, 1, 1, 2, 7, 20)), len(prompts[i]))
            chunks.append((i, done[i], stop, rng.randint(0, stop - done[i])))
            done[i] = stop
        sizes.append(len(chunks))
        spans = [(start, stop, tables[i], wanted) for i, start, stop, wanted in chunks]
        got = stages.run(spans, [prompts[i] for i in chosen])
        assert_close(
            got, torch.cat([expected[i][stop - wanted : stop] for i, _, stop, wanted in chunks])
        )
    assert max(sizes) > 3


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


def test_parameters_are_counted_as_held(checkpoint):
    for name in ("gqa", "tied", "biases"):
        folder, _, _ = checkpoint(name)
        model = transformers_model(folder)
        total = sum(parameter.numel() for parameter in model.parameters())
        if name == "tied":
            total += model.lm_head.weight.numel()
        assert sum(stage.num_parameters for stage in Stages(folder).stages) == total
