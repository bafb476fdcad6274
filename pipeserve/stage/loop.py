"""One stage process: a single loop that waits for what the next microbatch needs, then has it
computed. What computing is, a `Compute` says: `worker.py` runs the model's layers, the emulated
stage waits as long as a device profile says. All else is here, the same for both, without torch.

The next microbatch, strictly by index, needs its plan (control), its activations (from the previous
stage) and, on the first stage, the tokens that are still on their way (from the last stage). All of
them are polled together, so nothing can block the stage but its own computing. No thread of ours
runs beside it, but the one that sends on what the kernel does not take of a large activation.
"""

import gc
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import msgspec

from pipeserve.core.records import Span
from pipeserve.errors import PipeserveError
from pipeserve.stage.memory import peak_bytes, resident_bytes
from pipeserve.stage.sequences import Sequence, Sequences
from pipeserve.wire import connecting, control
from pipeserve.wire.connection import Connection
from pipeserve.wire.control import Connect, ReportMemory, StartStage, Step, TakeMemory
from pipeserve.wire.links import ActivationLinks, send_tokens, unpack_tokens
from pipeserve.wire.listener import Listener
from pipeserve.wire.sources import Sources

_LAST_WORD_S = 2.0
_CONNECT_S = 10.0

Tell = Callable[[control.ToDriver], None]


class Turn(NamedTuple):
    """The next microbatch, all of which is here, and when its compute began."""

    step: Step
    sequences: list[Sequence]
    """Of each chunk."""
    activations: Any
    """What the link with the stage before brought; None on the first stage."""
    start_s: float
    start_cpu_s: float
    """Of this thread."""


class Done(NamedTuple):
    """When a microbatch's compute was done, and what it took. As `Span` has it."""

    num_tokens: int
    head_s: float
    end_s: float
    sent_s: float
    cpu_s: float
    end_cpu_s: float
    """Of this thread, at the end."""
    num_bytes: int


class Compute(Protocol):
    """What a stage holds, and does with a microbatch."""

    size: control.StageSized
    weight_bytes: int
    kv_bytes: int
    """The two are known once it has taken its memory."""
    num_threads: int
    links: ActivationLinks
    is_elsewhere: bool
    """The computing is not this thread's, which can do something else meanwhile."""

    def take_memory(self, num_blocks: int) -> None:
        """Reads its weights, and makes a pool of so many KV blocks."""
        ...

    def take_in(self, step: Step, activations: Any, seen_s: float) -> float:
        """When `activations`, a message of the link, seen at `seen_s`, are there; returns not
        before."""
        ...

    def run(self, turn: Turn, stage: "StageLoop") -> Done:
        """Computes it, and hands what comes of it to its link with the next stage; on the last
        stage, to `stage.feed_back` and the driver. One that is elsewhere calls `stage.meanwhile`
        before it is done."""
        ...


class Opening(NamedTuple):
    """A connection to a neighbour that is about to be."""

    connection: Connection
    address: str
    reach: Callable[[str, Sources], Connection]
    until_s: float

    def goes_on(self) -> "Opening | None":
        """None: it is there. Raises ConnectionError when it will not be."""
        if self.connection.is_open:
            return None
        if not self.connection.has_ended:
            return self
        why = self.connection.refusal
        if self.connection.is_refused or time.monotonic() > self.until_s:
            raise ConnectionError(f"{self.address.partition('/')[0]} hung up: {why}")
        return self._replace(connection=self.reach(self.address, self.connection.sources))


class StageLoop:
    """Replays the driver's steps, one after the other. Decides nothing."""

    def __init__(
        self,
        job: StartStage,
        epoch: int,
        sources: Sources,
        driver: Connection,
        make: Callable[[StartStage, Tell], Compute],
        baseline: int,
    ) -> None:
        """`baseline`: bytes of this process's memory, before all that the stage takes."""
        self.job = job
        self.epoch = epoch
        self.is_first = job.stage == 0
        self.is_last = job.stage == job.num_stages - 1
        self.sources = sources
        self.driver = driver
        self.first_stage: Connection | None = None
        self._opening: list[Opening] = []
        # Each with the time when it was seen.
        self.plans: deque[tuple[Step, float]] = deque()
        self.activations: deque[tuple[Any, float]] = deque()
        self.sequences = Sequences()
        self.has_memory = False
        self.baseline = baseline
        self.compute = make(job, self.tell)
        self.untold: Span | None = None
        """Of the microbatch before."""
        self.last_cpu_s = time.thread_time()
        """Of this thread at the end of the microbatch before."""
        self._listen()
        self.tell(self.compute.size)

    def wait_for_memory(self) -> None:
        """Until the driver has said how much to take, and it is taken."""
        while not self.has_memory:
            self._receive()

    def tell(self, message: control.ToDriver) -> None:
        self.driver.send(control.encode(message, self.epoch))

    def report(self, message: control.Sampled | control.Timing) -> None:
        """What the stage did: of its ranks, one tells."""
        if self.job.speaks:
            self.tell(message)

    def meanwhile(self) -> None:
        """What need not wait for the end of a microbatch that is computed elsewhere."""
        self._tell_span()
        self._receive(seen_s=time.monotonic())

    def _tell_span(self) -> None:
        if self.untold is not None:
            self.report(control.Timing(self.untold))
            self.untold = None

    def close(self) -> None:
        self.sources.close()

    def feed_back(self, step: Step, tokens: list[int], counts: bytes, now: float) -> float:
        """What the last stage sampled, `counts` of it in each chunk, to the first before anything
        else, for it may be waiting. Returns this thread's CPU time once it is on its way."""
        if tokens and not self.is_first:
            send_tokens(self.first_stage, step.index, tokens, counts)
        cpu_s = time.thread_time()  # a system call: not before the tokens are on their way
        if tokens:
            self.sequences.take_tokens(step.index, tokens, counts, now)
        return cpu_s

    def _listen(self) -> None:
        """Open the receiving ends of this stage's links."""
        self.activations_at = self.tokens_at = ""
        if not self.is_first:
            self.activations_at = self.compute.links.listen(self.job.host, self.sources)
        elif not self.is_last:
            self.tokens_at = Listener(self.job.host, self.sources, ("tokens",), once=True).address

    def _take_memory(self, num_blocks: int) -> None:
        self.compute.take_memory(num_blocks)
        self.has_memory = True
        self.tell(
            control.StageReady(
                pid=os.getpid(),
                host=self.job.host,
                activations_at=self.activations_at,
                tokens_at=self.tokens_at,
                baseline_bytes=self.baseline,
                weight_bytes=self.compute.weight_bytes,
                kv_bytes=self.compute.kv_bytes,
                cpus=sorted(os.sched_getaffinity(0)),
                num_threads=self.compute.num_threads,
            )
        )

    def run(self) -> None:
        """Microbatch after microbatch, until the keeper ends this process."""
        while True:
            while not self._is_ready():
                self._receive()
            self._run_next()

    # ---- waiting --------------------------------------------------------------------------------

    def _is_ready(self) -> bool:
        """Whether plan, activations and tokens of the next microbatch are all here."""
        if not self.plans:
            return False
        if not self.is_first:
            return bool(self.activations)
        return self.sequences.has_tokens_for(self.plans[0][0])

    def _receive(self, seen_s: float | None = None) -> None:
        """Take everything that has arrived, as seen at `seen_s`: what came while the stage computed
        was not waited for, however late it is taken. Without it, wait until something has arrived.
        """
        for source in self.sources.ready(None if seen_s is None else 0):
            messages = source.receive()
            now = time.monotonic() if seen_s is None else seen_s
            for message in messages:
                match source.carries:
                    case "stage":  # the driver's words to it
                        self._obey(*control.decode_for_stage(message), now)
                    case "activations":
                        self.activations.append((message, now))
                    case "tokens":
                        self.sequences.take_tokens(*unpack_tokens(message), now)
        if self._opening:
            self._look_at_neighbours()
        if self.driver.has_ended:
            sys.exit(1)  # as its keeper would have it

    def _obey(self, epoch: int, message: control.ToStage, now: float) -> None:
        if epoch != self.epoch:
            return
        match message:
            case Step():
                self.plans.append((message, now))
            case TakeMemory():
                self._take_memory(message.num_blocks)
            case Connect():
                self._connect(message)
            case ReportMemory():
                self.tell(control.Memory(peak_bytes()))

    def _connect(self, addresses: Connect) -> None:
        """To its neighbours, who take a moment to answer."""
        until_s = time.monotonic() + _CONNECT_S
        for address, reach in (
            (addresses.next_stage, self.compute.links.connect),
            (addresses.first_stage, self._reach_first_stage),
        ):
            if address:
                self._opening.append(Opening(reach(address, self.sources), address, reach, until_s))
        self._look_at_neighbours()

    def _reach_first_stage(self, address: str, sources: Sources) -> Connection:
        self.first_stage = connecting.connect(address, sources, "tokens")
        return self.first_stage

    def _look_at_neighbours(self) -> None:
        """Tells the driver once all of them have answered. One that hung up may have been displaced
        by strangers: it is called again."""
        self._opening = [again for opening in self._opening if (again := opening.goes_on())]
        if not self._opening:
            self.tell(control.Connected())

    # ---- one microbatch -------------------------------------------------------------------------

    def _run_next(self) -> None:
        """The next microbatch, all of which is here. What is told of it comes last: when the one
        after it has begun, if it can."""
        self.untold = span = self._compute(*self.plans.popleft())
        if not self._can_go_on():
            self._receive(seen_s=span.end_s)
            if not self._can_go_on():
                self._tell_span()

    def _can_go_on(self) -> bool:
        """Whether the next microbatch can begin, and leaves time for all that is put off to it."""
        return self.compute.is_elsewhere and self._is_ready()

    def _compute(self, step: Step, plan_s: float) -> Span:
        """Have it computed and sent on; returns what is told of it."""
        activations = None
        if not self.is_first:
            activations, seen_s = self.activations.popleft()
            input_s = self.compute.take_in(step, activations, seen_s)
        start_s, start_cpu_s = time.monotonic(), time.thread_time()
        sequences = self.sequences.apply(step)
        if self.is_first:
            input_s = max([sequence.token_s for sequence in sequences])
        if self.is_first or self.is_last:
            self.sequences.await_tokens(step, sequences)
        done = self.compute.run(Turn(step, sequences, activations, start_s, start_cpu_s), self)
        between_cpu_s, self.last_cpu_s = start_cpu_s - self.last_cpu_s, done.end_cpu_s
        return Span(
            stage=self.job.stage,
            index=step.index,
            num_tokens=done.num_tokens,
            plan_s=plan_s,
            input_s=input_s,
            start_s=start_s,
            head_s=done.head_s,
            end_s=done.end_s,
            sent_s=done.sent_s,
            cpu_s=done.cpu_s,
            between_cpu_s=between_cpu_s,
            num_bytes=done.num_bytes,
        )


# ---- the process --------------------------------------------------------------------------------


def serve(make: Callable[[StartStage, Tell], Compute]) -> None:
    """Run the stage that standard input says; on failure, tell the driver and exit 1."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    baseline = resident_bytes()
    launch = control.decode_launch(sys.stdin.buffer.read())
    job, rank, epoch, secret = msgspec.structs.astuple(launch)
    sources = Sources(secret)
    try:
        driver = connecting.connected(job.control, sources, "stage")
    except ConnectionError as error:
        sys.exit(f"error: stage {job.stage}: the driver at {error}")
    driver.send(control.encode(control.StageHello(rank), epoch))
    try:
        stage = StageLoop(job, epoch, sources, driver, make, baseline)
        stage.wait_for_memory()
        gc.collect()
        gc.freeze()
        stage.run()
    except Exception as error:
        if job.traceback:
            traceback.print_exc()
        failed = control.StageFailed(_reason(error), isinstance(error, PipeserveError))
        driver.send(control.encode(failed, epoch))
        driver.close(wait_s=_LAST_WORD_S)
        sys.exit(1)


def _reason(error: Exception) -> str:
    """One line for the user: what happened and, where it is known, the remedy."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, PipeserveError):
        return text
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return f"out of memory ({text}); use more stages or a smaller --kv-cache-memory-bytes"
    return f"{type(error).__name__}: {text} (PIPESERVE_TRACEBACK=1 prints where)"
