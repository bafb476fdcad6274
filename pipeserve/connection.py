"""Plain sockets between two processes of a pipeline, for messages that are small and urgent: whole,
in order, and at the cost of one wake-up. On one machine they are local ones, between two TCP.

A ZeroMQ message wakes three threads one after the other: the sender's I/O thread, the receiver's,
and the receiver. Here the sending thread itself hands the bytes to the kernel, and the receiver
alone is woken (`bench/links.py` has both). The price is that what the kernel does not take at once,
megabytes, goes on only while its owner is in `send` or `receive`: not while it computes.

Nothing here blocks but `connect` and a `close` that is told to wait. A peer that is gone does not
raise: `has_ended` says so, and its keeper tells the driver why.
"""

import contextlib
import secrets
import socket
import struct
import time
import weakref
from collections import deque
from typing import Any, Protocol

import zmq

_PREFIX = struct.Struct("<4sI")
_OURS = b"ppsv"
"""Ahead of every message: whoever else finds the port does not say it."""
_RECEIVE_BYTES = 1 << 16
_SEND_BYTES = 4 << 20
_CONNECT_S = 10.0
_READABLE = int(zmq.POLLIN)  # an enum's own & takes longer than the look


class Source(Protocol):
    """One of those that `Sources` waits for."""

    carries: str
    """What its messages are; its owner's word."""

    def receive(self) -> list[Any]:
        """Every message that is here, in order; does not wait."""
        ...

    def close(self) -> None: ...


class Sources:
    """All that one thread waits for, at once. To be kept as long as any of them.

    They know it by weak references alone: of a ring of objects, the garbage collector may take a
    ZeroMQ context before its sockets, and waits for them then, for ever.
    """

    def __init__(self) -> None:
        self._poller = zmq.Poller()
        self._by_socket: dict[zmq.Socket | int, Source] = {}

    def add(self, source: Source, socket: zmq.Socket | int) -> None:
        """`socket`: of ZeroMQ, or a file descriptor."""
        self._by_socket[socket] = source
        self._poller.register(socket, zmq.POLLIN)

    def remove(self, socket: zmq.Socket | int) -> None:
        del self._by_socket[socket]
        self._poller.unregister(socket)

    def wait_for_room(self, socket: int, wanted: bool) -> None:
        """Whether `socket` is ready, too, when the kernel takes more to send."""
        self._poller.modify(socket, zmq.POLLIN | zmq.POLLOUT if wanted else zmq.POLLIN)

    def ready(self, timeout_ms: int | None) -> list[Source]:
        """Those that something can be received from, waiting for the first; None: however long."""
        return [self._by_socket[socket] for socket, _ in self._poller.poll(timeout_ms)]

    def close(self) -> None:
        """And every source."""
        for source in set(self._by_socket.values()):
            source.close()


class Connection:
    """One end of a connection that carries messages both ways."""

    def __init__(self, connected: socket.socket, sources: Sources, carries: str) -> None:
        connected.setblocking(False)
        if connected.family == socket.AF_UNIX:  # which has fewer by default, and does not take more
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
        else:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.carries = carries
        self.has_ended = False
        """The peer is gone, and all that it said was received; or this end is closed."""
        self._socket = connected
        self._sources = weakref.ref(sources)
        self._incoming = bytearray()
        self._outgoing: deque[memoryview] = deque()
        self._waits_for_room = False
        sources.add(self, connected.fileno())

    def send(self, message: bytes) -> None:
        """Returns at once. To a peer that is gone nothing is sent."""
        if self.has_ended:
            return
        self._outgoing.append(memoryview(_PREFIX.pack(_OURS, len(message)) + message))
        self._flush()

    def receive(self) -> list[bytearray]:
        """Every message that is whole; sends on what was left, too."""
        self._flush()
        try:
            while data := self._socket.recv(_RECEIVE_BYTES):
                self._incoming += data
                if len(data) < _RECEIVE_BYTES:
                    return self._whole()
        except BlockingIOError:
            return self._whole()
        except OSError:  # reset: as good as ended
            pass
        messages = self._whole()
        self.close()
        return messages

    def close(self, wait_s: float = 0.0) -> None:
        """Waits so long at most until the peer has received everything."""
        if self.has_ended:
            return
        self.has_ended = True
        self._sources().remove(self._socket.fileno())
        with contextlib.suppress(OSError), self._socket:
            if wait_s:
                self._see_off(time.monotonic() + wait_s)
        self._outgoing.clear()
        self._waits_for_room = False

    def _flush(self) -> None:
        """Send what the kernel takes."""
        outgoing = self._outgoing
        try:
            while outgoing:
                rest = outgoing[0][self._socket.send(outgoing[0]) :]
                if rest:
                    outgoing[0] = rest
                else:
                    outgoing.popleft()
        except BlockingIOError:
            pass
        except OSError:  # the peer is gone; what it said before that can still be received
            outgoing.clear()
        if self._waits_for_room != bool(outgoing):
            self._waits_for_room = not self._waits_for_room
            self._sources().wait_for_room(self._socket.fileno(), self._waits_for_room)

    def _whole(self) -> list[bytearray]:
        """Take the messages that are whole out of what has come."""
        incoming, messages, start = self._incoming, [], 0
        while len(incoming) - start >= _PREFIX.size:
            ours, num_bytes = _PREFIX.unpack_from(incoming, start)
            if ours != _OURS:
                self.close()
                break
            first = start + _PREFIX.size
            if len(incoming) - first < num_bytes:
                break
            start = first + num_bytes
            messages.append(incoming[first:start])
        del incoming[:start]
        return messages

    def _see_off(self, until_s: float) -> None:
        """Send the rest and wait for the peer to have it: it closes its end then. To close this one
        while something is unread here would reset the connection, and drop what is on its way."""
        for rest in self._outgoing:
            self._socket.settimeout(max(until_s - time.monotonic(), 1e-3))
            self._socket.sendall(rest)
        self._socket.shutdown(socket.SHUT_WR)
        while True:
            self._socket.settimeout(max(until_s - time.monotonic(), 1e-3))
            if not self._socket.recv(_RECEIVE_BYTES):
                return


class Listener:
    """Takes in whoever connects: from then on a `Connection` among the same sources."""

    def __init__(self, host: str, sources: Sources, carries: str) -> None:
        """On a free port of `host`, and under a name that this machine alone knows: a message to it
        takes 30 us less that way. `address` is HOST:PORT/NAME. Raises OSError."""
        self.carries = carries
        self._sources = weakref.ref(sources)
        name = secrets.token_hex(8)
        self._tcp, self._local = socket.create_server((host, 0)), socket.socket(socket.AF_UNIX)
        self._local.bind(f"\0{name}")  # "\0": in no file system, and gone with its process
        self._local.listen()
        self.address = f"{host}:{self._tcp.getsockname()[1]}/{name}"
        for listening in (self._tcp, self._local):
            listening.setblocking(False)
            sources.add(self, listening.fileno())

    def receive(self) -> list[bytearray]:
        """Nothing: connections are what comes here."""
        for listening in (self._tcp, self._local):
            with contextlib.suppress(OSError):  # nobody, or gone again
                Connection(listening.accept()[0], self._sources(), self.carries)
        return []

    def close(self) -> None:
        for listening in (self._tcp, self._local):
            self._sources().remove(listening.fileno())
            listening.close()


def connect(address: str, sources: Sources, carries: str) -> Connection:
    """The other end of a connection to the listener at `address` (HOST:PORT/NAME or HOST:PORT).

    Raises ConnectionError when it cannot be reached within 10 seconds.
    """
    place, _, name = address.partition("/")
    return Connection(_local(name) or _tcp(place), sources, carries)


def _local(name: str) -> socket.socket | None:
    """None: no one of this name is on this machine."""
    connected = socket.socket(socket.AF_UNIX)
    try:
        connected.connect(f"\0{name}")
    except OSError:
        connected.close()
        return None
    return connected


def _tcp(place: str) -> socket.socket:
    host, port = place.rsplit(":", 1)
    try:
        return socket.create_connection((host, int(port)), _CONNECT_S)
    except OSError as error:
        raise ConnectionError(f"{place} cannot be reached: {error}") from None


class FromZmq:
    """A ZeroMQ socket among the sources: a message is a list of frames."""

    def __init__(self, socket: zmq.Socket, sources: Sources, carries: str) -> None:
        self.carries = carries
        self._socket = socket
        self._sources = weakref.ref(sources)
        sources.add(self, socket)

    def receive(self) -> list[list[zmq.Frame]]:
        messages = []
        while self._socket.getsockopt(zmq.EVENTS) & _READABLE:
            messages.append(self._socket.recv_multipart(zmq.NOBLOCK, copy=False))
        return messages

    def close(self) -> None:
        self._sources().remove(self._socket)
        self._socket.close()
