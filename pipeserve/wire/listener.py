"""Where keepers, stages and neighbours are waited for."""

import errno
import ipaddress
import os
import secrets
import socket
from collections.abc import Collection

from pipeserve.addresses import join_address
from pipeserve.errors import ConfigError
from pipeserve.wire.connection import Connection
from pipeserve.wire.sources import Sources

_BACKLOG = 1024
_MOST_AT_ONCE = 16
"""Taken in between two looks at the others."""
_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)


class Listener:
    """Takes in whoever connects: a `Connection` among the same sources."""

    def __init__(
        self,
        host: str,
        sources: Sources,
        purposes: Collection[str],
        port: int = 0,
        once: bool = False,
        carries: str | None = None,
    ) -> None:
        """On a port of `host`, by default a free one, and under a name that this machine alone
        knows: a message to it takes 30 us less that way. `address` is HOST:PORT/NAME.

        It takes in who has the secret of `sources` and comes for one of `purposes`, which its
        connection carries then (or `carries`, if that is given); `once`: one, and closes.

        Raises OSError, and ConfigError for an address beyond this machine without a secret.
        """
        self.purposes, self.carries = purposes, carries
        self._once = once
        self._taken_in: Connection | None = None
        """The one, where it takes in one."""
        self._sources = sources
        places = _resolve(host, port)
        if not (sources.secret or all(_is_loopback(place[0]) for _, place in places)):
            raise ConfigError(
                f"{join_address(host, port)} can be reached from beyond this machine, which takes "
                "a shared secret: give driver and keepers the same --control-secret FILE (or "
                "PIPESERVE_CONTROL_SECRET), or listen at 127.0.0.1"
            )
        self._tcp = _listen(places)
        self._local = socket.socket(socket.AF_UNIX)
        self.local_name = secrets.token_hex(8)
        self._local.bind(f"\0{self.local_name}")  # "\0": in no file system, gone with its process
        self._local.listen(_BACKLOG)
        self.host, self.port = self._tcp.getsockname()[:2]
        self.name = f"{join_address(self.host, self.port)} ({' and '.join(purposes)})"
        self.address = f"{join_address(self.host, self.port)}/{self.local_name}"
        self._spare = open(os.devnull, "rb")  # noqa: SIM115
        self.is_closed = False
        for listening in (self._tcp, self._local):
            listening.setblocking(False)
            sources.add(self, listening.fileno())

    def receive(self) -> list[bytearray]:
        """Nothing: connections are what comes here."""
        for listening in (self._tcp, self._local):
            for _ in range(_MOST_AT_ONCE):
                if self.is_closed or not self._accept(listening):
                    break
        return []

    def _accept(self, listening: socket.socket) -> bool:
        """One more, if one is there."""
        try:
            accepted, _ = listening.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _OUT_OF_FILES:
                return self._make_room(listening)
            return True  # who was there is gone again
        Connection(accepted, self._sources, "", self)
        return True

    def _make_room(self, listening: socket.socket) -> bool:
        """There is no file descriptor left to take in who waits: the oldest stranger goes, or else
        who waits. Left there, it would be ready for ever, and this process never sleep."""
        if self._sources.drop_a_stranger("no more files may be opened"):
            return True
        self._spare.close()
        try:
            listening.accept()[0].close()
        except OSError:
            pass
        finally:
            self._spare = open(os.devnull, "rb")  # noqa: SIM115
        self._sources.turned_away.note(self.name, "somebody", "no more files may be opened")
        return False

    def takes(self, connection: Connection) -> bool:
        """Whether one that has proved itself is taken in."""
        if self.is_closed:
            return False
        if self._once:
            self._taken_in = connection
            self.close()
        return True

    def hang_up(self) -> None:
        """On the one that it took in, if it was to take in one; or no longer wait for it."""
        self.close()
        if self._taken_in is not None:
            self._taken_in.close()

    def close(self) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        for listening in (self._tcp, self._local):
            self._sources.remove(listening.fileno())
            listening.close()
        self._spare.close()


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches `host`, an address or a name. Raises OSError for a
    name that nobody knows."""
    return all(_is_loopback(place[0]) for _, place in _resolve(host, 0))


def is_wildcard(host: str) -> bool:
    """Whether it stands for all addresses of this machine, and is none to be reached by."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _is_loopback(numeric: str) -> bool:
    address = ipaddress.ip_address(numeric.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _resolve(host: str, port: int) -> list[tuple[int, tuple]]:
    """(family, address) of each, IPv4 first: it is there where IPv6 may not be."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return sorted(
        ((family, place) for family, _, _, _, place in found),
        key=lambda one: one[0] != socket.AF_INET,
    )


def _listen(places: list[tuple[int, tuple]]) -> socket.socket:
    """At the first of them that this machine has."""
    for family, place in places:
        both = family == socket.AF_INET6 and is_wildcard(place[0]) and socket.has_dualstack_ipv6()
        try:
            return socket.create_server(place, family=family, backlog=_BACKLOG, dualstack_ipv6=both)
        except OSError as error:
            failed = error
    raise failed
