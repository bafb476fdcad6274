"""Plain sockets between two processes of a pipeline: messages whole, in order, and at the cost of
one wake-up. On one machine they are local ones, between two TCP.

The sending thread itself hands the bytes to the kernel, and the receiver alone is woken. What the
kernel does not take at once goes on when its owner is next in `send` or `receive`; or, of megabytes
that are on their way while their sender computes (`send_large`), on a thread (`pump.py`).

Both ends prove first that they have the run's secret (`handshake.py`). Until then a peer is a
stranger: it may say 1 KiB, `Sources` ends it after 5 seconds, and what it does costs that
connection alone.

Nothing here blocks but a `close` that is told to wait. A peer that is gone does not
raise: `has_ended` says so, and its keeper tells the driver why.
"""

import contextlib
import socket
import struct
import time
from collections import deque
from collections.abc import Collection
from typing import Protocol

from pipeserve.wire import handshake
from pipeserve.wire.handshake import Connecting, Listening, Refused
from pipeserve.wire.pump import Pump
from pipeserve.wire.sources import Sources

_PREFIX = struct.Struct("<4sI")
_OURS = b"ppsv"
"""Ahead of every message: whoever else finds the port does not say it."""
_RECEIVE_BYTES = 1 << 16
_SEND_BYTES = 4 << 20
_MOST_BYTES = {
    "client": 1 << 30,
    "keeper": 1 << 20,
    "stage": 1 << 30,
    "tokens": 1 << 24,
    "activations": (1 << 32) - 1,
    "rows": (1 << 32) - 1,
}
"""Of one message, by what the connection is for."""
_WATCH = (
    ((socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 2),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPINTVL), 1),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPCNT), 4),
    ((socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT), 6_000),
)
"""A machine that is silent for 6 seconds is gone: its kernel answers while it is there."""


class Accepting(Protocol):
    """Who accepted a connection, and says what it may be for: a `Listener`."""

    name: str
    """Of the port, for who reads stderr."""
    purposes: Collection[str]
    carries: str | None
    """What its connections carry; None: what they came for."""

    def takes(self, connection: "Connection") -> bool:
        """Whether one that has proved itself is taken in."""
        ...


class Connection:
    """One end of a connection that carries messages both ways."""

    def __init__(
        self,
        connected: socket.socket,
        sources: Sources,
        carries: str,
        listener: Accepting | None = None,
    ) -> None:
        """`listener`: which accepted it; None at the end that connects, to be used for `carries`.

        Messages can be sent at once; they go out when both ends have proved themselves.
        """
        connected.setblocking(False)
        if connected.family == socket.AF_UNIX:  # which has fewer by default, and does not take more
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
        else:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.carries = carries
        self.has_ended = False
        """The peer is gone, and all that it said was received; or this end is closed."""
        self.refusal: str | None = None
        """Why one end would not have the other."""
        self.is_refused = False
        """And would not another time."""
        self.is_accepted = listener is not None
        self._listener = listener
        self._socket = connected
        self._peer = _name_of_peer(connected)
        self.sources = sources
        self._incoming = bytearray()
        self._large: tuple[bytearray, int] | None = None
        """A message that is received where it is to lie, and how much of it is there."""
        self._outgoing: deque[memoryview] = deque()
        self._held_back: list[memoryview] = []
        """Until the handshake is done."""
        self._waits_for_room = False
        self._pump: Pump | None = None
        self._most_bytes = handshake.MOST_BYTES
        sources.add(self, connected.fileno())
        sources.begins(self)
        self._handshake: Connecting | Listening | None = None  # once it is done
        if listener is not None:
            self._handshake = Listening(sources.secret, listener.purposes)
        else:
            self._handshake = Connecting(sources.secret, (carries,))
            self._put_out(self._handshake.hello())

    @property
    def is_open(self) -> bool:
        """Both ends have proved themselves, and neither has ended it."""
        return self._handshake is None and not self.has_ended

    @property
    def own_host(self) -> str:
        """Of a TCP connection: the address of this machine, as the peer's machine reaches it."""
        return _plain(self._socket.getsockname()[0])

    def watch_host(self) -> None:
        """Of a TCP connection: end it when the peer's machine is gone, which closes nothing."""
        if self._socket.family != socket.AF_UNIX:
            for option, value in _WATCH:
                self._socket.setsockopt(*option, value)

    def can_wait(self) -> None:
        """What the peer says is not urgent (`Sources.ready`)."""
        self.sources.can_wait(self._socket.fileno())

    # ---- sending --------------------------------------------------------------------------------

    def send(self, *messages: bytes) -> None:
        """At once, so that the peer is woken once. Does not wait. To a peer that is gone nothing is
        sent."""
        if self.has_ended:
            return
        framed = _framed(*messages)
        if self._handshake is not None:
            self._held_back.append(framed)
            return
        self._outgoing.append(framed)
        self._flush()

    def send_large(self, *parts: memoryview) -> None:
        """One message of these parts, whose memory is not copied: nothing may be written to it
        after. For a connection that this end sends on in no other way, and that `is_open`."""
        if self.has_ended:
            return
        if self._pump is None:
            self._pump = Pump(self._socket)
        num_bytes = sum(part.nbytes for part in parts)
        self._pump.send([memoryview(_PREFIX.pack(_OURS, num_bytes)), *parts])

    def _put_out(self, message: bytes) -> None:
        """Ahead of what is held back."""
        self._outgoing.append(_framed(message))
        self._flush()

    def _flush(self) -> None:
        """Send what the kernel takes."""
        outgoing = self._outgoing
        try:
            while outgoing:
                message = outgoing[0]
                num_sent = self._socket.send(message)
                if num_sent < len(message):
                    outgoing[0] = message[num_sent:]
                else:
                    outgoing.popleft()
        except BlockingIOError:
            pass
        except OSError:  # the peer is gone; what it said before that can still be received
            outgoing.clear()
        if self._waits_for_room != bool(outgoing):
            self._waits_for_room = not self._waits_for_room
            self.sources.wait_for_room(self._socket.fileno(), self._waits_for_room)

    # ---- receiving ------------------------------------------------------------------------------

    def receive(self) -> list[bytearray]:
        """Every message that is whole; sends on what was left, too."""
        if self.has_ended:
            return []
        if self._outgoing:
            self._flush()
        most_bytes = _RECEIVE_BYTES if self._handshake is None else handshake.MOST_BYTES
        messages: list[bytearray] = []
        try:
            while True:
                if self._large is not None:
                    if not self._receive_large(messages):
                        break
                    continue
                data = self._socket.recv(most_bytes)
                if not data:
                    break
                self._incoming += data
                messages += self._whole()
                if self._handshake is not None:
                    return messages  # a stranger never keeps us here
                if len(data) < most_bytes and self._large is None:
                    return messages
        except BlockingIOError:
            return messages
        except OSError:  # reset: as good as ended
            pass
        self._hung_up()
        return messages

    def _receive_large(self, messages: list[bytearray]) -> bool:
        """Some of it; False: the peer is gone."""
        message, start = self._large
        num_bytes = self._socket.recv_into(memoryview(message)[start:])
        if start + num_bytes < len(message):
            self._large = message, start + num_bytes
        else:
            self._large = None
            messages.append(message)
        return num_bytes > 0

    def _whole(self) -> list[bytearray]:
        """Take the messages that are whole out of what has come."""
        incoming, messages, start = self._incoming, [], 0
        while len(incoming) - start >= _PREFIX.size and not self.has_ended:
            ours, num_bytes = _PREFIX.unpack_from(incoming, start)
            if ours != _OURS:
                self.turn_away("it speaks something else")
                break
            if num_bytes > self._most_bytes:
                self.turn_away(f"its message is of over {self._most_bytes:,} bytes")
                break
            first = start + _PREFIX.size
            here = len(incoming) - first
            if here < num_bytes:
                if num_bytes > _RECEIVE_BYTES:
                    message = bytearray(num_bytes)
                    message[:here] = memoryview(incoming)[first:]
                    self._large, start = (message, here), len(incoming)
                break
            start = first + num_bytes
            message = incoming[first:start]
            if self._handshake is None:
                messages.append(message)
            else:
                self._shake_hands(message)
        del incoming[:start]
        return messages

    # ---- the handshake --------------------------------------------------------------------------

    def _shake_hands(self, message: bytearray) -> None:
        shaking = self._handshake
        try:
            answer = shaking.take(message)
        except Refused as error:
            if error.answer:
                self._put_out(error.answer)
            self.is_refused = error.is_final
            self.turn_away(str(error))
            return
        if shaking.is_done and self._listener is not None:
            if not self._listener.takes(self):
                self.turn_away("who was waited for has come already")
                return
            self.carries = self._listener.carries or shaking.purpose
        if answer:
            self._put_out(answer)
        if shaking.is_done:
            self._handshake = None
            self._most_bytes = _MOST_BYTES.get(shaking.purpose, handshake.MOST_BYTES)
            self.sources.is_over(self)
            self._outgoing.extend(self._held_back)
            self._held_back.clear()
            self._flush()

    def turn_away(self, why: str) -> None:
        """Close it for what the peer said, or did not say."""
        if self.has_ended:
            return
        self.refusal = why
        if self._listener is not None:
            self.sources.turned_away.note(self._listener.name, self._peer, why)
        self.close()

    def _hung_up(self) -> None:
        if self._handshake is not None:
            self.turn_away("it hung up before it had proved itself")
        self.close()

    # ---- the end --------------------------------------------------------------------------------

    def close(self, wait_s: float = 0.0) -> None:
        """Waits so long at most until the peer has received everything."""
        if self.has_ended:
            return
        self.has_ended = True
        self.sources.is_over(self)
        self.sources.remove(self._socket.fileno())
        if self._pump is not None:
            self._pump.close()
        with contextlib.suppress(OSError), self._socket:
            if wait_s:
                self._see_off(time.monotonic() + wait_s)
        self._outgoing.clear()
        self._waits_for_room = False

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


def _framed(*messages: bytes) -> memoryview:
    prefixed = [_PREFIX.pack(_OURS, len(message)) + message for message in messages]
    return memoryview(b"".join(prefixed))


def _name_of_peer(connected: socket.socket) -> str:
    if connected.family == socket.AF_UNIX:
        return "a process of this machine"
    try:
        return _plain(connected.getpeername()[0])
    except OSError:  # gone already
        return "somebody"


def _plain(host: str) -> str:
    """An IPv4 address as such, where a socket of IPv6 took it in."""
    return host.removeprefix("::ffff:")
