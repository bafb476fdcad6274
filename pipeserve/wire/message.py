"""What all messages have in common."""

import msgspec


class Message(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=True):
    """On the wire, a msgpack array whose first element is the message's name."""
