"""Connections: whole messages in order, whatever the kernel makes of them, and nobody waits."""

import os
import socket
import threading
import time

import pytest
from on_the_wire import connected_by_hand, framed

from pipeserve.wire.connecting import connect
from pipeserve.wire.listener import Listener
from pipeserve.wire.sources import Sources

PREFIX = 8
SECRET = b"of this run"


def listening(sources):
    return Listener("127.0.0.1", sources, ("stage",)).address


def by_tcp(address):
    """As whoever is on another machine takes it."""
    return address.partition("/")[0]


def opened(address, ours, theirs):
    """Both ends of a connection: that of who listens, and of who connects to `address`."""
    there, here = connect(address, theirs, "stage"), None
    there.send(b"it is open")
    while here is None:
        for source in [*ours.ready(0), *theirs.ready(0)]:
            if source.receive() == [b"it is open"]:
                here = source
    return here, there


@pytest.fixture(params=["local", "tcp"])
def ends(request):
    """Two ends of one connection; each thread of a test has its own."""
    ours, theirs = Sources(SECRET), Sources(SECRET)
    address = listening(ours)
    here, there = opened(address if request.param == "local" else by_tcp(address), ours, theirs)
    yield here, ours, there, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def by_hand():
    """A connection, and a plain socket at its other end, once they have shaken hands."""
    sources = Sources(SECRET)
    here, plain = connected_by_hand(listening(sources), sources, SECRET, "stage")
    yield here, sources, plain
    plain.close()
    sources.close()


def receive(sources, connection, num):
    """The next `num` messages."""
    messages = []
    while len(messages) < num:
        ready = sources.ready(10_000)
        assert ready, f"{len(messages)} of {num} arrived"
        for source in ready:
            got = source.receive()
            assert source is connection or not got
            messages += got
    return messages


def wire_form(messages):
    """What a connection makes of them, as bytes."""
    return b"".join(map(framed, messages))


# ---- framing ----------------------------------------------------------------------------------


def test_messages_come_whole_and_in_order(ends):
    here, ours, there, _ = ends
    sent = [bytes([n % 256]) * (n % 40) for n in range(200)]  # the empty one, too
    for message in sent:
        there.send(message)
    assert receive(ours, here, len(sent)) == sent


def test_cut_anywhere_they_are_the_same(by_hand):
    here, sources, plain = by_hand
    messages = [b"one", b"", b"three" * 3]
    stream = wire_form(messages)
    assert len(stream) == sum(map(len, messages)) + PREFIX * len(messages)
    for cut in range(1, len(stream)):
        plain.sendall(stream[:cut])
        early = []
        assert sources.ready(5000) == [here]
        early += here.receive()
        whole = [stop for stop in (11, 19, 42) if stop <= cut]
        assert len(early) == len(whole)
        plain.sendall(stream[cut:])
        assert early + receive(sources, here, len(messages) - len(early)) == messages


def test_byte_by_byte_they_are_the_same(by_hand):
    here, sources, plain = by_hand
    messages = [b"one", b"", b"three" * 3]
    got = []
    for byte in wire_form(messages):
        plain.sendall(bytes([byte]))
        assert sources.ready(5000) == [here]
        got += here.receive()
    assert got == messages


@pytest.mark.parametrize("num_bytes", [(1 << 16) - PREFIX, 1 << 16, (1 << 17) - PREFIX, 1 << 17])
def test_as_large_as_what_is_received_at_once(ends, num_bytes):
    here, ours, there, _ = ends
    sent = [os.urandom(num_bytes), b"behind it"]
    for message in sent:
        there.send(message)
    assert receive(ours, here, 2) == sent


def test_who_speaks_something_else_is_hung_up_on(by_hand):
    here, sources, plain = by_hand
    plain.sendall(wire_form([b"fine"]) + b"GET / HTTP/1.1\r\n\r\n")
    assert receive(sources, here, 1) == [b"fine"]
    assert here.has_ended
    plain.settimeout(5)
    assert plain.recv(10) == b""


# ---- nobody waits -----------------------------------------------------------------------------


def test_both_ends_send_more_than_the_kernel_takes(ends):
    """Each has sent all before the other begins to receive."""
    here, ours, there, theirs = ends
    large = os.urandom(24 << 20)
    for end in (here, there):
        end.send(b"before")
        end.send(large)
        end.send(b"behind")
    got = {here: [], there: []}
    deadline = time.monotonic() + 60
    while any(len(of) < 3 for of in got.values()):
        assert time.monotonic() < deadline
        for source in [*ours.ready(10), *theirs.ready(10)]:
            got.get(source, []).extend(source.receive())
    assert got[here] == got[there] == [b"before", large, b"behind"]
    # What there is to wait for now, is a message, and not room for one.
    assert ours.ready(0) == theirs.ready(0) == []


def test_what_was_left_goes_ahead_of_what_is_sent_later(ends):
    here, ours, there, theirs = ends
    sent = [bytes([n]) * (3 << 20) for n in range(8)]
    for message in sent[:4]:
        there.send(message)
    got = here.receive()
    for message in sent[4:]:
        there.send(message)
    while len(got) < len(sent):
        for source in [*ours.ready(10), *theirs.ready(10)]:
            got += source.receive()
    assert got == sent


# ---- the end ----------------------------------------------------------------------------------


def test_the_last_word_arrives_and_then_the_end(ends):
    here, ours, there, theirs = ends
    there.send(b"last word")
    there.close()
    assert there.has_ended
    assert theirs.ready(0) == []
    assert receive(ours, here, 1) == [b"last word"]
    assert not here.has_ended
    assert ours.ready(5000) == [here]
    assert here.receive() == []
    assert here.has_ended


def test_a_close_that_waits_lets_the_last_word_through(ends):
    """However much is ahead of it, and with something unread, which would reset the connection."""
    here, ours, there, _ = ends
    large = os.urandom(24 << 20)
    here.send(b"never read")
    there.send(large)
    there.send(b"last word")
    closing = threading.Thread(target=there.close, kwargs={"wait_s": 30.0})
    closing.start()
    assert receive(ours, here, 2) == [large, b"last word"]
    while not here.has_ended:
        assert ours.ready(5000) == [here]
        here.receive()
    closing.join(10)
    assert not closing.is_alive()


def test_a_close_waits_no_longer_than_it_is_told(ends):
    _, _, there, _ = ends
    there.send(os.urandom(24 << 20))
    there.close(wait_s=0.1)  # nobody receives
    assert there.has_ended


def test_to_say_something_to_one_who_is_gone_is_harmless(ends):
    """What it said before it went is not lost by that."""
    here, ours, there, _ = ends
    here.send(b"never read")
    there.send(b"last word")
    time.sleep(0.01)
    there.close()  # resets the connection
    for _ in range(3):
        here.send(b"anybody?" * 1000)
    assert receive(ours, here, 1) == [b"last word"]
    while not here.has_ended:
        assert ours.ready(5000) == [here]
        assert here.receive() == []
    here.send(b"anybody?")
    assert here.receive() == []
    assert ours.ready(0) == []


def test_who_is_gone_with_something_still_to_send_keeps_nobody_awake(ends):
    here, ours, there, _ = ends
    here.send(os.urandom(24 << 20))
    there.close()
    while not here.has_ended:
        assert ours.ready(5000) == [here]
        here.receive()
    assert ours.ready(0) == []


def test_of_one_that_can_wait_its_end_alone_is_urgent(ends):
    here, ours, there, _ = ends
    here.can_wait()
    later = threading.Timer(0.1, there.send, [b"no hurry"])
    later.start()
    assert ours.ready(400, for_urgent=True) == []
    later.join()
    assert ours.ready(0, for_urgent=True) == [here], "what is there is taken all the same"
    assert here.receive() == [b"no hurry"]
    later = threading.Timer(0.1, there.close)
    later.start()
    assert ours.ready(20_000, for_urgent=True) == [here]
    assert here.receive() == [] and here.has_ended
    later.join()


def test_what_is_left_to_send_to_one_that_can_wait_is_urgent(ends):
    here, ours, there, theirs = ends
    here.can_wait()
    here.send(bytes(24 << 20))
    later = threading.Timer(0.1, receive, [theirs, there, 1])
    later.start()
    assert ours.ready(20_000, for_urgent=True) == [here]
    while later.is_alive():
        for source in ours.ready(10):
            source.receive()


def test_a_name_of_another_machine_is_no_obstacle():
    ours, theirs = Sources(SECRET), Sources(SECRET)
    address = by_tcp(listening(ours))
    here, there = opened(f"{address}/0123456789abcdef", ours, theirs)
    there.send(b"hello")
    assert receive(ours, here, 1) == [b"hello"]
    ours.close()
    theirs.close()


def test_nobody_there_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ConnectionError, match=f"^127.0.0.1:{port} cannot be reached: .*refused"):
        connect(f"127.0.0.1:{port}", Sources(), "stage")


def test_closed_sources_leave_no_file_open():
    before = os.listdir("/proc/self/fd")
    ours, theirs = Sources(), Sources()
    address = listening(ours)
    for _ in range(3):
        connect(address, theirs, "stage")
        connect(by_tcp(address), theirs, "stage")
    for listener in ours.ready(5000):
        listener.receive()
    ours.close()
    theirs.close()
    assert sorted(os.listdir("/proc/self/fd")) == sorted(before)
    ours.close()  # again
