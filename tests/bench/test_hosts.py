"""Hosts on one machine are as several: names, networks, cables, and nothing is left of them."""

import socket
import subprocess
import sys
from pathlib import Path

import hosts
import pytest

pytestmark = pytest.mark.skipif(bool(hosts.why_not()), reason=hosts.why_not() or "there are hosts")

ECHO = (
    "import socket, sys\n"
    "listening = socket.create_server((sys.argv[1], 7000))\n"
    "print('listens', flush=True)\n"
    "while True:\n"
    "    with listening.accept()[0] as came:\n"
    "        came.sendall(came.recv(99))\n"
)
CALL = (
    "import socket, sys\n"
    "with socket.create_connection((sys.argv[1], 7000), 1) as calling:\n"
    "    calling.settimeout(1)\n"
    "    calling.sendall(b'hello')\n"
    "    print(calling.recv(99).decode())\n"
)


def call(host, address):
    return host.run([sys.executable, "-c", CALL, address]).strip()


def namespaces():
    listed = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines()}


def test_two_hosts():
    with hosts.Hosts("left", "right", networks=2) as (left, right):
        assert [host.run(["hostname"]).strip() for host in (left, right)] == ["left", "right"]
        boot_ids = {host.run(["cat", "/proc/sys/kernel/random/boot_id"]) for host in (left, right)}
        assert len(boot_ids) == 2 and socket.gethostname() not in ("left", "right")

        server = right.start([sys.executable, "-c", ECHO, "0.0.0.0"], stdout=subprocess.PIPE)
        assert server.stdout.readline() == b"listens\n"
        assert list(right.running()) == [server.pid] and left.running() == {}
        assert call(left, "right") == call(left, right.addresses[1]) == "hello"

        right.pull_cable()
        with pytest.raises(subprocess.CalledProcessError) as failed:
            call(left, "right")
        assert "timed out" in failed.value.stderr
        assert call(left, right.addresses[1]) == "hello"
        right.plug_in()
        assert call(left, "right") == "hello"
        late = left.start(["sleep", "60"])
    assert server.stdout.read() == b""
    assert {server.wait(), late.wait()} == {-9}
    assert not {left.namespace, right.namespace} & namespaces()


def test_those_of_a_process_that_was_killed_are_removed():
    make = (
        "import hosts, sys, time\n"
        "with hosts.Hosts('orphan') as (orphan,):\n"
        "    sleeping = orphan.start(['sleep', '60'])\n"
        "    while not orphan.running():\n"
        "        time.sleep(0.01)\n"
        "    print(orphan.namespace, sleeping.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    folder = hosts.__file__.rpartition("/")[0]
    killed = subprocess.Popen([sys.executable, "-c", make], cwd=folder, stdout=subprocess.PIPE)
    namespace, sleeping = killed.stdout.readline().decode().split()
    killed.kill()
    killed.wait()
    with hosts.Hosts("other"):
        assert namespace not in namespaces()
    gone = Path(f"/proc/{sleeping}/cmdline")  # or dead, and nobody has asked how it ended
    assert not gone.exists() or gone.read_bytes() == b""
