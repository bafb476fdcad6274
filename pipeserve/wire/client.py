"""What a driver and a client in another process say to each other (`frontend/client.py`, on a
socket): one msgspec schema, as in control.py.

The client listens, for it starts the driver's process; the first message is the driver's.
"""

import msgspec

from pipeserve.configs import RunConfig
from pipeserve.core.nouns import Output, Request
from pipeserve.core.view import Limits
from pipeserve.wire.message import Message

PURPOSE = "client"
"""Of the connection, as the handshake has it."""


# ---- client -> driver ---------------------------------------------------------------------------


class Submit(Message):
    """Queue requests, all of them or none. Their ids are the client's own, and used once."""

    requests: list[Request]


class Abort(Message):
    """End a request. It gets no `Output` any more but what is on its way."""

    request_id: int
    reason: str


# ---- driver -> client ---------------------------------------------------------------------------


class Progress(Message):
    """How far the stages are with starting, in words."""

    text: str


class StageAt(Message):
    """Where a stage runs."""

    stage: int
    rank: int
    host: str
    pid: int
    num_losses: int = 0
    """How often it was lost so far."""


class Opened(Message):
    """The pipeline is up. What a client has to know of it."""

    config: RunConfig
    limits: Limits
    model_folder: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class Came(Message):
    """What became known, in order."""

    outputs: list[Output]


class Refused(Message):
    """None of the requests of one `Submit` was queued."""

    request_ids: list[int]
    reason: str


STEP_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10)
"""Buckets of a microbatch's seconds on a stage, by their upper ends."""
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Of its tokens."""


class Distribution(Message):
    """How many values came to lie in each bucket, and beyond the last; and what they sum to."""

    counts: list[int]
    sum: float


class StageFigures(Message):
    """What one stage did since the driver began."""

    seconds: dict[str, float]
    """By what it did: "computing", or stood idle for a cause (docs/timeline.md)."""
    steps: Distribution
    """Seconds of its microbatches, in the buckets of `STEP_S`."""
    tokens: Distribution
    """Theirs, in those of `STEP_TOKENS`."""
    predicted_s: float
    """By the cost model, all microbatches together; 0 without one."""
    measured_s: float
    """Of the same microbatches."""
    off_s: float
    """By how much their predictions were off, whichever way."""


class Status(Message):
    """How the pipeline does; told once a second at least, so that its silence means something."""

    stalled_s: float
    """How long the stages have owed a result and given none; 0 where they owe none."""
    trouble: str
    """Why the stages take no steps now, after a loss; empty: they do."""
    where: list[StageAt]
    """The stages; one that was lost is there until the next is ready."""
    figures: dict[str, float]
    """Of the engine: see `driver/serving.py`."""
    stages: list[StageFigures]
    """Of each stage; may be some seconds old, and is empty before the first ones are there."""


class Ended(Message):
    """The driver's last word."""

    reason: str
    is_user_error: bool
    """The arguments or the model are wrong."""


ToDriver = Submit | Abort
ToClient = Progress | Opened | Came | Refused | Status | Ended

encode = msgspec.msgpack.Encoder().encode
decode_for_driver = msgspec.msgpack.Decoder(ToDriver).decode
decode_for_client = msgspec.msgpack.Decoder(ToClient).decode
