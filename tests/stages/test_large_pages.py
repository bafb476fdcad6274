"""Memory in large pages (stages/backends/cpu/large_pages.py)."""

import gc

import pytest
import torch

from pipeserve.stage.memory import resident_bytes
from pipeserve.stages.backends.cpu.large_pages import Zeros

SHAPE = (64, 1 << 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_pool_is_zero_and_comes_when_it_is_used(dtype):
    before = resident_bytes()
    pool = Zeros().make(SHAPE, dtype)
    assert (pool.shape, pool.dtype) == (SHAPE, dtype)
    assert resident_bytes() - before < pool.nbytes / 8
    pool[3] = 1
    gc.collect()  # nothing but the tensor holds its memory
    assert pool[3].eq(1).all() and pool[2].eq(0).all() and pool[4].eq(0).all()
    assert resident_bytes() - before < pool.nbytes / 4


def test_it_comes_page_by_page_while_there_is_time():
    before, zeros = resident_bytes(), Zeros()
    pool = zeros.make(SHAPE, torch.bfloat16)
    pool[5] = 7
    num_pages = 0
    while zeros.bring():
        num_pages += 1
    if num_pages == 1:
        pytest.skip("this kernel does not bring memory before it is used")
    assert num_pages * 2 << 20 == pytest.approx(pool.nbytes, rel=0.05)
    assert resident_bytes() - before > 0.9 * pool.nbytes
    assert pool[5].eq(7).all() and pool[6].eq(0).all()


def test_a_pool_of_no_layers_is_empty():
    zeros = Zeros()
    assert zeros.make((0, 4), torch.bfloat16).shape == (0, 4)
    assert not zeros.bring()


def test_more_than_the_machine_has_is_told():
    with pytest.raises(OSError, match="allocate memory"):
        Zeros().make((1 << 45,), torch.float32)
