"""All that one thread waits for, at once; and how long for those who have proved nothing."""

import select
import time
from typing import Any, Protocol

from pipeserve.wire.strangers import TurnedAway

PROVE_S = 5.0
"""From connecting to the end of the handshake."""
_MOST_STRANGERS = 128
"""At once; a further one takes the place of the oldest. Keepers and stages that all come at once
are strangers for some milliseconds, and come again if they are displaced."""


class Source(Protocol):
    """One of those that `Sources` waits for."""

    carries: str
    """What its messages are; its owner's word."""

    def receive(self) -> list[Any]:
        """Every message that is here, in order; does not wait."""
        ...

    def close(self) -> None: ...


class Stranger(Protocol):
    """A connection whose peer has proved nothing yet."""

    is_accepted: bool
    """The peer came to us; else we went to it."""

    def turn_away(self, why: str) -> None:
        """End it, and say why on stderr if that is new."""
        ...


class Sources:
    """All that one thread waits for, at once; and what they have in common, the run's secret."""

    def __init__(self, secret: bytes = b"") -> None:
        """Without a secret, whoever knows how to begin may connect, on this machine."""
        self.secret = secret
        self.turned_away = TurnedAway()
        self._epoll = select.epoll()
        self._urgent = select.epoll()
        """The same descriptors; of those that can wait, only their end."""
        self._urgent_events: dict[int, int] = {}
        self._by_descriptor: dict[int, Source] = {}
        self._unproved: dict[Stranger, float] = {}
        """Oldest first, and when the time of its handshake is over."""

    def fileno(self) -> int:
        """Ready to read when something can be received from one of them: so another thread's loop,
        or other sources, may wait for these."""
        return self._epoll.fileno()

    def add(self, source: Source, descriptor: int) -> None:
        self._epoll.register(descriptor, select.EPOLLIN)
        self._urgent.register(descriptor, select.EPOLLIN)
        self._urgent_events[descriptor] = select.EPOLLIN
        self._by_descriptor[descriptor] = source

    def can_wait(self, descriptor: int) -> None:
        """What comes from it is not urgent; that it has ended is."""
        self._urgent_events[descriptor] = select.EPOLLRDHUP
        self._urgent.modify(descriptor, select.EPOLLRDHUP)

    def remove(self, descriptor: int) -> None:
        del self._by_descriptor[descriptor], self._urgent_events[descriptor]
        self._epoll.unregister(descriptor)
        self._urgent.unregister(descriptor)

    def wait_for_room(self, descriptor: int, wanted: bool) -> None:
        """Whether it is ready, too, when the kernel takes more to send."""
        room = select.EPOLLOUT if wanted else 0
        self._epoll.modify(descriptor, select.EPOLLIN | room)
        self._urgent.modify(descriptor, self._urgent_events[descriptor] | room)

    def ready(self, timeout_ms: float | None, for_urgent: bool = False) -> list[Source]:
        """Those that something can be received from, waiting for the first; None: however long.
        `for_urgent`: where nothing is there, it waits for what is urgent alone."""
        timeout_s = None if timeout_ms is None else timeout_ms / 1000
        if self._unproved:
            timeout_s = self._no_longer_than_they_have(timeout_s)
        if for_urgent:
            found = self._epoll.poll(0) or self._urgent.poll(timeout_s)
        else:
            found = self._epoll.poll(timeout_s)
        ready = [self._by_descriptor[number] for number, _ in found]
        if self._unproved:
            self._turn_away_who_is_late()
        return ready

    def _no_longer_than_they_have(self, timeout_s: float | None) -> float:
        """To prove themselves."""
        left_s = max(next(iter(self._unproved.values())) - time.monotonic(), 0.0)
        return left_s if timeout_s is None else min(left_s, timeout_s)

    def _turn_away_who_is_late(self) -> None:
        """Whatever it has just said: a byte now and then gains no time."""
        now = time.monotonic()
        late = [connection for connection, late_s in self._unproved.items() if late_s <= now]
        for connection in late:
            connection.turn_away(f"nothing that begins a conversation in {PROVE_S:g} s")

    def begins(self, connection: Stranger) -> None:
        """Its handshake does. The oldest stranger goes when there are too many."""
        self._unproved[connection] = time.monotonic() + PROVE_S
        if len(self._unproved) > _MOST_STRANGERS:
            self.drop_a_stranger(f"over {_MOST_STRANGERS} strangers at once")

    def is_over(self, connection: Stranger) -> None:
        """Its handshake is, either way."""
        self._unproved.pop(connection, None)

    def drop_a_stranger(self, why: str) -> bool:
        """The oldest, if there is one."""
        strangers = (connection for connection in self._unproved if connection.is_accepted)
        oldest = next(strangers, None)
        if oldest is not None:
            oldest.turn_away(why)
        return oldest is not None

    def close(self) -> None:
        """And every source."""
        for source in set(self._by_descriptor.values()):
            source.close()
        self._epoll.close()
        self._urgent.close()
        self.turned_away.sum_up()


class Descriptor:
    """A file descriptor among the sources, that brings no messages: it is ready, or it is not."""

    def __init__(self, descriptor: int, sources: Sources, carries: str) -> None:
        self.carries = carries
        self._descriptor, self._sources = descriptor, sources
        sources.add(self, descriptor)

    def receive(self) -> list[Any]:
        return []

    def close(self) -> None:
        """It stays open."""
        self._sources.remove(self._descriptor)
