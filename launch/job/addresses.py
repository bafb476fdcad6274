"""By which of its addresses a machine is reached by the others of a job."""

import ipaddress
import socket

from pipeserve.errors import ConfigError
from pipeserve.wire.interfaces import address_of_interface
from pipeserve.wire.listener import is_loopback

_ELSEWHERE = ("192.0.2.1", "2001:db8::1")
"""Of documentation: nobody is there, and nothing is sent."""


def address_of(interface: str) -> str:
    """Of an interface of this machine, by name, or the address that was given itself. Raises
    ConfigError."""
    try:
        return str(ipaddress.ip_address(interface))
    except ValueError:
        pass
    names = _interfaces()
    if interface not in names:
        raise ConfigError(f"--interface {interface}: there are {', '.join(names)} here")
    address = address_of_interface(interface)
    if address is None:
        raise ConfigError(f"--interface {interface} has no address; bring it up, or give another")
    return address


def leaders_address(name: str) -> str:
    """Of this machine, which the others know by `name`: what that stands for, or, where a name
    stands for something else here, such as 127.0.1.1 or the outside of a NAT, the address that
    this machine reaches others from; without a route to others, its only one. Raises
    ConfigError."""
    candidates = [*_addresses_of(name), *map(_source_towards, _ELSEWHERE), _only_address()]
    for address in candidates:
        if address and not is_loopback(address) and _is_own(address):
            return address
    raise ConfigError(
        f"{name or socket.gethostname()} is none of this machine's addresses that others could "
        "reach; give --interface, a network interface or an address"
    )


def names_this_machine_alone(name: str) -> bool:
    """`localhost` and its like, whatever machine says it."""
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _addresses_of(name: str) -> list[str]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM) if name else []
    except OSError:
        return []
    return [str(place[0]) for *_, place in found]


def _is_own(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _source_towards(address: str) -> str:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _only_address() -> str:
    """Beside loopback's; empty where there are several."""
    own = [address for address in map(address_of_interface, _interfaces()) if address]
    others = [address for address in own if not is_loopback(address)]
    return others[0] if len(others) == 1 else ""


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]
