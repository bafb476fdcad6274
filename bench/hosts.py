"""Several hosts on one machine: network namespaces, joined by a switch, each with its own name.

    with Hosts("left", "right") as hosts:
        left, right = hosts
        server = left.start(["python", "-m", "http.server", "--bind", left.address])
        right.run(["curl", f"http://left:8000"])
        left.pull_cable()       # nothing reaches it, and nobody is told
        left.plug_in()
        hosts.delay(0.005)      # every packet takes so long, either way
        assert not right.running()

Each host has its addresses, ports, local sockets, host name and boot id, and knows the others by
name; with `networks=2` it has a second interface, whose network the names do not lead to. Files,
memory and cores are shared, as are process ids: what is started here is signalled as usual. At the
end whatever still runs in a host is killed, and `Hosts` has gone without a trace. It needs root and
iproute2: where hosts cannot be made, `why_not()` says why, for a test to skip by.
"""

import contextlib
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_PREFIX = "pipeserve-"
_ETC = Path("/etc/netns")
"""What lies in the folder of a namespace's name is seen there as if it lay in /etc."""
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_BECOME = (
    'hostname "$0" && file=$(mktemp) && echo "$1" > "$file" && '
    f'mount --bind "$file" {_BOOT_ID} && rm "$file" && shift && exec "$@"'
)
_END_S = 10.0
_LATE = str(Path(__file__).parent / "late_network.py")
_numbers = itertools.count()


@functools.cache
def why_not() -> str:
    """Why there can be no hosts here. Empty: there can."""
    if os.geteuid() != 0:
        return "network namespaces take root"
    missing = [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"no {' and no '.join(missing)} here (Debian: iproute2, util-linux)"
    try:
        with Hosts("probe") as (host,):
            host.run(["true"])
    except subprocess.CalledProcessError as error:
        return f"this machine makes no network namespaces: {(error.stderr or str(error)).strip()}"
    return ""


class Host:
    """One of them."""

    def __init__(self, name: str, namespace: str, addresses: Sequence[str]) -> None:
        self.name = name
        self.namespace = namespace
        self.addresses = addresses
        """In each network."""
        self.boot_id = str(uuid.uuid4())
        self.ahead_s = 0
        """How far its monotonic clock is ahead of the others', in whole seconds; set it before
        anything is started."""
        self._started: list[subprocess.Popen] = []

    @property
    def address(self) -> str:
        """That its name leads to."""
        return self.addresses[0]

    def command(self, command: Sequence[str]) -> list[str]:
        """That runs `command` here."""
        into = ["ip", "netns", "exec", self.namespace, "unshare", "--uts"]
        if self.ahead_s:  # of the command's children: so it is one
            into += ["--time", "--monotonic", str(self.ahead_s), "--kill-child"]
        return [*into, "sh", "-c", _BECOME, self.name, self.boot_id, *command]

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen:
        """A process here: the command's own, as `subprocess.Popen` makes it."""
        process = subprocess.Popen(self.command(command), **options)
        self._started.append(process)
        return process

    def run(
        self, command: Sequence[str], timeout_s: float = 60.0, env: Mapping[str, str] | None = None
    ) -> str:
        """What it prints. Raises CalledProcessError, and TimeoutExpired."""
        done = subprocess.run(
            self.command(command),
            check=True,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=env,
        )
        return done.stdout

    def write_etc(self, name: str, content: str) -> None:
        """A file that commands here find in /etc, from now on; one in a folder hides the others of
        that folder."""
        file = _ETC / self.namespace / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)

    def running(self) -> dict[int, str]:
        """The processes here, by id, with their command lines. A command that has just been started
        may be on its way here still, and one that has been killed may not be gone yet."""
        return _running(self.namespace)

    def left_after(self, wait_s: float) -> dict[int, str]:
        """What still runs, when what does is given so long to end."""
        until_s = time.monotonic() + wait_s
        while (left := self.running()) and time.monotonic() < until_s:
            time.sleep(0.05)
        return left

    def kill_all(self) -> None:
        """As when the machine loses power, but for the kernel, which says goodbye to peers; pull
        its cable first to keep it from that."""
        for process in self._started:  # one that was started just now may be on its way here
            process.kill()
            process.wait()
        _kill_all(self.namespace)

    def pull_cable(self, network: int = 0) -> None:
        """Packets get lost, both ways, until `plug_in`; no connection is told."""
        self._set_port(network, "down")

    def plug_in(self, network: int = 0) -> None:
        self._set_port(network, "up")

    def _set_port(self, network: int, to: str) -> None:
        """Of the switch. The host's own end stays up, and so its addresses and routes stay, too."""
        switch = self.namespace.rpartition("-")[0]
        _ip("-n", switch, "link", "set", f"{self.name}{network}", to)


class Hosts:
    """While it is entered, they are there."""

    def __init__(self, *names: str, networks: int = 1) -> None:
        """Names of at most 10 characters. In network N they are 10.77.N.1, 10.77.N.2 and so on."""
        self._switch = f"{_PREFIX}{os.getpid()}-{next(_numbers)}"
        self._networks = range(networks)
        self._delaying: list[subprocess.Popen] = []
        self._hosts = [
            Host(
                name,
                f"{self._switch}-{name}",
                [f"10.77.{network}.{number}" for network in self._networks],
            )
            for number, name in enumerate(names, 1)
        ]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)

    def __enter__(self) -> "Hosts":
        _remove_abandoned()
        try:
            self._add()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._remove()

    def delay(self, seconds: float, network: int = 0) -> None:
        """Every packet from one of two hosts to the other, from now on."""
        ports = [f"{host.name}{network}" for host in self._hosts]
        for port in ports:
            _ip("-n", self._switch, "link", "set", port, "nomaster")
        into = ["ip", "netns", "exec", self._switch]
        command = [*into, sys.executable, _LATE, *ports, str(seconds)]
        self._delaying.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        self._delaying[-1].stdout.readline()  # it is there

    def _add(self) -> None:
        _ip("netns", "add", self._switch)
        for network in self._networks:
            _ip("-n", self._switch, "link", "add", f"net{network}", "type", "bridge")
            _ip("-n", self._switch, "link", "set", f"net{network}", "up")
        names = "".join(f"{host.address} {host.name}\n" for host in self._hosts)
        for host in self._hosts:
            host.write_etc("hosts", f"127.0.0.1 localhost\n::1 localhost\n{names}")
            _ip("netns", "add", host.namespace)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            for network in self._networks:
                self._connect(host, network)

    def _connect(self, host: Host, network: int) -> None:
        port, interface = f"{host.name}{network}", f"eth{network}"
        inside = ("-n", host.namespace)
        _ip(*inside, "link", "add", interface, "type", "veth", "peer", port, "netns", self._switch)
        _ip(*inside, "address", "add", f"{host.addresses[network]}/24", "dev", interface)
        _ip(*inside, "link", "set", interface, "up")
        _ip("-n", self._switch, "link", "set", port, "master", f"net{network}", "up")

    def _remove(self) -> None:
        for process in self._delaying:
            process.kill()
            process.communicate()
        for host in self._hosts:
            with contextlib.suppress(subprocess.CalledProcessError):  # it was never made
                host.kill_all()
        _remove_namespaces(self._switch)


def _remove_abandoned() -> None:
    """Those of processes that were killed before they could do so."""
    for name in {line.split()[0] for line in _ip("netns", "list").splitlines()}:
        pid = name.removeprefix(_PREFIX).partition("-")[0]
        if name.startswith(_PREFIX) and not Path(f"/proc/{pid}").exists():
            _remove_namespaces(name)


def _running(namespace: str) -> dict[int, str]:
    found = {}
    for pid in map(int, _ip("netns", "pids", namespace).split()):
        with contextlib.suppress(OSError):  # it has ended
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if words != [b""]:  # else it is dead, and nobody has asked how it ended
                found[pid] = b" ".join(words).decode(errors="replace").strip()
    return found


def _kill_all(namespace: str) -> None:
    until_s = time.monotonic() + _END_S
    while (left := _running(namespace)) and time.monotonic() < until_s:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _remove_namespaces(switch: str) -> None:
    """That of a switch, with its cables, and those of its hosts."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        if name == switch or name.startswith(f"{switch}-"):
            with contextlib.suppress(subprocess.CalledProcessError):  # another one was faster
                _kill_all(name)
                _ip("netns", "delete", name)
    for files in _ETC.glob(f"{switch}-*"):
        shutil.rmtree(files, ignore_errors=True)


def _ip(*words: str) -> str:
    """What it prints. Raises CalledProcessError."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
