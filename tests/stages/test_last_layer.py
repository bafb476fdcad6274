"""The layer before a head: keys and values of every row, all else of the rows alone whose logits
are wanted, which are those of a layer that goes on with all."""

import random
from itertools import pairwise

import pytest
import torch
from checkpoints import TINY, random_prompts, tiny
from cut_model import TOLERANCE, Stages
from local_fleet import local_llm

from pipeserve import SamplingParams
from pipeserve.stages.attention.inputs import build_inputs
from pipeserve.stages.backends.backend import Backend
from pipeserve.stages.backends.cpu.backend import CpuBackend
from pipeserve.stages.backends.cpu.kernel_backend import KernelBackend
from pipeserve.stages.backends.cpu.library import kernels
from pipeserve.stages.config.families import read_config
from pipeserve.stages.stage import Stage

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = [CpuBackend] + [KernelBackend] * (kernels() is not None)
"""`Backend` itself: test_other_device.py."""
LENGTHS = (37, 20, 5)


def microbatches(prompts, seed):
    """Chunks and decodes of all of them at random: spans of no row, the last, or some wanted."""
    rng = random.Random(seed)
    cuts = []
    for number, prompt in enumerate(prompts):
        inner = sorted(rng.sample(range(1, len(prompt)), 4))
        table = [4 * number + block for block in range(4)]
        cuts.append([(number, a, b, table) for a, b in pairwise((0, *inner, len(prompt)))])
    for chunks in zip(*cuts, strict=True):
        used = rng.sample(chunks, len(chunks))
        yield [
            (number, (start, stop, table, rng.choice((0, 1, rng.randint(0, stop - start)))))
            for number, start, stop, table in used
        ]
    yield [(0, (3, 4, cuts[0][0][3], 0)), (1, (2, 9, cuts[1][0][3], 0))]  # nothing is wanted


def equal_pools(one, other):
    sides = [(pool.keys_LKBPH, pool.values_LKBPH) for pool in (one, other)]
    return all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(*sides, strict=True))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("make", BACKENDS)
def test_rows_are_those_of_a_layer_that_goes_on_with_all(tmp_path, make, name):
    """And so is what lies in the pool. Bit for bit by the kernels; PyTorch computes a decode and a
    row of a chunk in another order. Chunks of which no row goes on stand among others (tt-xla#5830:
    such a row got the last one's place) and alone (sglang#38780, Megatron-LM#1877: experts of no
    token; gloo#179: sums of no number, in test_tensor_parallel.py)."""
    folder = tiny(name, tmp_path)
    prompts = random_prompts(folder, LENGTHS, seed=1)
    own, whole = (Stages(folder, (4,), backend=make()) for _ in range(2))
    sizes = set()
    for chosen in microbatches(prompts, seed=2):
        spans, ids = [span for _, span in chosen], [prompts[number] for number, _ in chosen]
        got = own.run(spans, ids)
        all_wanted = [(start, stop, table, stop - start) for start, stop, table, _ in spans]
        parts = whole.run(all_wanted, ids).split([stop - start for start, stop, _, _ in spans])
        wanted = [part[len(part) - span[3] :] for part, span in zip(parts, spans, strict=True)]
        expected = torch.cat(wanted)
        if make is KernelBackend:
            assert torch.equal(got, expected)
        else:
            torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
        sizes.add(len(got))
    assert 0 in sizes and len(sizes) > 2
    assert equal_pools(own.pools[0], whole.pools[0])


@pytest.mark.parametrize("name", TINY)
def test_the_other_rows_end_at_its_keys_and_values(tmp_path, name, monkeypatch):
    """In every family; in the layers before it they go on."""
    stages = Stages(tiny(name, tmp_path), (4,), backend=Backend())
    (stage,) = stages.stages
    passed = {}
    for number, layer in enumerate(stage.layers):
        for part in (layer.attention.out, layer.mlp):

            def counted(x, *others, inner=part.forward, key=(number, part), **named):
                passed[key] = len(x)
                return inner(x, *others, **named)

            monkeypatch.setattr(part, "forward", counted)
    (prompt,) = random_prompts(tmp_path, (30,))
    for wanted in (0, 1, 5, 30):
        stages.run([(0, 30, [0, 1], wanted)], [prompt])
        for (number, _), num_rows in passed.items():
            assert num_rows == (wanted if number == 3 else 30)
        assert len(passed) == 8


def made_stage(folder, first, stop, **which):
    config = read_config(folder)
    stage = Stage(config, first_layer=first, stop_layer=stop, has_embedding=False, **which)
    for leaf in stage.leaves():
        leaf.set(torch.randn(leaf.shape), torch.randn(leaf.shape[0]) if leaf.has_bias else None)
    return stage


@pytest.mark.parametrize("layers", [(0, 2), (4, 4)])
def test_rows_come_where_the_head_is_next(tmp_path, layers):
    """A first stage that has a head, too, gives all rows to the stage behind it; a last one without
    layers hands on the rows that it got."""
    folder = tiny("llama", tmp_path)
    inputs = build_inputs([(0, 6, [0], 1), (0, 3, [1], 0)], 16, None)
    for gives_rows in (False, True):
        stage = made_stage(folder, *layers, has_head=True, gives_rows=gives_rows)
        stage.head = None  # as a stage's process has it
        kv = stage.make_kv(num_blocks=2, block_size=16, dtype=torch.float32)
        x_TD = torch.randn(9, stage.config.hidden_size)
        with torch.inference_mode():
            got = stage(x_TD, inputs, kv)
        assert len(got) == (1 if gives_rows else 9)
        if not stage.layers:
            assert torch.equal(got, x_TD[5:6] if gives_rows else x_TD)


SCARCE = {"block_size": 4, "num_gpu_blocks_override": 26, "policy": "sarathi_serve"}


@pytest.mark.skipif(kernels() is None, reason="rows depend on their batch without them")
@pytest.mark.parametrize("options", [{}, {"head_stages": "both"}, SCARCE])
def test_texts_are_the_same_whether_prompts_are_scored(tmp_path, options):
    """A prompt that is scored has all of its rows go on, beside others of which few do (elsewhere
    one then got the rows of another, sglang#32103, or of none, vllm-rbln#1030, or none could be
    asked for, vllm#49622). Tokens and log-probabilities are the same numbers in float32: in chunks,
    beside decodes, behind a prefix, with the head at either end, and when requests are preempted.
    """
    folder = tiny("llama", tmp_path)
    prompts = random_prompts(folder, (40, 23, 31, 6))
    prompts.append(prompts[0] + prompts[3])
    texts, scores = [], []
    for scored in ((None,) * 5, (0,) * 5, (None, 0, None, 0, 0)):
        params = [
            SamplingParams(
                temperature=0, max_tokens=9, logprobs=1, prompt_logprobs=each, ignore_eos=True
            )
            for each in scored
        ]
        with local_llm(
            folder, (1, 3), max_num_batched_tokens=16, max_model_len=96, **options
        ) as llm:
            outputs = [*llm.generate(prompts, params), *llm.generate(prompts, params)]
            stats = llm.client.engine.stats
        assert (stats.preemptions > 0) == (options is SCARCE)
        texts.append([(each.token_ids, each.logprobs) for each in outputs])
        scores.append([each.prompt_logprobs for each in outputs])
    assert texts[0] == texts[1] == texts[2]
    own = [place for place in range(10) if scored[place % 5] == 0]
    assert [scores[1][place] for place in own] == [scores[2][place] for place in own]
    assert all(len(scores[1][place]) == len(prompts[place % 5]) for place in own)
