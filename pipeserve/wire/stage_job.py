"""What a keeper is told to start, and what it hands to the process that it starts."""

import msgspec

from pipeserve.wire.message import Message


class StartStage(Message):
    """Start this rank's stage process."""

    stage: int
    num_stages: int
    module: str
    """The stage's program, run as `python -m`."""
    work: bytes
    """What that program is to compute, encoded: for `pipeserve.stage.worker` a `ModelShare`."""
    control: str
    """Where the driver listens: /NAME on its own machine. The keeper puts before it what it itself
    reached the driver by."""
    host: str
    """Address on which this stage listens for its neighbours; the keeper puts its own here."""
    traceback: bool
    """Print the traceback of an unexpected error to stderr, too."""
    shard: int = 0
    num_shards: int = 1
    """Of the ranks that share the stage, which one this is."""
    shares_head: bool = False
    """Both ends of the pipeline have the head (`core/head_share.py`)."""
    core_share: tuple[int, int] = (0, 1)
    """Of the ranks that may use the same CPUs, which one this is, and how many they are."""

    @property
    def speaks(self) -> bool:
        """It is the one of them that tells the driver what the stage did (`Topology.speaker`)."""
        return self.shard == 0

    @property
    def samples(self) -> bool:
        """Results come from it."""
        return self.is_last or (self.is_first and self.shares_head)

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1


class ModelShare(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What one stage holds of a checkpoint, and how."""

    model_folder: str
    first_layer: int
    stop_layer: int
    has_embedding: bool
    has_head: bool
    dtype: str
    kv_dtype: str
    device: str
    attention: str
    block_size: int
    """Tokens in a block of its KV."""


class Launch(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """On a stage's standard input, and nowhere else: it holds the secret."""

    job: StartStage
    rank: int
    epoch: int
    secret: bytes
    spans: int
    """A descriptor, that of the `stage/last_spans.py` that it shares with its keeper."""


encode_job = msgspec.msgpack.Encoder().encode
"""A `Launch`, or the `work` of a `StartStage`."""
decode_launch = msgspec.msgpack.Decoder(Launch).decode
decode_share = msgspec.msgpack.Decoder(ModelShare).decode
