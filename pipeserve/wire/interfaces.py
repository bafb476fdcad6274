"""This machine's network interfaces, and their addresses."""

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915


def address_of_interface(name: str) -> str | None:
    """None: it has no address."""
    return _ipv4_of(name) or _ipv6_of(name)


def interface_of(address: str) -> str | None:
    """That has this address, as far as is known."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if address_of_interface(name) == address), None)


def _ipv4_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, request)
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def _ipv6_of(interface: str) -> str | None:
    """The first that reaches beyond its link."""
    try:
        lines = Path("/proc/net/if_inet6").read_text("ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        digits, *_, name = line.split()
        address = ipaddress.IPv6Address(int(digits, 16))
        if name == interface and not (address.is_link_local or address.is_loopback):
            return str(address)
    return None
