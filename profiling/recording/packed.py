"""Records as bytes, one behind the other: to keep many, or to hand them to another process."""

import struct
from collections.abc import Iterator

import msgspec

from pipeserve.core.records import (
    Arrived,
    Completed,
    Ended,
    Fault,
    Headed,
    Ping,
    Planned,
    Record,
    Span,
)

_KINDS = (Arrived, Ended, Planned, Completed, Span, Ping, Fault, Headed)
_PLACES = {kind: place for place, kind in enumerate(_KINDS)}
_DECODERS = [msgspec.msgpack.Decoder(kind) for kind in _KINDS]
_HEAD = struct.Struct("=BI")
"""Of a record: its place in `_KINDS`, and its bytes."""
_encode = msgspec.msgpack.Encoder().encode


def pack(record: Record, into: bytearray) -> None:
    """Behind what is there."""
    encoded = _encode(record)
    into += _HEAD.pack(_PLACES[type(record)], len(encoded))
    into += encoded


def unpack(packed: bytes) -> Iterator[Record]:
    """In the order in which they were packed."""
    data, start = memoryview(packed), 0
    while start < len(data):
        kind, num_bytes = _HEAD.unpack_from(data, start)
        start += _HEAD.size + num_bytes
        yield _DECODERS[kind].decode(data[start - num_bytes : start])
