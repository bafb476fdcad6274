"""A model cut into stages that run in this process, one after the other. For the tests.

KV pools start full of NaN: whatever reads a position that nobody wrote shows at once.
"""

import random

import torch

from pipeserve.stages.attention.inputs import build_inputs
from pipeserve.stages.checkpoint.weights import load_weights
from pipeserve.stages.config.families import read_config
from pipeserve.stages.devices import make_backend
from pipeserve.stages.stage import Stage

TOLERANCE = 1e-4


class Stages:
    """A model cut into stages, each with its own KV pool."""

    def __init__(
        self,
        folder: str,
        layers=(1, 3),
        *,
        attention="auto",
        backend=None,
        block_size=16,
        num_blocks=64,
        config=None,
        dtype=torch.float32,
    ) -> None:
        config = config or read_config(folder)
        assert sum(layers) == config.num_layers
        self.dtype = dtype
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.stages, self.pools = [], []
        for number, count in enumerate(layers):
            first = sum(layers[:number])
            stage = Stage(
                config,
                first_layer=first,
                stop_layer=first + count,
                has_embedding=number == 0,
                has_head=number == len(layers) - 1,
                backend=backend or make_backend("cpu", attention),
            )
            load_weights(stage, folder, dtype)
            self.stages.append(stage)
            pool = stage.make_kv(num_blocks=num_blocks, block_size=block_size, dtype=dtype)
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
            given = inputs.token_ids_T if is_first else x.to("cpu", self.dtype)
            x = stage(given, inputs, pool)
        return x.cpu()

    def logits(self, prompt, budget):
        """Of every position of `prompt`, taken `budget` tokens at a time."""
        table = list(range(self.num_blocks))
        random.Random(budget).shuffle(table)
        starts = range(0, len(prompt), budget)
        spans = [(i, min(i + budget, len(prompt)), table) for i in starts]
        return torch.cat(
            [self.run([(i, stop, table, stop - i)], [prompt]) for i, stop, table in spans]
        )


def assert_close(got, expected):
    """Logits, in float32."""
    assert got.shape == expected.shape
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


def run_mixed(stages, prompts, expected, seed):
    """All prompts in random chunks, decodes among them, several a microbatch, over scattered
    blocks; what comes out must be `expected`, the logits of every position of each prompt."""
    rng = random.Random(seed)
    size = stages.block_size
    free = rng.sample(range(stages.num_blocks), stages.num_blocks)
    tables = [[free.pop() for _ in range(-(-len(p) // size))] for p in prompts]
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
        wanted_logits = [expected[i][stop - wanted : stop] for i, _, stop, wanted in chunks]
        assert_close(got, torch.cat(wanted_logits))
    assert max(sizes) > 2
