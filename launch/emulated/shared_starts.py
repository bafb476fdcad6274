"""When each rank of an emulated stage was given a microbatch, known to all of them.

The ranks of a real stage meet in every all-reduce: none is done with a microbatch before each of
them has begun it. So here each says when it was given one, in a page of memory that they share.
"""

import fcntl
import mmap
import os
from pathlib import Path

from pipeserve.wire.stage_job import StartStage

_FOLDER = Path("/dev/shm")
_SLOTS = 8
"""Microbatches that a rank may be ahead of the slowest one: more than any can begin."""


class SharedStarts:
    """Seen from one of several ranks."""

    def __init__(self, job: StartStage) -> None:
        self._shard = job.shard
        self._first_slots = range(0, job.num_shards * _SLOTS, _SLOTS)
        """Of each rank."""
        page = _shared_page(job)
        numbers_end, times_end, epochs_end = _places(job.num_shards)
        # Cast, and not packed: then a number is written at one stroke.
        self._numbers = memoryview(page)[:numbers_end].cast("q")
        """1 + the index of the microbatch that a slot is of; written behind its time."""
        self._times = memoryview(page)[numbers_end:times_end].cast("d")
        self._epochs = memoryview(page)[times_end:epochs_end].cast("q")
        """How many are over, as far as each rank has heard."""
        self._is_within = False
        """An epoch."""

    def give(self, index: int, at_s: float) -> None:
        """This rank has all that it needs for that microbatch."""
        slot = self._first_slots[self._shard] + index % _SLOTS
        self._times[slot] = at_s
        self._numbers[slot] = index + 1

    def latest_s(self, index: int) -> float | None:
        """When the last of the ranks was given it; None while one was not."""
        slots = [first + index % _SLOTS for first in self._first_slots]
        if any(self._numbers[slot] != index + 1 for slot in slots):
            return None
        return max([self._times[slot] for slot in slots])

    def begin_epoch(self) -> None:
        """All ranks do, before any is given a microbatch of it."""
        self._is_within = True

    def end_epoch(self) -> None:
        """What is not ended will not be, on any rank. Does nothing within none."""
        self._epochs[self._shard] += self._is_within
        self._is_within = False

    @property
    def is_over(self) -> bool:
        """Another rank has heard that the epoch is, and waits for nothing of it any more."""
        return max(self._epochs) > self._epochs[self._shard]


def _places(num_ranks: int) -> tuple[int, int, int]:
    """Where slots' numbers, their times, and epochs end, in bytes."""
    of_slots = 8 * num_ranks * _SLOTS
    return of_slots, 2 * of_slots, 2 * of_slots + 8 * num_ranks


def _shared_page(job: StartStage) -> mmap.mmap:
    """Found by a name that only the stages of one driver know, until all ranks have found it: then
    there is nothing that could be left behind. They start together, and again together."""
    path = _FOLDER / f"pipeserve-{job.control.rpartition('/')[2]}-{job.stage}"
    first_mark = _places(job.num_shards)[-1]
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
