"""A connection's other end, played by hand on a plain socket: its bytes are a promise, for another
process has to read them."""

import socket
import struct

from pipeserve.wire.connection import Connection
from pipeserve.wire.handshake import Connecting
from pipeserve.wire.sources import Sources

PREFIX = struct.Struct("<4sI")


def framed(message: bytes) -> bytes:
    """A message, as it crosses the wire."""
    return PREFIX.pack(b"ppsv", len(message)) + message


def read_message(plain: socket.socket) -> bytes:
    """The next one."""
    ours, num_bytes = PREFIX.unpack(plain.recv(PREFIX.size, socket.MSG_WAITALL))
    assert ours == b"ppsv"
    return plain.recv(num_bytes, socket.MSG_WAITALL)


def connected_by_hand(
    address: str, sources: Sources, secret: bytes, purpose: str
) -> tuple[Connection, socket.socket]:
    """The end of who listens at `address`, among `sources`, and a socket that has proved itself."""
    host, port = address.partition("/")[0].rsplit(":", 1)
    plain = socket.create_connection((host, int(port)), 5)
    shaking = Connecting(secret, (purpose,))
    plain.sendall(framed(shaking.hello()))
    here = None
    while not shaking.is_done:
        for source in sources.ready(10):
            source.receive()
            here = source if isinstance(source, Connection) else here
        plain.settimeout(0.01)
        try:
            plain.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            continue
        plain.settimeout(5)
        if answer := shaking.take(read_message(plain)):
            plain.sendall(framed(answer))
    plain.settimeout(5)
    return here, plain
