"""Messages in a stream of bytes: each behind a prefix that says whose it is, and how long."""

import struct
from collections.abc import Iterator

_PREFIX = struct.Struct("<4sI")
_OURS = b"ppsv"
"""Ahead of every message: whoever else finds the port does not say it."""
RECEIVE_BYTES = 1 << 16
"""At once; a message that is larger is received where it is to lie."""


class NotOurs(Exception):
    """What came is no message, or too large for one; `str` says so in words."""


def framed(message: bytes) -> memoryview:
    """As it is sent."""
    return memoryview(_PREFIX.pack(_OURS, len(message)) + message)


def prefix_of(num_bytes: int) -> memoryview:
    """What goes ahead of a message of so many bytes."""
    return memoryview(_PREFIX.pack(_OURS, num_bytes))


class Incoming:
    """What has come on one connection and is not a whole message yet."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        """Of one message."""
        self._bytes = bytearray()
        self._large: bytearray | None = None
        self._num_large = 0
        """How much of that one is there."""

    @property
    def room(self) -> memoryview | None:
        """Where the rest of a large message is to be received: `filled` says that it was. None: at
        most `RECEIVE_BYTES` are to be received, for `take`."""
        return None if self._large is None else memoryview(self._large)[self._num_large :]

    def filled(self, num_bytes: int) -> bytearray | None:
        """The message, when it is whole with these bytes of it."""
        self._num_large += num_bytes
        message = self._large
        if message is None or self._num_large < len(message):
            return None
        self._large = None
        return message

    def take(self, data: bytes) -> Iterator[bytearray]:
        """The messages that are whole now. Raises NotOurs."""
        incoming, start = self._bytes, 0
        incoming += data
        while len(incoming) - start >= _PREFIX.size:
            ours, num_bytes = _PREFIX.unpack_from(incoming, start)
            if ours != _OURS:
                raise NotOurs("it speaks something else")
            if num_bytes > self.most_bytes:
                raise NotOurs(f"its message is of over {self.most_bytes:,} bytes")
            first = start + _PREFIX.size
            here = len(incoming) - first
            if here < num_bytes:
                if num_bytes > RECEIVE_BYTES:
                    self._begin_large(num_bytes, incoming[first:])
                    start = len(incoming)
                break
            start = first + num_bytes
            yield incoming[first:start]
        del incoming[:start]

    def _begin_large(self, num_bytes: int, begun: bytearray) -> None:
        self._large, self._num_large = bytearray(num_bytes), len(begun)
        self._large[: len(begun)] = begun
