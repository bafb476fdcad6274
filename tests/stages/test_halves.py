"""Halves of a layer by one call of C, and layers by one: the same numbers as part by part."""

import gc
import weakref

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


class Around(torch.nn.Module):
    """A product as ranks that share a stage have it: its weight is no backend's."""

    def __init__(self, own):
        super().__init__()
        self.own, self.bias, self.described = own, None, None
        self.weight = torch.empty(own.shape, device="meta")

    def forward(self, x_TI, onto_TO=None):
        return self.own(x_TI) if onto_TO is None else onto_TO + self.own(x_TI)


def test_layers_with_products_of_others_run_half_by_half(tmp_path):
    folder, prompt = tiny("llama", tmp_path), [list(range(20))]
    chunk = [(0, 20, [0, 1], 20)]
    stages = Stages(folder, (4,), backend=KernelBackend())
    around = Stages(folder, (4,), backend=KernelBackend())
    for layer in around.stages[0].layers:
        layer.attention.qkv, layer.mlp.down = Around(layer.attention.qkv), Around(layer.mlp.down)
    assert torch.allclose(around.run(chunk, prompt), stages.run(chunk, prompt), atol=1e-5)


def test_layers_run_on_the_pool_that_is_given(tmp_path):
    folder, prompt = tiny("llama", tmp_path), [list(range(30))]
    one, other = (Stages(folder, (4,), backend=KernelBackend()) for _ in range(2))
    other.stages = one.stages  # with a pool of its own
    table = [3, 1]
    expected = one.run([(0, 20, table, 20)], prompt), one.run([(20, 30, table, 10)], prompt)
    one.pools[0].keys_LKBPH.fill_(torch.nan)
    for (start, stop), known in zip(((0, 20), (20, 30)), expected, strict=True):
        chunk = [(start, stop, table, stop - start)]
        assert torch.equal(other.run(chunk, prompt), known)
        assert torch.equal(one.run(chunk, prompt), known)


def test_what_c_is_told_of_keeps_nothing_alive(tmp_path):
    """No weight, and no pool that another has taken the place of."""
    stages = Stages(tiny("llama", tmp_path), (4,), backend=KernelBackend())
    gc.collect()
    gc.disable()
    try:
        stages.run([(0, 20, [0, 1], 20)], [list(range(20))])
        pool = weakref.ref(stages.pools.pop())
        assert pool() is None
        weight = weakref.ref(stages.stages[0].layers[0].attention.qkv.weight)
        del stages
        assert weight() is None
    finally:
        gc.enable()


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
