"""Strangers at the ports: what they do costs their own connection, and is said once."""

import contextlib
import gc
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from on_the_wire import framed

from pipeserve.errors import ConfigError
from pipeserve.wire import connecting, connection, handshake, sources
from pipeserve.wire.connecting import connect, connected
from pipeserve.wire.connection import Connection
from pipeserve.wire.control import KeeperHello, encode
from pipeserve.wire.handshake import Connecting
from pipeserve.wire.listener import Listener, is_loopback, is_wildcard
from pipeserve.wire.sources import Sources
from pipeserve.wire.step_messages import Sampled
from pipeserve.wire.strangers import TurnedAway

SECRET = b"of this run"
ROOT = Path(__file__).resolve().parent.parent.parent


def files():
    return len(os.listdir("/proc/self/fd"))


class Port:
    """A listener, and whoever comes to it."""

    def __init__(self, **options):
        self.sources, self.theirs = Sources(SECRET), Sources(SECRET)
        self.listener = Listener("127.0.0.1", self.sources, ("keeper", "stage"), **options)

    @property
    def counts(self):
        """Who was turned away, by why."""
        return {why: count for (_, _, why), count in self.sources.turned_away.counts.items()}

    def stranger(self, says=b""):
        came = socket.create_connection((self.listener.host, self.listener.port), 5)
        came.sendall(says)
        return came

    def look(self):
        """At all that has come; what those who proved themselves said."""
        got = []
        while ready := self.sources.ready(20):
            for source in ready:
                got += source.receive()
        return got

    def serves(self):
        """One who has the secret is heard, whatever else is there."""
        friend = connect(self.listener.address.partition("/")[0], self.theirs, "stage")
        friend.send(b"hello")
        got = []
        until_s = time.monotonic() + 10
        while not got and time.monotonic() < until_s:
            for source in [*self.sources.ready(1), *self.theirs.ready(1)]:
                got += source.receive()
        return got == [b"hello"]

    def close(self):
        self.sources.close()
        self.theirs.close()


@pytest.fixture
def port():
    port = Port()
    yield port
    port.close()


def is_hung_up_on(stranger):
    stranger.settimeout(5)
    try:
        while stranger.recv(4096):
            pass
    except ConnectionResetError:
        pass
    stranger.close()
    return True


JUNK = {
    "noise": (os.urandom(300), "something else"),
    "much noise": (b"\xff" * (1 << 20), "something else"),
    "a framed junk message": (framed(os.urandom(64)), "something else"),
    "a framed empty message": (framed(b""), "something else"),
    "4 GiB": (struct.pack("<4sI", b"ppsv", 0xFFFFFFFF), "over 1,024 bytes"),
    "a byte too many": (framed(b"x" * 1025), "over 1,024 bytes"),
    "a keeper's hello": (
        framed(encode(KeeperHello(0, 3, "h", "127.0.0.1", 1, "b"), 0)),
        "something else",
    ),
    "a result": (framed(encode(Sampled(0, [1], b"\x01", [], []), 0)), "something else"),
    "TLS": (bytes.fromhex("16030100c8010000c40303") + os.urandom(180), "something else"),
    "HTTP": (b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", "something else"),
    "SSH": (b"SSH-2.0-OpenSSH_9.2\r\n", "something else"),
    "ZeroMQ": (b"\xff" + b"\0" * 8 + b"\x7f\x03" + b"\0" * 53, "something else"),
    "a pickle": (b"\x80\x04\x95" + b"." * 60, "something else"),
}


@pytest.mark.parametrize(("says", "why"), JUNK.values(), ids=JUNK)
def test_junk_costs_its_own_connection(port, capsys, says, why):
    before = files()
    for _ in range(3):
        stranger = port.stranger()
        stranger.setblocking(False)
        with contextlib.suppress(OSError):  # as much as the kernel takes
            stranger.send(says)
        port.look()
        assert is_hung_up_on(stranger)
    assert list(port.counts.values()) == [3]
    assert why in str(port.counts)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("warning: 127.0.0.1 was turned away from")
    assert files() == before
    assert port.serves()


def test_a_guess_at_the_secret_is_refused(port):
    shaking = Connecting(b"a guess", ("keeper",))
    stranger = port.stranger(framed(shaking.hello()))
    port.look()
    challenge = stranger.recv(4096)[8:]
    stranger.sendall(framed(shaking.take(challenge)))
    port.look()
    with pytest.raises(handshake.Refused, match="secrets differ"):
        shaking.take(stranger.recv(4096)[8:])
    assert is_hung_up_on(stranger)
    assert list(port.counts.values()) == [1]
    assert port.serves()


def test_who_comes_and_goes_leaves_nothing(port):
    before = files()
    for says in (b"", b"pps", framed(b"x" * 100)[:50]):
        for linger in (0, 1):
            stranger = port.stranger(says)
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", linger, 0))
            port.look()
            stranger.close()
            port.look()
    assert set(port.counts) == {"it hung up before it had proved itself"}
    assert files() == before


@pytest.mark.parametrize("says", [b"", b"p", b"ppsv", framed(b"x" * 900)[:-1]])
def test_who_says_nothing_is_waited_for_no_longer_than_that(monkeypatch, says):
    monkeypatch.setattr(sources, "PROVE_S", 0.2)
    port = Port()
    stranger = port.stranger(says)
    port.look()
    assert port.sources.ready(400) == [], "it sleeps until then"
    assert is_hung_up_on(stranger)
    assert "in 0.2 s" in str(port.counts)
    port.close()


def test_slow_bytes_gain_no_time(monkeypatch):
    """A slow loris: each byte is a sign of life, and changes nothing."""
    monkeypatch.setattr(sources, "PROVE_S", 0.5)
    port = Port()
    stranger = port.stranger()
    began_s = time.monotonic()
    for byte in framed(b"x" * 900):
        stranger.sendall(bytes([byte]))
        for source in port.sources.ready(20):
            source.receive()
        if port.counts:
            break
        time.sleep(0.02)
    assert 0.4 < time.monotonic() - began_s < 5
    assert is_hung_up_on(stranger)
    assert "in 0.5 s" in str(port.counts)
    port.close()


def test_there_are_so_many_at_once_and_no_more(monkeypatch):
    monkeypatch.setattr(sources, "_MOST_STRANGERS", 5)
    port = Port()
    before = files()
    crowd = [port.stranger() for _ in range(40)]
    port.look()
    assert files() == before + 40 + 5
    assert port.counts == {"over 5 strangers at once": 35}
    assert all(map(is_hung_up_on, crowd[:35]))
    assert port.serves(), "a friend is only displaced by later ones"
    for stranger in crowd[35:]:
        stranger.close()
    port.close()


def test_a_flood_does_not_keep_who_listens(port):
    """Of megabytes that are there it reads the beginning, and hangs up."""
    stranger = port.stranger(framed(b"x" * 1000)[:-10])
    port.look()
    stranger.settimeout(0.2)
    with pytest.raises(TimeoutError):  # the kernel has taken what it takes
        stranger.sendall(b"y" * (64 << 20))
    assert port.serves()
    with pytest.raises(ConnectionError):
        stranger.sendall(b"y" * (64 << 20))
    stranger.close()


def test_no_more_files_is_no_end(monkeypatch):
    """And no busy loop: accept fails and fails, while somebody waits to be let in."""
    port = Port()
    first = port.stranger()
    port.look()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    second, third = (socket.socket() for _ in range(2))
    taken = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files() + 20, hard))
        while True:
            try:
                taken.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                break
        for one in (second, third):
            one.connect((port.listener.host, port.listener.port))
        port.look()
        assert "no more files may be opened" in port.counts
        assert port.sources.ready(0) == []
    finally:
        for number in taken:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert is_hung_up_on(first) and is_hung_up_on(second)
    third.close()
    assert port.serves()
    port.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_port_that_is_dropped_leaves_no_file_open():
    """As of an `LLM` that nobody closes."""
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    Listener("127.0.0.1", Sources(), ("tokens",))
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) <= before


def test_a_link_s_port_is_closed_once_the_neighbour_has_come():
    port = Port(once=True)
    address = port.listener.address.partition("/")[0]
    stranger = port.stranger()
    friend = connect(address, port.theirs, "stage")
    late = connect(address, port.theirs, "stage")
    until_s = time.monotonic() + 5
    while not (friend.is_open and late.has_ended) and time.monotonic() < until_s:
        for source in [*port.sources.ready(1), *port.theirs.ready(1)]:
            source.receive()
    assert {friend.is_open, late.is_open} == {True, False}
    with pytest.raises(OSError, match="refused"):
        port.stranger()
    friend.send(b"hello")
    assert port.look() == [b"hello"]
    stranger.close()
    port.close()


def test_what_is_said_behind_the_proof_is_heard_in_order(port):
    """Held back until both have proved themselves, whatever its size."""
    large = os.urandom(200_000)
    friend = connect(port.listener.address, port.theirs, "stage")
    for message in (b"one", large, b"three"):
        friend.send(message)
    got = []
    while len(got) < 3:
        for source in [*port.sources.ready(1), *port.theirs.ready(1)]:
            got += source.receive()
            if isinstance(source, Connection) and source.is_open:
                assert source.carries == "stage"
    assert got == [b"one", large, b"three"]


def test_a_friend_who_says_too_much_is_hung_up_on(monkeypatch, port, capsys):
    monkeypatch.setitem(connection._MOST_BYTES, "stage", 5000)
    friend = connect(port.listener.address, port.theirs, "stage")
    friend.send(b"x" * 5001)
    until_s = time.monotonic() + 5
    while not friend.has_ended and time.monotonic() < until_s:
        for source in [*port.sources.ready(1), *port.theirs.ready(1)]:
            assert source.receive() == []
    assert friend.has_ended
    assert "over 5,000 bytes" in capsys.readouterr().err


def test_who_is_called_and_is_no_driver():
    """Something else has the port: it says so, and does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sources = Sources()
        there = connect("{}:{}".format(*server.getsockname()), sources, "keeper")
        accepted, _ = server.accept()
        accepted.sendall(b"220 mail.example ESMTP\r\n")
        while not there.has_ended:
            for source in sources.ready(5000):
                source.receive()
        accepted.close()
    assert there.refusal == "it speaks something else"
    assert not there.is_refused, "another time a driver may be there"


def test_another_secret_is_an_error_that_says_so(port):
    sources = Sources(b"another")
    there = connect(port.listener.address, sources, "keeper")
    while not there.has_ended:
        for source in [*port.sources.ready(1), *sources.ready(1)]:
            source.receive()
    assert there.is_refused and there.refusal.startswith("the secrets differ")
    sources.close()


def test_one_who_waits_for_an_answer_gets_tired(monkeypatch):
    monkeypatch.setattr(sources, "PROVE_S", 0.1)
    monkeypatch.setattr(connecting, "_CONNECT_S", 0.3)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(ConnectionError, match=r"hung up: nothing .* in 0\.1 s"),
    ):
        connected("{}:{}".format(*server.getsockname()), Sources(), "stage")


# ---- where one listens --------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_beyond_this_machine_takes_a_secret(host):
    before = files()
    with pytest.raises(ConfigError, match=r"takes a shared secret: .*--control-secret FILE"):
        Listener(host, Sources(), ("keeper",))
    assert files() <= before + 1, "the epoll of the sources"
    sources = Sources(SECRET)
    listener = Listener(host, sources, ("keeper",))
    assert is_wildcard(listener.host)
    sources.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost"])
def test_this_machine_takes_none(host):
    sources = Sources()
    listener = Listener(host, sources, ("keeper",))
    assert is_loopback(listener.host) and is_loopback(host)
    connect(listener.address.partition("/")[0], sources, "keeper")
    sources.close()


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.1.2.3", "8.8.8.8", "fe80::1", "::ffff:10.0.0.1"]
)
def test_what_is_not_this_machine_alone(host):
    assert not is_loopback(host)


# ---- what is said of them -----------------------------------------------------------------------


def test_each_kind_is_said_once_and_counted(capsys):
    away = TurnedAway()
    for _ in range(1000):
        away.note("here", "10.0.0.1", "noise")
        away.note("here", "10.0.0.2", "noise")
    assert len(capsys.readouterr().err.splitlines()) == 2
    away.sum_up()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "1,000 times in all" in said[0]


def test_many_addresses_fill_neither_memory_nor_the_terminal(capsys):
    away = TurnedAway()
    for number in range(100_000):
        away.note("here", f"10.{number}", "noise")
    assert len(capsys.readouterr().err.splitlines()) == len(away.counts) == 65
    assert sum(away.counts.values()) == 100_000


# ---- a pipeline ---------------------------------------------------------------------------------


@pytest.mark.processes
def test_a_pipeline_serves_on_among_strangers():
    """A short run of bench/strangers.py."""
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "strangers.py", "--num", "1500", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same_tokens"]
    assert sum(found["strangers"].values()) >= 1500
    assert len(found["listening"]) == 2, "a link's port is still open"
    for (files_before, mib_before), (most, _), (files_after, mib_after) in found["usage"].values():
        assert most <= files_before + 130
        assert files_after <= files_before + 130  # of the last few seconds
        assert mib_after < mib_before + 8
