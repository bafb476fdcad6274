"""What driver, keepers and stages say to each other: one fixed msgspec schema, array-encoded.

Each keeper and each stage has a `Connection` to the driver of its own, on which a message costs one
wake-up. Never a socket that drops what it cannot send: drops become hangs.

What concerns the processes is here; what a keeper is to start is in stage_job.py, and microbatches
and their results are in step_messages.py.

Every message carries the epoch in which it was said. A pipeline that lost a stage begins a fresh
one: what is said late of an old one finds nobody who listens. Who says something, the connection
knows: each belongs to one rank, whose `KeeperHello` or `StageHello` was first on it.

Activations and sampled tokens do not pass here: see links.py.
"""

import msgspec

from pipeserve.core.records import Span
from pipeserve.core.work import PartSeconds, Work
from pipeserve.machine import MemoryLimit
from pipeserve.wire.message import Message
from pipeserve.wire.stage_job import StartStage
from pipeserve.wire.step_messages import HeadTiming, Sampled, Step, Timing

# ---- driver -> keeper ---------------------------------------------------------------------------


class Stop(Message):
    """End the stage and yourself."""

    has_failed: bool = False
    """The run has ended before it was done."""
    why: str = ""
    """To be said, by one on each machine."""


class NotWanted(Message):
    """This keeper does not belong to the pipeline: end yourself."""

    why: str


class Heartbeat(Message):
    """Ask for a sign of life. Of a keeper: `HeartbeatAnswer`, which says what its clock is, too; of
    a stage that has nothing to do: the same message."""

    sent_s: float


# ---- keeper -> driver ---------------------------------------------------------------------------


class KeeperHello(Message):
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


class HeartbeatAnswer(Message):
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


class LastSpans(Message):
    """What the keeper's stage had computed last when it ended, whether or not it had told."""

    spans: tuple[Span, ...]


class StageExited(Message):
    """The process of the keeper's stage has ended."""

    pid: int
    exit_code: int
    """As `subprocess.Popen.returncode`: negative for a signal."""


# ---- driver -> stage ----------------------------------------------------------------------------


class TakeMemory(Message):
    """Read the weights, and make a pool of so many KV blocks; a stage that has, says so at once."""

    num_blocks: int
    meet_at: tuple[str, ...] = ()
    """HOST:PORT where the ranks of each stage meet, that share it (`StageSized.meets_at`)."""


class Renew(Message):
    """Another stage was lost: drop all requests, plans and links, keep weights and memory, and go
    on in the epoch of this message, as if just started. The answer is `StageSized`."""

    work: bytes
    """As in `StartStage`. Other work than before comes before weights are read alone, when the
    layers were cut anew."""


class Examine(Message):
    """Ask for `Examined`, of a stage that has nothing else to do."""

    works: tuple[Work, ...]
    """Microbatches that are to be timed."""
    seconds: float
    """About how long, in all."""


class Connect(Message):
    """Addresses of the links that this stage sends on. Empty: it has no such link."""

    next_stage: str
    other_end: str
    """Of the pipeline, for the tokens that this one samples."""
    rows: str = ""
    """For rows whose head the first stage is to apply."""
    sends_part: bool = False
    """Each of the ranks that share this stage sends its part of the activations alone."""
    gets_part: bool = False
    """It gets no more from the stage before, and the ranks of this one put them together."""


class ReportMemory(Message):
    """Ask for `Memory`."""


# ---- stage -> driver ----------------------------------------------------------------------------


class StageHello(Message):
    """Whose connection this is: the first message on it."""

    rank: int


class StageSized(Message):
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


class Examined(Message):
    """What a stage found of itself."""

    facts: Facts
    parts: tuple[PartSeconds, ...]
    """For each microbatch that was asked for."""
    cpu_share: float
    """Of its core, while it timed that."""


class Loading(Message):
    """How far a stage is with its weights; a few times a second, and at their end."""

    num_read: int
    """Bytes of them read so far."""
    num_bytes: int
    """All that there are to read."""


class StageReady(Message):
    """Weights are loaded; the stage listens for its neighbours."""

    pid: int
    host: str
    activations_at: str
    """Endpoint for the previous stage; empty on the first stage."""
    tokens_at: str
    """Endpoint for the tokens that the other end samples; empty but on the first of several stages,
    and on the last where both sample."""
    baseline_bytes: int
    """Resident memory of the interpreter with torch, before the model."""
    weight_bytes: int
    kv_bytes: int
    cpus: list[int]
    """That it may run on."""
    num_threads: int
    """That compute."""
    rows_at: str = ""
    """Endpoint on the first stage for the last one's rows, whose head it is to apply."""


class Connected(Message):
    """The stage has reached its neighbours."""


class Memory(Message):
    """What a stage has used so far."""

    peak_bytes: int


class Unreached(Message):
    """A neighbour could not be reached: nothing can be computed in this epoch."""

    reason: str


class StageFailed(Message):
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
    | HeadTiming
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

_encode = msgspec.msgpack.Encoder().encode


def encode(message: ToKeeper | ToStage | ToDriver, epoch: int) -> bytes:
    """As it crosses the wire."""
    return _encode((epoch, message))
