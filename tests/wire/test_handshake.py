"""Each side proves that it has the secret, and the secret does not cross the wire."""

import contextlib
import hmac

import msgspec
import pytest

from pipeserve.wire import handshake
from pipeserve.wire.handshake import Connecting, Listening, Refused

SECRET = b"of this run, and long"


def ends(theirs=SECRET, ours=SECRET, purpose="keeper", purposes=("keeper", "stage")):
    return Connecting(theirs, (purpose,)), Listening(ours, purposes)


def shake(there, here):
    """Everything that crosses the wire."""
    said = [there.hello()]
    for end in (here, there, here, there):
        said.append(end.take(said[-1]))
    return said


def nonce_of(message):
    """Of a hello or a challenge, where it comes last."""
    return msgspec.msgpack.decode(message)[-1]


def proof(secret, direction, hello, connecting, listening):
    """As whoever has `secret` can make it."""
    said = msgspec.msgpack.encode((direction, msgspec.Raw(hello), connecting, listening))
    return msgspec.msgpack.encode(("_Proof", hmac.digest(secret, said, "sha256")))


def test_both_are_done_and_know_what_for():
    there, here = ends()
    assert shake(there, here)[-1] == b""
    assert there.is_done and here.is_done
    assert here.purpose == there.purpose == "keeper"


@pytest.mark.parametrize("secret", [SECRET, b"twelve bytes", b""])
def test_the_secret_never_crosses_the_wire_and_no_two_runs_are_alike(secret):
    first, second = (shake(*ends(secret, secret)) for _ in range(2))
    assert not secret or all(secret not in message for message in first)
    assert all(len(message) <= handshake.MOST_BYTES for message in first)
    assert all(one != other for one, other in zip(first[:-1], second[:-1], strict=True))


@pytest.mark.parametrize(
    ("theirs", "ours"), [(b"another", SECRET), (b"", SECRET), (SECRET, b""), (SECRET[:-1], SECRET)]
)
def test_another_secret_is_told_to_both(theirs, ours):
    there, here = ends(theirs, ours)
    proof = there.take(here.take(there.hello()))
    with pytest.raises(Refused, match=r"secrets differ; .* --control-secret FILE") as refused:
        here.take(proof)
    with pytest.raises(Refused, match="secrets differ") as told:
        there.take(refused.value.answer)
    assert told.value.is_final
    assert not (there.is_done or here.is_done)


def test_who_listens_has_to_prove_it_too():
    """Somebody at the driver's port who takes any proof."""
    there, _ = ends()
    fake = Listening(b"guessed", ("keeper",))
    hello = there.hello()
    challenge = fake.take(hello)
    there.take(challenge)
    with pytest.raises(Refused, match="secrets differ"):
        there.take(proof(b"guessed", "listens", hello, nonce_of(hello), nonce_of(challenge)))


def test_a_proof_that_was_overheard_is_good_for_nothing_else():
    there, here = ends()
    said = shake(there, here)
    again = Listening(SECRET, ("keeper",))
    again.take(said[0])
    with pytest.raises(Refused, match="secrets differ"):
        again.take(said[2])


def test_who_connects_cannot_have_its_proof_made_by_who_listens():
    """Its own nonces, sent back to it: the two directions have other digests."""
    here, there = Listening(SECRET, ("keeper",)), Connecting(SECRET, ("keeper",))
    hello = there.hello()
    challenge = here.take(hello)
    nonces = nonce_of(hello), nonce_of(challenge)
    with pytest.raises(Refused, match="secrets differ"):
        here.take(proof(SECRET, "listens", hello, *nonces))
    here.take(proof(SECRET, "connects", hello, *nonces))
    assert here.is_done


def test_another_version_is_told_to_who_has_the_secret_and_to_nobody_else(monkeypatch):
    for secret, reason in (
        (SECRET, r"runs pipeserve 9\.9, .*; install the same"),
        (b"", "secrets"),
    ):
        there, here = ends(theirs=secret)
        with monkeypatch.context() as patch:
            patch.setattr(handshake, "__version__", "9.9")
            hello = there.hello()
        with pytest.raises(Refused, match=reason):
            here.take(there.take(here.take(hello)))


def test_another_protocol_is_another_version(monkeypatch):
    there, here = ends()
    with monkeypatch.context() as patch:
        patch.setattr(handshake, "PROTOCOL", 7)
        hello = there.hello()
    with pytest.raises(Refused, match="install the same"):
        here.take(there.take(here.take(hello)))


@pytest.mark.parametrize("purpose", ["tokens", "activations", "", "x" * 500])
def test_a_port_is_for_what_it_is_for(purpose):
    there, here = ends(purpose=purpose)
    with pytest.raises(Refused, match="which nobody waits for here"):
        here.take(there.take(here.take(there.hello())))


ODD = [
    b"",
    b"\x00" * 40,
    b"\xc1",
    b"GET / HTTP/1.1",
    msgspec.msgpack.encode(("_Hello", 1)),
    msgspec.msgpack.encode(("_Hello", 1, "0.1.0", "keeper", b"short")),
    msgspec.msgpack.encode(("_Hello", "1", "0.1.0", "keeper", b"n" * 32)),
    msgspec.msgpack.encode(("_Challenge", b"n" * 32)),
    msgspec.msgpack.encode(("_Proof", b"d" * 32)),
    msgspec.msgpack.encode(("_Refusal", "no")),
    msgspec.msgpack.encode({"_Hello": 1}),
    msgspec.msgpack.encode([[[[[[]]]]]]),
]


@pytest.mark.parametrize("message", ODD)
def test_who_begins_otherwise_is_refused(message):
    with pytest.raises(Refused):
        Listening(b"", ("keeper",)).take(message)


@pytest.mark.parametrize("message", [m for m in ODD if b"_Challenge" not in m])
def test_who_answers_otherwise_is_refused(message):
    there = Connecting(b"", ("keeper",))
    there.hello()
    with pytest.raises(Refused):
        there.take(message)


def test_no_step_comes_twice():
    there, here = ends()
    hello = there.hello()
    challenge = here.take(hello)
    with pytest.raises(Refused):
        here.take(hello)
    there.take(challenge)
    with pytest.raises(Refused):
        there.take(challenge)


def test_what_a_stranger_says_does_not_steer_a_terminal():
    there = Connecting(b"", ("keeper",))
    there.hello()
    with pytest.raises(Refused) as refused:
        there.take(msgspec.msgpack.encode(("_Refusal", "\x1b[2Jno\n")))
    assert str(refused.value) == "[2Jno"


def test_a_list_in_a_list_in_a_list_is_no_traceback():
    """It is skipped behind what is known, and uses up Python's recursion limit."""
    hello = msgspec.msgpack.encode(("_Hello", 1, "", "keeper", bytes(32)))
    nested = b"\x96" + hello[1:] + b"\x91" * (handshake.MOST_BYTES - len(hello) - 1) + b"\xc0"
    assert len(nested) <= handshake.MOST_BYTES

    def read(depth):
        return read(depth - 1) if depth else Listening(SECRET, ("keeper",)).take(nested)

    with contextlib.suppress(Refused):  # newer Pythons count it apart, and read it
        read(200)
