"""The one port that keepers and their stages come to, and what they say there."""

import secrets
import socket
import time
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from pipeserve.addresses import join_address, split_address
from pipeserve.configs import RunConfig
from pipeserve.errors import ConfigError
from pipeserve.wire import control
from pipeserve.wire.connection import Connection
from pipeserve.wire.listener import Listener, is_loopback, is_wildcard
from pipeserve.wire.secret import control_secret
from pipeserve.wire.sources import Descriptor, Sources
from pipeserve.wire.strangers import TurnedAway

_DECODE = {
    "keeper": control.decode_keeper_hello,
    "stage": control.decode_stage_hello,
    "words of a keeper": control.decode_from_keeper,
    "words of a stage": control.decode_from_stage,
}
"""By what a connection carries: that of one who has not said yet who it is, nothing but that."""


class Heard(NamedTuple):
    """One message."""

    message: control.ToDriver
    epoch: int
    source: Connection
    at_s: float


class Port:
    """Of one driver."""

    def __init__(self, config: RunConfig) -> None:
        """At `config.control`, by default a free port of this machine.

        Raises ConfigError when the address is busy, or reached from beyond this machine without a
        secret.
        """
        host, port = split_address(config.control) if config.control else ("127.0.0.1", 0)
        self.secret = _find_secret(config, host)
        self._sources = Sources(self.secret)
        try:
            self._listener = _listen(host, port, self._sources)
        except BaseException:
            self._sources.close()
            raise
        self.local_name = self._listener.local_name
        """To this machine."""
        self.address = config.control or self.address_here
        """To all machines."""

    @property
    def address_here(self) -> str:
        """Of this machine, for those who are started on it."""
        host = self._listener.host
        if is_wildcard(host):
            host = "::1" if ":" in host else "127.0.0.1"
        return join_address(host, self._listener.port)

    @property
    def turned_away(self) -> TurnedAway:
        """Strangers, and others who do not belong here."""
        return self._sources.turned_away

    def wake_on(self, descriptor: int) -> None:
        """`heard` returns, too, when this can be read from."""
        Descriptor(descriptor, self._sources, "of somebody else")

    def heard(self, timeout_s: float, for_urgent: bool = False) -> Iterator[Heard]:
        """All that has come, waiting at most so long for the first of it, or for what is urgent."""
        for source in self._sources.ready(timeout_s * 1000, for_urgent):
            payloads = source.receive()
            at_s = time.monotonic()
            for payload in payloads:
                try:
                    epoch, message = _DECODE[source.carries](payload)
                except (msgspec.DecodeError, RecursionError):  # of a list in a list in a list
                    source.turn_away("what it says is not understood")
                    break
                yield Heard(message, epoch, source, at_s)

    def close(self) -> None:
        """And every connection that came to it."""
        self._sources.close()


def _find_secret(config: RunConfig, host: str) -> bytes:
    """The secret that was given, or a random one that the keepers started here get; empty: none."""
    given = control_secret(config.control_secret)
    if given is not None:
        return given
    try:
        can_tell = config.launcher != "external" and is_loopback(host)
    except OSError:  # a name that nobody knows: `listen` says so
        can_tell = False
    return secrets.token_bytes(32) if can_tell else b""


def _listen(host: str, port: int, sources: Sources) -> Listener:
    """For keepers and stages. Raises ConfigError when the address is busy, not here, or reached
    from beyond this machine without a secret."""
    place = join_address(host, port)
    try:
        return Listener(host, sources, ("keeper", "stage"), port)
    except ConfigError as error:
        raise ConfigError(f"--control {error}") from None
    except socket.gaierror as error:
        raise ConfigError(f"--control {place}: {error.strerror}") from None
    except OSError as error:
        reason = error.strerror.partition(" (")[0]
        raise ConfigError(
            f"--control {place}: {reason}; choose another address or port, "
            "or leave --control out to take any free one"
        ) from None
