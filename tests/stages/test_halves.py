"""Halves of a layer by one call of C, and layers by one: the same numbers as part by part."""

import pytest
import torch
from checkpoints import TINY, random_prompts, tiny
from cut_model import Stages

from pipeserve.stages.backends.backend import Backend
from pipeserve.stages.backends.cpu import library
from pipeserve.stages.backends.cpu.kernel_backend import KernelBackend
from pipeserve.stages.layers.leaf import Leaf

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(library.kernels() is None, reason="no kernels"),
]


class HalfByHalf(KernelBackend):
    """Knows no operation but halves, for layers in which all rows go on."""

    layers_at_once = Backend.layers_at_once

    def place_heads(self, *_):
        raise AssertionError

    gated = activate = place_heads


class PartByPart(KernelBackend):
    layers_at_once = Backend.layers_at_once
    attention_half = Backend.attention_half
    mlp_half = Backend.mlp_half


class AtOnce(KernelBackend):
    """Knows no halves either."""

    attention_half = mlp_half = HalfByHalf.place_heads


NOT_AT_ONCE = [
    name
    for name in TINY
    if any(kind in name for kind in ("falcon", "gemma", "mixtral", "moe", "post"))
]


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *[(name, HalfByHalf) for name in TINY],
        *[(name, AtOnce) for name in TINY if name not in NOT_AT_ONCE],
    ],
)
def test_halves_and_layers_are_their_parts_bit_for_bit(tmp_path, name, backend):
    """Of one row and of several blocks of them, whose last one is short or not."""
    folder = tiny(name, tmp_path)
    prompts = random_prompts(folder, (60, 97, 45))
    tables = [[16 * number + block for block in range(16)] for number in range(3)]
    for dtype in (torch.float32, torch.bfloat16):
        own, apart = (
            Stages(folder, (4,), backend=backend, dtype=dtype)
            for backend in (backend(), PartByPart())
        )
        for spans in (
            {0: (0, 1), 1: (0, 90), 2: (0, 5)},
            {0: (1, 60), 1: (90, 96), 2: (5, 44)},
            {1: (96, 97)},
        ):
            chunks = [(*span, tables[i], span[1] - span[0]) for i, span in spans.items()]
            ids = [prompts[i] for i in spans]
            assert torch.equal(own.run(chunks, ids), apart.run(chunks, ids))
        (a,), (b,) = own.pools, apart.pools
        assert torch.equal(a.keys_LKBPH.nan_to_num(7), b.keys_LKBPH.nan_to_num(7))
        assert torch.equal(a.values_LKBPH.nan_to_num(7), b.values_LKBPH.nan_to_num(7))


def test_weights_that_are_set_anew_are_used(tmp_path):
    """What C is told of a weight is made once, and not of one that is gone (as in sglang#14158,
    sglang#28676, vllm#48312, AiDotNet.Tensors#583)."""
    folder = tiny("qwen2", tmp_path)
    stages = Stages(folder, (4,), backend=KernelBackend())
    prompt, chunk = random_prompts(folder, (20,)), [(0, 20, [0, 1], 20)]
    first = stages.run(chunk, prompt)
    for leaf in stages.stages[0].layers.modules():
        if isinstance(leaf, Leaf):
            leaf.set(torch.randn(leaf.shape), torch.randn(leaf.shape[0]) if leaf.has_bias else None)
    again = stages.run(chunk, prompt)
    assert not torch.isclose(first, again).all(-1).any()
    for method in ("layers_at_once", "attention_half", "mlp_half"):
        setattr(stages.stages[0].backend, method, getattr(PartByPart(), method))
    assert torch.equal(stages.run(chunk, prompt), again)
