"""Memory in large pages (stages/backends/cpu/large_pages.py)."""

import ctypes
import gc
import mmap

import pytest
import torch

from pipeserve.stage.memory import resident_bytes
from pipeserve.stages.backends.cpu.large_pages import Zeros

SHAPE = (64, 1 << 20)


def _knows_populate():
    """Whether this kernel brings memory before it is used (MADV_POPULATE_WRITE, Linux 5.14)."""
    memory = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return not ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(1), 23)


brings = pytest.mark.skipif(not _knows_populate(), reason="needs MADV_POPULATE_WRITE")


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


@brings
def test_it_comes_page_by_page_while_there_is_time():
    before, zeros = resident_bytes(), Zeros()
    pool = zeros.make(SHAPE, torch.bfloat16)
    pool[5] = 7
    num_pages = 0
    while zeros.bring():
        num_pages += 1
    assert num_pages * 2 << 20 == pytest.approx(pool.nbytes, rel=0.05)
    assert resident_bytes() - before > 0.9 * pool.nbytes
    assert pool[5].eq(7).all() and pool[6].eq(0).all()


def _is_there(number):
    """Whether the page of a tensor's one number has come."""
    address, answer = (
        number.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE,
        ctypes.create_string_buffer(1),
    )
    ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(1), answer)
    return bool(answer.raw[0] & 1)


@brings
def test_what_is_used_first_comes_first():
    """Blocks are handed out from the lowest on, and each has a place in every layer and head, for
    its keys and its values. Memory that came from front to back was there for the first layers when
    the first requests came, and not for the last."""
    zeros, num_parts = Zeros(), 6
    sides = [zeros.make((3, 2, 5 << 20), torch.bfloat16, num_parts) for _ in range(2)]
    for _ in range(2 * num_parts):
        zeros.bring()
    parts = [part for side in sides for part in side.flatten(0, 1)]
    has_front, has_rest = ([_is_there(part[at:]) for part in parts] for at in (0, 3 << 20))
    assert sum(has_front) >= len(parts) - 2  # a side begins between two large pages
    assert not any(has_rest)


@brings
def test_memory_that_is_gone_is_not_brought():
    """That of a pool in which layers were timed before the stage's own is made: something else may
    lie there, or nothing."""
    zeros = Zeros()
    gone = zeros.make(SHAPE, torch.bfloat16)
    pool = zeros.make(SHAPE, torch.bfloat16)
    del gone
    before = resident_bytes()
    num_pages = 0
    while zeros.bring():
        num_pages += 1
    assert num_pages * 2 << 20 == pytest.approx(pool.nbytes, rel=0.05)
    assert resident_bytes() - before > 0.9 * pool.nbytes


def test_a_pool_of_no_layers_is_empty():
    zeros = Zeros()
    assert zeros.make((0, 4), torch.bfloat16).shape == (0, 4)
    assert not zeros.bring()


def test_more_than_the_machine_has_is_told():
    with pytest.raises(OSError, match="allocate memory"):
        Zeros().make((1 << 45,), torch.float32)
