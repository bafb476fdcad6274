"""The latest spans of a stage, in memory that it shares with its keeper: so what it has done is
known though it was killed before it could tell."""

import mmap
import os
import struct

from pipeserve.core.records import Span

_SLOTS = 64
_COUNT_BYTES = 8
"""Ahead of the slots: the number of spans so far, written behind each of them, at one stroke."""
_SPAN = struct.Struct("=3q8dq2d")


class LastSpans:
    """A ring of them. A stage puts them in, and its keeper takes them out when it has ended."""

    def __init__(self, descriptor: int) -> None:
        """Of the file in memory that `make` has made, here or in another process."""
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, _COUNT_BYTES + _SLOTS * _SPAN.size)
        # Not by `struct`, which writes byte by byte, and could be cut off within.
        self._counts = memoryview(self._memory)[:_COUNT_BYTES].cast("q")

    @classmethod
    def make(cls) -> "LastSpans":
        """An empty one."""
        descriptor = os.memfd_create("spans")
        os.ftruncate(descriptor, _COUNT_BYTES + _SLOTS * _SPAN.size)
        return cls(descriptor)

    def put(self, span: Span) -> None:
        (count,) = self._counts
        _SPAN.pack_into(self._memory, self._place(count), *span)
        self._counts[0] = count + 1

    def take(self) -> list[Span]:
        """What is there, in order. The oldest is left out: the one that was about to take its place
        may have been cut off within."""
        (count,) = self._counts
        first = max(count - _SLOTS + 1, 0)
        return [
            Span(*_SPAN.unpack_from(self._memory, self._place(number)))
            for number in range(first, count)
        ]

    def close(self) -> None:
        self._counts.release()
        self._memory.close()
        os.close(self.descriptor)

    def _place(self, number: int) -> int:
        return _COUNT_BYTES + number % _SLOTS * _SPAN.size
