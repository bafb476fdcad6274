"""What a kind of stage brings to the loop: its `Compute`. `worker.py` runs the model's layers, the
emulated stage waits as long as a device profile says.

Computing a microbatch has two halves. `begin` hands it to the device and returns; `end` takes what
came of it. While one is computed the next one can be begun, if it is there, so a device never waits
for this thread between two. Where this thread itself computes, it does so in `end`, and there is
nothing to begin ahead.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from pipeserve.core.work import Work
from pipeserve.stage.sequences import Sequence
from pipeserve.wire import control
from pipeserve.wire.links import ActivationLinks
from pipeserve.wire.step_messages import Sampled, Step

Tell = Callable[[control.ToDriver], None]
FeedBack = Callable[[int, list[int], bytes], None]
"""Sends the other end of the pipeline the ids that microbatch `index` sampled, and how many are of
each chunk."""


class Turn(NamedTuple):
    """A microbatch, all of which is here."""

    step: Step
    sequences: list[Sequence]
    """Of each chunk, as this step has them. The next step may change them before this one's end."""
    activations: Any
    """What the link with the stage before handed over; None on the first stage."""
    plan_s: float
    """When the plan was there."""
    input_s: float
    """When the activations were, or the last token that it embeds. As `Span` has both."""


class Done(NamedTuple):
    """What came of a microbatch, and what it took; the times as `Span` has them."""

    start_s: float
    head_s: float
    end_s: float
    sent_s: float
    cpu_s: float
    between_cpu_s: float
    num_bytes: int = 0
    sampled: Sampled | None = None
    """On the stage that has applied the head."""
    all_reduce_s: float = 0.0
    rank_wait_s: float = 0.0
    rows: Any = None
    """On the last stage, where the first is to apply the head: to what."""


class Compute(Protocol):
    """What a stage holds, and does with a microbatch."""

    size: control.StageSized
    weight_bytes: int
    kv_bytes: int
    """The two are known once it has taken its memory."""
    num_threads: int
    links: ActivationLinks
    most_begun: int
    """Microbatches that it has begun and not ended at once: 2 where a device computes, which goes
    from one to the next by itself; 1 where this thread does."""

    def examine(self, works: tuple[Work, ...], seconds: float) -> control.Examined:
        """What it computes with, and what each part of its model takes for these microbatches,
        timed for about so long."""
        ...

    def take_memory(self, num_blocks: int) -> None:
        """Reads its weights, and makes a pool of so many KV blocks."""
        ...

    def meet(self, address: str) -> bool:
        """The other ranks that share the stage, in this epoch, before anything is computed in it.
        Returns whether all have come; raises ConnectionError where it is to be told that they have
        not, and ConfigError where they do not go together."""
        ...

    def part(self) -> None:
        """From them: the epoch is over. Does nothing where it has not met them."""
        ...

    def prepare(self) -> bool:
        """While there is nothing to compute: a moment's worth of what is to be done some time.
        Returns whether there was any."""
        ...

    def begin(self, turn: Turn) -> Any:
        """Have it computed behind those that were begun before it, which are not waited for.
        Returns what `end` needs; that includes what it needs of the sequences."""
        ...

    def left_s(self, computing: Any) -> float:
        """Seconds for which this thread may sleep: the device is busy with this microbatch, which
        was begun first, and nothing that comes would be computed earlier for being seen earlier.
        0 when it is time to look what has come, to begin it, and to take this one's end."""
        ...

    def end(self, computing: Any, feed_back: FeedBack) -> Done | None:
        """Wait until that microbatch is computed, and hand what came of it to the link with the
        next stage; on the last stage, call `feed_back` as soon as its tokens are known, unless the
        first one is to apply the head. None: of the ranks that share the stage, one is gone, and
        nothing more is computed in this epoch."""
        ...

    def apply_head(self, turn: Turn, feed_back: FeedBack) -> Done:
        """On the first stage, where it has the head, to the rows that came in place of activations.
        As the last stage does it in `end`."""
        ...
