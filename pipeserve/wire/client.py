"""What a driver and a client in another process say to each other (`frontend/client.py`, on a
socket): one msgspec schema, as in control.py.

The client listens, for it starts the driver's process; the first message is the driver's.
"""

import msgspec

from pipeserve.configs import RunConfig
from pipeserve.core.nouns import Output, Request
from pipeserve.core.view import Limits

PURPOSE = "client"
"""Of the connection, as the handshake has it."""


class _Message(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=True):
    """As in control.py: an array that begins with the message's name."""


# ---- client -> driver ---------------------------------------------------------------------------


class Submit(_Message):
    """Queue requests, all of them or none. Their ids are the client's own, and used once."""

    requests: list[Request]


class Abort(_Message):
    """End a request. It gets no `Output` any more but what is on its way."""

    request_id: int
    reason: str


# ---- driver -> client ---------------------------------------------------------------------------


class Progress(_Message):
    """How far the stages are with starting, in words."""

    text: str


class StageAt(_Message):
    """Where a stage runs."""

    stage: int
    rank: int
    host: str
    pid: int


class Opened(_Message):
    """The pipeline is up. What a client has to know of it."""

    config: RunConfig
    limits: Limits
    model_folder: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class Came(_Message):
    """What became known, in order."""

    outputs: list[Output]


class Refused(_Message):
    """None of the requests of one `Submit` was queued."""

    request_ids: list[int]
    reason: str


class Status(_Message):
    """How the pipeline does; told once a second at least, so that its silence means something."""

    stalled_s: float
    """How long the stages have owed a result and given none; 0 where they owe none."""
    trouble: str
    """Why the stages take no steps now, after a loss; empty: they do."""
    where: list[StageAt]
    """The stages; one that was lost is there until the next is ready."""
    figures: dict[str, float]
    """Of the engine: see `driver/serving.py`."""
    stages: list[dict[str, float]]
    """Of each stage."""


class Ended(_Message):
    """The driver's last word."""

    reason: str
    is_user_error: bool
    """The arguments or the model are wrong."""


ToDriver = Submit | Abort
ToClient = Progress | Opened | Came | Refused | Status | Ended

encode = msgspec.msgpack.Encoder().encode
decode_for_driver = msgspec.msgpack.Decoder(ToDriver).decode
decode_for_client = msgspec.msgpack.Decoder(ToClient).decode
