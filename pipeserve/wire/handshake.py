"""What two processes of a pipeline say to each other before anything else: each proves that it has
the run's secret, and the secret never crosses the wire.

    who connects                                    who listens
        Hello(protocol, version, purpose, nonce) ->
                                                 <- Challenge(nonce)
        Proof(keyed digest, "connects")          ->
                                                 <- Proof(keyed digest, "listens"), or Refusal(why)

The digest is HMAC-SHA256 (RFC 2104) under the secret, of everything that was said, both nonces
included, and of the direction: a digest that was overheard is good for no other connection, and
none can be sent back to who made it. Who connects proves first, for it is the listening side that
strangers find: they get no digest to guess secrets by.

It proves who is there when a connection begins; what is said later is neither encrypted nor signed.
Pure: bytes in, bytes out; `Connection` carries them.
"""

import hmac
import secrets
from collections.abc import Collection

import msgspec

from pipeserve import __version__
from pipeserve.wire.message import Message

PROTOCOL = 1
MOST_BYTES = 1024
"""Of one message of the handshake."""
_NONCE_BYTES = 32
_WRONG_SECRET = (
    "the secrets differ; give driver and keepers the same --control-secret FILE or "
    "PIPESERVE_CONTROL_SECRET"
)


class _Hello(Message):
    protocol: int
    version: str
    """Of pipeserve: the messages that follow are read by the same schema, or not at all."""
    purpose: str
    nonce: bytes


class _Challenge(Message):
    nonce: bytes


class _Proof(Message):
    digest: bytes


class _Refusal(Message):
    why: str


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Hello | _Challenge | _Proof | _Refusal).decode


class Refused(Exception):
    """The two do not go together; one line says why. `answer`: what the peer is to be told.
    `is_final`: it would be the same another time."""

    def __init__(self, why: str, answer: bytes = b"", is_final: bool = False) -> None:
        super().__init__(why)
        self.answer, self.is_final = answer, is_final


class Handshake:
    """One side of it."""

    def __init__(self, secret: bytes, purposes: Collection[str]) -> None:
        """`purposes`: what a connection may be for; of the side that connects, the one that it
        is for."""
        self._secret = secret
        self._purposes = purposes
        self._ours = secrets.token_bytes(_NONCE_BYTES)
        self._hello: _Hello | None = None
        self._theirs = b""
        self.is_done = False

    @property
    def purpose(self) -> str:
        """Of the connection, once `is_done`."""
        return self._hello.purpose

    def _digest(self, direction: str, connecting: bytes, listening: bytes) -> bytes:
        said = _encode((direction, self._hello, connecting, listening))
        return hmac.digest(self._secret, said, "sha256")


class Connecting(Handshake):
    """Of the side that connects."""

    def hello(self) -> bytes:
        """The first message."""
        (purpose,) = self._purposes
        self._hello = _Hello(PROTOCOL, __version__, purpose, self._ours)
        return _encode(self._hello)

    def take(self, message: bytes | bytearray) -> bytes:
        """The answer to what came; empty: none. Raises Refused."""
        match _read(message):
            case _Challenge(nonce) if not self._theirs and len(nonce) == _NONCE_BYTES:
                self._theirs = nonce
                return _encode(_Proof(self._digest("connects", self._ours, nonce)))
            case _Proof(digest) if self._theirs:
                if not hmac.compare_digest(
                    digest, self._digest("listens", self._ours, self._theirs)
                ):
                    raise Refused(_WRONG_SECRET, is_final=True)
                self.is_done = True
                return b""
            case _Refusal(why):
                shown = "".join(c for c in why if c.isprintable())  # nobody has proved it
                raise Refused(shown, is_final=True)
        raise Refused("it does not answer as a driver or a stage does")


class Listening(Handshake):
    """Of the side that listens."""

    def take(self, message: bytes | bytearray) -> bytes:
        """The answer to what came. Raises Refused."""
        match _read(message):
            case _Hello() as hello if self._hello is None and len(hello.nonce) == _NONCE_BYTES:
                self._hello, self._theirs = hello, hello.nonce
                return _encode(_Challenge(self._ours))
            case _Proof(digest) if self._hello is not None:
                return self._judge(digest)
        raise Refused("it does not begin as a keeper or a stage does")

    def _judge(self, digest: bytes) -> bytes:
        """Versions come after the proof: ours is nothing for a stranger to know."""
        hello = self._hello
        if not hmac.compare_digest(digest, self._digest("connects", self._theirs, self._ours)):
            raise _refused(_WRONG_SECRET)
        if (hello.protocol, hello.version) != (PROTOCOL, __version__):
            raise _refused(
                f"who connects runs pipeserve {hello.version}, and who listens {__version__}; "
                "install the same on both"
            )
        if hello.purpose not in self._purposes:
            raise _refused(f"it comes as {hello.purpose!r}, which nobody waits for here")
        self.is_done = True
        return _encode(_Proof(self._digest("listens", self._theirs, self._ours)))


def _refused(why: str) -> Refused:
    return Refused(why, _encode(_Refusal(why)))


def _read(message: bytes | bytearray) -> Message:
    try:
        return _decode(message)
    except (msgspec.DecodeError, RecursionError):  # of a list in a list in a list
        raise Refused("it speaks something else") from None
