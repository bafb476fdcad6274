"""Memory in large pages (stages/backends/cpu/large_pages.py)."""

import gc

import pytest
import torch

from pipeserve.stage.memory import resident_bytes
from pipeserve.stages.backends.cpu import large_pages

SHAPE = (64, 1 << 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_pool_is_zero_and_comes_when_it_is_used(dtype):
    before = resident_bytes()
    pool = large_pages.zeros(SHAPE, dtype)
    assert (pool.shape, pool.dtype) == (SHAPE, dtype)
    assert resident_bytes() - before < pool.nbytes / 8
    pool[3] = 1
    gc.collect()  # nothing but the tensor holds its memory
    assert pool[3].eq(1).all() and pool[2].eq(0).all() and pool[4].eq(0).all()
    assert resident_bytes() - before < pool.nbytes / 4


def test_a_pool_of_no_layers_is_empty():
    assert large_pages.zeros((0, 4), torch.bfloat16).shape == (0, 4)


def test_more_than_the_machine_has_is_told():
    with pytest.raises(OSError, match="allocate memory"):
        large_pages.zeros((1 << 45,), torch.float32)
