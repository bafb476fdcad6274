"""What is recorded of a run: one schema for real, emulated and simulated runs.

Whoever hosts an engine hands each record to a `Record`er as it becomes known: the driver on real
stages, the simulator on virtual time. `profiling.recording` keeps and writes them, and
`profiling.ledger` says from them where the time went.

Times are seconds of the recording machine's CLOCK_MONOTONIC: the driver's, but for `Span`, whose
times are of the stage's machine. `Ping`s say how the two are aligned.
"""

from collections.abc import Callable
from typing import NamedTuple

from pipeserve.core.nouns import Chunk, RequestId


class Arrived(NamedTuple):
    """A request was added to the engine."""

    request_id: RequestId
    at_s: float
    num_prompt_tokens: int
    max_tokens: int
    priority: int = 0


class Ended(NamedTuple):
    """A request ended; tokens sampled for it by microbatches that complete later are dropped."""

    request_id: RequestId
    at_s: float
    reason: str
    num_output_tokens: int


class Planned(NamedTuple):
    """The driver made one microbatch and sent it to every stage."""

    index: int  # type: ignore[assignment]  # as a field it hides tuple.index
    waited_for: str
    """Why the last try at this microbatch gave none (`Wait.reason`); "" when the first one gave it,
    right behind the microbatch before."""
    after: int
    """The completion that ended the wait; -1 where an arrival or an abort did, or where there was
    no wait."""
    woken_s: float
    """When that completion was received (`Completed.received_s`), or that request was added; where
    there was no wait, when the microbatch before was sent."""
    start_s: float
    """The engine was asked for the plan that became this microbatch."""
    sent_s: float
    """The messages to the stages were about to be handed over: no stage has one earlier."""
    chunks: tuple[Chunk, ...]
    num_waiting: int
    """Requests that are not admitted, after this plan."""
    num_running: int
    num_free_blocks: int
    predicted_s: tuple[float, ...]
    """By the engine's cost model, for each stage; empty without one."""
    window: int = 0
    """Microbatches that may be outstanding, after this plan; 0 in recordings that do not say it."""


class Completed(NamedTuple):
    """The driver took up what was sampled."""

    index: int  # type: ignore[assignment]  # as a field it hides tuple.index
    waiting_s: float
    """Since when the driver had done nothing but wait for messages. A result that was there before
    waited for the driver."""
    received_s: float
    done_s: float
    """The engine knows the tokens."""
    counts: tuple[int, ...]
    """How many tokens each chunk of the microbatch sampled; 0 where it was not to."""


class Span(NamedTuple):
    """One microbatch on one stage. Times of that stage's machine.

    What came while the stage computed, or waited for the end of that, is seen when it looks, and
    stamped as at the end of that microbatch: it was not waited for. So is what comes between that
    end and the look, which makes it as much too early; who needs it causal takes the sender's
    `sent_s` where that is later. A device that has its next microbatch by then waits for nothing:
    there it is stamped as at the look, which is before that one's end.

    Of a microbatch that a device computes, start and end are the device's: it may have been begun
    while the one before was computed, and its end is taken some time after it.
    """

    stage: int
    index: int  # type: ignore[assignment]  # as a field it hides tuple.index
    num_tokens: int
    plan_s: float
    """The plan was there."""
    input_s: float
    """The activations were there; on stage 0, the last of the tokens that it embeds. -inf where
    it needed none but the plan's own."""
    start_s: float
    head_s: float
    """The layers were done: head and sampling follow, on the last stage, unless the first one does
    that (`Headed`); elsewhere `end_s`."""
    end_s: float
    sent_s: float
    """The output was about to be handed to the link: no one has it earlier. On the last stage, the
    tokens to stage 0 and driver; before `end_s` where prompt tokens are scored after them."""
    cpu_s: float
    """Thread CPU time from start to end, less than the wall time when the stage's core was taken;
    NaN where the CPU does not do the computing."""
    between_cpu_s: float
    """Thread CPU time from the end of the span before to the start of this one; NaN likewise."""
    num_bytes: int
    """Sent to the next stage."""
    all_reduce_s: float = 0.0
    """Between start and head: the ranks of the stage added up what each had computed. Of the rank
    that tells, its waiting left out."""
    rank_wait_s: float = 0.0
    """Likewise: that rank waited for a slower one of its stage."""


class Headed(NamedTuple):
    """The first stage applied the head of a microbatch that had left the last one, and sampled
    (`Microbatch.head_at_first`). Times of that stage's machine, as those of `Span`."""

    stage: int
    index: int  # type: ignore[assignment]  # as a field it hides tuple.index
    input_s: float
    """The hidden rows were there."""
    start_s: float
    end_s: float
    sent_s: float
    """The tokens were about to be handed to the last stage and the driver."""
    cpu_s: float
    between_cpu_s: float


class Ping(NamedTuple):
    """One exchange with the machine of a stage, to align its clock."""

    stage: int
    sent_s: float
    """By the driver's clock."""
    remote_s: float
    """By the clock of the stage's machine, between the two others."""
    received_s: float


class Fault(NamedTuple):
    """A stage was lost; what was outstanding is void."""

    stage: int
    at_s: float
    reason: str


Record = Arrived | Ended | Planned | Completed | Span | Headed | Ping | Fault
Recorder = Callable[[Record], None]


def ignore(record: Record) -> None:
    """The recorder of a run that is not recorded."""
