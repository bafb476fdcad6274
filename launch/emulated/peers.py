"""What the ranks of an emulated stage know of each other.

The ranks of a real one meet in every all-reduce: none is done with a microbatch before each of them
has begun it. So each says when it was given one, in a page of memory that they share.
"""

import fcntl
import mmap
import os
from pathlib import Path

from pipeserve.wire.control import StartStage

_FOLDER = Path("/dev/shm")
_SLOTS = 8
"""Microbatches that a rank may be ahead of the slowest one: more than any can begin."""


class Peers:
    """The ranks of one stage, seen from one of them."""

    def __init__(self, job: StartStage) -> None:
        self._first_slot = job.shard * _SLOTS
        self._starts = range(0, job.num_shards * _SLOTS, _SLOTS)
        page = _shared_page(job) if job.num_shards > 1 else mmap.mmap(-1, mmap.PAGESIZE)
        num_slots = job.num_shards * _SLOTS
        # Cast, and not packed: then a number is written at one stroke.
        self._numbers = memoryview(page)[: 8 * num_slots].cast("q")
        """1 + the index of the microbatch that a slot is of; written behind its time."""
        self._times = memoryview(page)[8 * num_slots : 16 * num_slots].cast("d")

    def given(self, index: int, at_s: float) -> None:
        """This rank has all that it needs for that microbatch."""
        slot = self._first_slot + index % _SLOTS
        self._times[slot] = at_s
        self._numbers[slot] = index + 1

    def all_given_s(self, index: int) -> float | None:
        """When the last of them was given it; None while one was not."""
        slots = [start + index % _SLOTS for start in self._starts]
        if any(self._numbers[slot] != index + 1 for slot in slots):
            return None
        return max([self._times[slot] for slot in slots])


def _shared_page(job: StartStage) -> mmap.mmap:
    """Found by a name that only the stages of one driver know, until all ranks have found it."""
    path = _FOLDER / f"pipeserve-{job.control.rpartition('/')[2]}-{job.stage}"
    first_mark = 16 * job.num_shards * _SLOTS
    num_bytes = first_mark + job.num_shards
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.ftruncate(descriptor, num_bytes)
        page = mmap.mmap(descriptor, num_bytes)
        page[first_mark + job.shard] = 1  # this rank is here
        if all(page[first_mark:]):
            path.unlink()
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # or the page would keep it
    finally:
        os.close(descriptor)
    return page
