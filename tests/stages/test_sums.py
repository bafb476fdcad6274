"""A rank's time in all-reduces, told from what it waits for the others there."""

import os
import socket
import time

import pytest
import torch
import torch.distributed as dist

from pipeserve.stages.tensor_parallel.sums import Sums

pytestmark = pytest.mark.processes
LATE_S = 0.1
SUMS = 2


def of_two_ranks(late):
    """What each says of four microbatches of two sums, each of a size that was there before but
    the first; `late(rank, microbatch)`: seconds before each of its sums."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    read, pids = [], []
    for rank in range(2):
        mine, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                said = in_one_rank(rank, listener if rank == 0 else None, port, late)
                os.write(theirs, repr(said).encode())
            finally:
                os._exit(0)
        os.close(theirs)
        read.append(mine)
        pids.append(pid)
    listener.close()
    said = [os.read(each, 10_000).decode() for each in read]
    for each, pid in zip(read, pids, strict=True):
        os.close(each)
        os.waitpid(pid, 0)
    return [eval(text) for text in said]


def in_one_rank(rank, listener, port, late):
    store = dist.TCPStore(
        "127.0.0.1",
        port,
        2,
        is_master=rank == 0,
        master_listen_fd=listener.detach() if listener else None,
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    sums = Sums(dist.group.WORLD)
    for _ in range(20):  # the first are slow
        dist.all_reduce(torch.ones(100))
    said = []
    for microbatch in range(4):
        for _ in range(SUMS):
            time.sleep(late(rank, microbatch))
            sums.begin()
            dist.all_reduce(torch.ones(100))
            sums.end()
        said.append(sums.of_microbatch(100 if microbatch < 3 else 1))
    return said


def test_who_waits_for_a_slower_rank_is_told_from_a_slow_sum():
    """By the other's time, so also where it is as late in each of them."""
    first, second = of_two_ranks(lambda rank, microbatch: LATE_S * rank)
    for own_s, waited_s in first:
        assert waited_s == pytest.approx(SUMS * LATE_S, rel=0.5)
        assert own_s < SUMS * LATE_S / 2
    assert max(own_s + waited_s for own_s, waited_s in second) < SUMS * LATE_S / 2


def test_a_rank_that_is_late_once_is_waited_for_once():
    """Between two comparisons, too: by what such a microbatch took before."""
    first, _ = of_two_ranks(lambda rank, microbatch: LATE_S * rank * (microbatch == 1))
    waited_s = [waited_s for _, waited_s in first]
    assert waited_s[1] == pytest.approx(SUMS * LATE_S, rel=0.5)
    assert max(waited_s[0], *waited_s[2:]) < SUMS * LATE_S / 2


def test_nothing_is_exchanged_where_nothing_was_added_up():
    assert Sums(None).of_microbatch(5) == (0.0, 0.0)
