"""What driver, keepers and stages say to each other: one fixed msgspec schema, array-encoded.

Each keeper and each stage has a `Connection` to the driver of its own, on which a message costs one
wake-up. Never a socket that drops what it cannot send: drops become hangs.

A request is registered once, with prompt and outputs so far; after that a step names only its new
positions and new blocks.

Every message carries the epoch in which it was said. A pipeline that lost a stage begins a fresh
one: what is said late of an old one finds nobody who listens. Who says something, the connection
knows: each belongs to one rank, whose `KeeperHello` or `StageHello` was first on it.

Activations and sampled tokens do not pass here: see links.py.
"""

from typing import Any

import msgspec

from pipeserve.core.records import Span
from pipeserve.core.work import PartSeconds, Work
from pipeserve.machine import MemoryLimit


class _Message(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=True):
    """Base of all messages: a msgpack array whose first element is the message's name."""


# ---- driver -> keeper ---------------------------------------------------------------------------


class StartStage(_Message):
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
    core_share: tuple[int, int] = (0, 1)
    """Of the ranks that may use the same CPUs, which one this is, and how many they are."""

    @property
    def speaks(self) -> bool:
        """It is the one of them that tells the driver what the stage did (`Topology.speaker`)."""
        return self.shard == 0

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1


class Stop(_Message):
    """End the stage and yourself."""

    has_failed: bool = False
    """The run has ended before it was done."""
    why: str = ""
    """To be said, by one on each machine."""


class NotWanted(_Message):
    """This keeper does not belong to the pipeline: end yourself."""

    why: str


class Heartbeat(_Message):
    """Ask for a sign of life. Of a keeper: `HeartbeatAnswer`, which says what its clock is, too; of
    a stage that has nothing to do: the same message."""

    sent_s: float


# ---- in a StartStage -----------------------------------------------------------------------------


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


# ---- keeper -> stage ----------------------------------------------------------------------------


class Launch(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """On a stage's standard input, and nowhere else: it holds the secret."""

    job: StartStage
    rank: int
    epoch: int
    secret: bytes
    spans: int
    """A descriptor, that of the `stage/last_spans.py` that it shares with its keeper."""


# ---- keeper -> driver ---------------------------------------------------------------------------


class KeeperHello(_Message):
    rank: int
    world_size: int
    host: str
    address: str
    """Of this machine, as the driver's machine can reach it: the stage's links listen there."""
    pid: int
    boot_id: str
    """Of its machine, whose processes share one clock."""
    native_dtypes: tuple[str, ...] = ()
    """What its CPU multiplies natively (`machine.native_dtypes`)."""
    device: str = ""
    """What its stage computes on (`machine.fingerprint`): where that is the same, so are times."""
    cpus: tuple[int, ...] = ()
    """That its launcher lets it use."""


class HeartbeatAnswer(_Message):
    """A heartbeat. None is sent unasked: what a driver that rests does not read would pile up."""

    sent_s: float
    """Of the `Heartbeat`, by the driver's clock."""
    remote_s: float
    """By the keeper's."""
    num_moved: int
    """Of its stage's process, this and all below: what the kernel says (`stage/vital_signs.py`)."""
    ran_s: float
    stood_s: float
    state: str


class LastSpans(_Message):
    """What the keeper's stage had computed last when it ended, whether or not it had told."""

    spans: tuple[Span, ...]


class StageExited(_Message):
    """The process of the keeper's stage has ended."""

    pid: int
    exit_code: int
    """As `subprocess.Popen.returncode`: negative for a signal."""


# ---- driver -> stage ----------------------------------------------------------------------------


class TakeMemory(_Message):
    """Read the weights, and make a pool of so many KV blocks; a stage that has, says so at once."""

    num_blocks: int
    meet_at: tuple[str, ...] = ()
    """HOST:PORT where the ranks of each stage meet, that share it (`StageSized.meets_at`)."""


class Renew(_Message):
    """Another stage was lost: drop all requests, plans and links, keep weights and memory, and go
    on in the epoch of this message, as if just started. The answer is `StageSized`."""

    work: bytes
    """As in `StartStage`. Other work than before comes before weights are read alone, when the
    layers were cut anew."""


class Examine(_Message):
    """Ask for `Examined`, of a stage that has nothing else to do."""

    works: tuple[Work, ...]
    """Microbatches that are to be timed."""
    seconds: float
    """About how long, in all."""


class Connect(_Message):
    """Addresses of the links that this stage sends on. Empty: it has no such link."""

    next_stage: str
    first_stage: str
    sends_part: bool = False
    """Each of the ranks that share this stage sends its part of the activations alone."""
    gets_part: bool = False
    """It gets no more from the stage before, and the ranks of this one put them together."""


class Registration(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A request that starts, or starts again: everything a stage needs to know of it."""

    request_id: int
    token_ids: bytes
    """Prompt and outputs so far: int32, native order."""
    num_prompt_tokens: int
    blocks: list[int]
    params: dict[int, Any]
    """`pack_params` of its options."""
    stop_ids: list[int]
    bad_word_ids: tuple[tuple[int, ...], ...]


class StepChunk(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """`Chunk`, on the wire."""

    request_id: int
    start: int
    stop: int
    new_blocks: tuple[int, ...]
    token_from: int | None
    num_logits: int
    num_scored: int

    @property
    def samples(self) -> bool:
        return self.num_logits > self.num_scored


class Step(_Message):
    """One microbatch: the same bytes go to every stage."""

    index: int
    released: tuple[int, ...]
    admitted: list[Registration]
    chunks: list[StepChunk]


class ReportMemory(_Message):
    """Ask for `Memory`."""


# ---- stage -> driver ----------------------------------------------------------------------------


class StageHello(_Message):
    """Whose connection this is: the first message on it."""

    rank: int


class StageSized(_Message):
    """What a stage will take, told before it takes it: it waits for `TakeMemory`."""

    weight_bytes: int
    block_bytes: int
    """Of one KV block, in all its layers."""
    memory: tuple[MemoryLimit, ...]
    """Where all of that has to fit, beside what others take there. Empty: it takes none."""
    layer_bytes: tuple[int, ...] = ()
    """Of the weights of each layer of the model, whichever stage has it."""
    end_bytes: tuple[int, int] = (0, 0)
    """Of those of embedding and head."""
    meets_at: str = ""
    """Where the first of the ranks that share a stage waits for the others in this epoch; empty of
    the others, and where a stage is not shared."""


class Facts(msgspec.Struct, frozen=True, gc=False):
    """What a rank computes with and in; what differs between ranks is worth a word."""

    python: str
    torch: str
    pipeserve: str
    kernels: str
    """What the layers are computed by."""
    cpus: tuple[int, ...]
    """That the stage may run on."""
    num_threads: int
    cpu_limit: float
    """CPUs that its container lets run; inf: no limit."""
    open_files: int
    """That a process may have."""
    shared_bytes: int
    """Free in /dev/shm; 0 where there is none."""


class Examined(_Message):
    """What a stage found of itself."""

    facts: Facts
    parts: tuple[PartSeconds, ...]
    """For each microbatch that was asked for."""
    cpu_share: float
    """Of its core, while it timed that."""


class Loading(_Message):
    """How far a stage is with its weights; a few times a second, and at their end."""

    num_read: int
    """Bytes of them read so far."""
    num_bytes: int
    """All that there are to read."""


class StageReady(_Message):
    """Weights are loaded; the stage listens for its neighbours."""

    pid: int
    host: str
    activations_at: str
    """Endpoint for the previous stage; empty on the first stage."""
    tokens_at: str
    """Endpoint for the last stage's tokens; empty but on the first of several stages."""
    baseline_bytes: int
    """Resident memory of the interpreter with torch, before the model."""
    weight_bytes: int
    kv_bytes: int
    cpus: list[int]
    """That it may run on."""
    num_threads: int
    """That compute."""


class Connected(_Message):
    """The stage has reached its neighbours."""


class Sampled(_Message):
    """The last stage's answer to a step."""

    index: int
    tokens: list[int]
    counts: bytes
    """How many of them each chunk of the step sampled."""
    logprobs: list[tuple[float, list[tuple[int, float]]] | None]
    """Parallel to `tokens`, or empty: (of the sampled token, the most likely ones)."""
    prompt_logprobs: list[tuple[float, list[tuple[int, float]]]]
    """Likewise of each scored prompt token, chunk after chunk."""
    failed: dict[int, str] = {}
    """Why, for each chunk (by its place in the step) that has no result; its entries above mean
    nothing."""


class Timing(_Message):
    """When a stage computed a microbatch; told behind its output."""

    span: Span


class Memory(_Message):
    """What a stage has used so far."""

    peak_bytes: int


class Unreached(_Message):
    """A neighbour could not be reached: nothing can be computed in this epoch."""

    reason: str


class StageFailed(_Message):
    """The last word of a stage that cannot go on."""

    reason: str
    is_user_error: bool


ToKeeper = StartStage | Stop | NotWanted | Heartbeat
ToStage = TakeMemory | Renew | Examine | Connect | Step | ReportMemory | Heartbeat
FromKeeper = HeartbeatAnswer | LastSpans | StageExited
FromStage = (
    StageSized
    | Loading
    | StageReady
    | Connected
    | Unreached
    | Sampled
    | Timing
    | Memory
    | Examined
    | Heartbeat
    | StageFailed
)
ToDriver = KeeperHello | StageHello | FromKeeper | FromStage

decode_for_keeper = msgspec.msgpack.Decoder(tuple[int, ToKeeper]).decode
decode_for_stage = msgspec.msgpack.Decoder(tuple[int, ToStage]).decode
decode_keeper_hello = msgspec.msgpack.Decoder(tuple[int, KeeperHello]).decode
decode_stage_hello = msgspec.msgpack.Decoder(tuple[int, StageHello]).decode
decode_from_keeper = msgspec.msgpack.Decoder(tuple[int, FromKeeper]).decode
decode_from_stage = msgspec.msgpack.Decoder(tuple[int, FromStage]).decode
"""Each gives the epoch and the message."""

encode_job = msgspec.msgpack.Encoder().encode
"""What is no message: a `Launch`, and the `work` in it."""
decode_launch = msgspec.msgpack.Decoder(Launch).decode
decode_share = msgspec.msgpack.Decoder(ModelShare).decode


def encode(message: ToKeeper | ToStage | ToDriver, epoch: int) -> bytes:
    """As it crosses the wire."""
    return encode_job((epoch, message))
