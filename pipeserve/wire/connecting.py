"""Reaching a listener: by a local socket on its own machine, by TCP from any other."""

import socket
import time

from pipeserve.addresses import split_address
from pipeserve.wire.connection import Connection
from pipeserve.wire.sources import PROVE_S, Sources

_CONNECT_S = 10.0


def connect(address: str, sources: Sources, purpose: str) -> Connection:
    """The other end of a connection to the listener at `address` (HOST:PORT/NAME or HOST:PORT).

    Raises ConnectionError when it cannot be reached within 10 seconds.
    """
    place, _, name = address.partition("/")
    return Connection(_local(name) or _tcp(place), sources, purpose)


def connected(address: str, sources: Sources, purpose: str) -> Connection:
    """As `connect`, and waits until both have proved themselves. Nothing else is among `sources`.

    Raises ConnectionError when that takes over 10 seconds, too.
    """
    until_s = time.monotonic() + _CONNECT_S
    while True:
        connection = connect(address, sources, purpose)
        while not (connection.is_open or connection.has_ended):
            for source in sources.ready(PROVE_S * 1000):
                source.receive()
        if connection.is_open:
            return connection
        if connection.is_refused or time.monotonic() > until_s:
            raise ConnectionError(f"{address.partition('/')[0]} hung up: {connection.refusal}")
        time.sleep(0.05)  # it was displaced, where many come at once


def _local(name: str) -> socket.socket | None:
    """None: no one of this name is on this machine."""
    if not name:
        return None
    connected = socket.socket(socket.AF_UNIX)
    try:
        connected.connect(f"\0{name}")
    except OSError:
        connected.close()
        return None
    return connected


def _tcp(place: str) -> socket.socket:
    try:
        return socket.create_connection(split_address(place), _CONNECT_S)
    except OSError as error:
        raise ConnectionError(f"{place} cannot be reached: {error}") from None
