"""What a simulated pipeline tells of itself: the same records as the driver on real stages.

The simulator knows when things happened; real stages say when they saw it. What came while a stage
computed is seen at the end of that microbatch, and so it is told here.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import inf, nan
from typing import NamedTuple

from pipeserve.core.engine import Engine
from pipeserve.core.journal import Journal
from pipeserve.core.nouns import Microbatch, Output, Request
from pipeserve.core.records import Completed, Headed, Recorder, Span
from pipeserve.profiling.simulation.stage_times import StageTimes

# What NamedTuple's own constructor does, without a Python call for every span.
_new_span = partial(tuple.__new__, Span)


class Head(NamedTuple):
    """Of a microbatch, as the first stage applies it."""

    input_s: float
    """The rows have come back."""
    seconds: float
    start_s: float

    @property
    def end_s(self) -> float:
        return self.start_s + self.seconds

    def begun(self, free_s: float) -> "Head":
        """When the stage is free and the rows are there."""
        return self._replace(start_s=max(self.input_s, free_s))


@dataclass(slots=True)
class Flight:
    """One microbatch's way through the pipeline. It is known when it is planned; but where the
    first stage has the head, its end may be put off (`first_stage_heads.py`)."""

    index: int
    num_tokens: int
    num_decodes: int
    planned_s: float
    """The plan was sent."""
    inputs_s: tuple[float, ...]
    """What each stage embeds or gets from the stage before is there; -inf where that is nothing."""
    starts_s: tuple[float, ...]
    """On each stage."""
    ends_s: tuple[float, ...]
    known_s: float
    """When the driver has its tokens."""
    counts: bytes
    """How many of them each chunk sampled."""
    head: Head | None = None
    """Where the first stage applies it; else it is in the last one's time."""


class Silent:
    """Tells nothing: of a run that is not recorded. Documents what `Teller` is told."""

    def added(self, request: Request, now: float) -> None:
        """A request came."""

    def waits(self, reason: str, now: float) -> None:
        """The engine had no plan; or, with reason "", the stages are there (again) since `now`."""

    def planned(self, microbatch: Microbatch, start_s: float, sent_s: float) -> None:
        """The driver made a plan."""

    def flew(self, microbatch: Microbatch, flight: Flight) -> None:
        """The way that it takes is known."""

    def headed(self, flight: Flight) -> None:
        """And so is when the first stage applies its head."""

    def completed(self, flight: Flight, outputs: Iterable[Output], now: float) -> None:
        """The driver took up what the last stage sampled."""

    def lost(self, stage: int, now: float) -> None:
        """A fault; what had not ended never will."""


class Teller:
    """Hands a recorder what it is told, as records."""

    def __init__(self, engine: Engine, times: StageTimes, record: Recorder) -> None:
        self._journal = Journal(engine, record)
        self._times = times
        num_stages = len(engine.pipeline.stages)
        self._spans: deque[list[Span]] = deque()  # of the outstanding microbatches
        self._headed: dict[int, Headed] = {}  # likewise
        self._busy = [deque([(-inf, -inf)]) for _ in range(num_stages)]  # start, end
        self._idle_since_s = 0.0  # the driver's last deed

    def added(self, request: Request, now: float) -> None:
        self._journal.arrived(request, now)

    def waits(self, reason: str, now: float) -> None:
        if reason:
            self._journal.waits(reason)
        else:
            self._journal.resumed(now)
        self._idle_since_s = now

    def planned(self, microbatch: Microbatch, start_s: float, sent_s: float) -> None:
        self._journal.planned(microbatch, start_s, sent_s)
        self._idle_since_s = sent_s

    def flew(self, microbatch: Microbatch, flight: Flight) -> None:
        head_s = flight.ends_s[-1]
        if flight.head is None:
            head_s -= self._times.head_s(microbatch)
        all_reduce_s = self._times.all_reduce_s(microbatch)
        ways = zip(flight.inputs_s, flight.starts_s, flight.ends_s, strict=True)
        spans = []
        for stage, (input_s, start_s, end_s) in enumerate(ways):
            busy = self._busy[stage]
            plan_s = _seen(busy, flight.planned_s + self._times.control_s)
            input_s = _seen(busy, input_s)
            is_last = stage == len(self._busy) - 1
            top_s = head_s if is_last else end_s
            times = (plan_s, input_s, start_s, top_s, end_s, end_s, nan, nan)
            summed_s = all_reduce_s[stage] if all_reduce_s else 0.0
            spans.append(
                _new_span((stage, flight.index, flight.num_tokens, *times, 0, summed_s, 0.0))
            )
            busy.append((start_s, end_s))
        self._spans.append(spans)

    def headed(self, flight: Flight) -> None:
        head, busy = flight.head, self._busy[0]
        assert head is not None
        input_s = _seen(busy, head.input_s)
        times = (input_s, head.start_s, head.end_s, head.end_s, nan, nan)
        self._headed[flight.index] = Headed(0, flight.index, *times)
        busy.append((head.start_s, head.end_s))

    def completed(self, flight: Flight, outputs: Iterable[Output], now: float) -> None:
        for span in self._spans.popleft():
            self._journal.computed(span)
            busy = self._busy[span.stage]
            while busy[0][0] < span.start_s:
                busy.popleft()
        if flight.head is not None:
            self._journal.computed(self._headed.pop(flight.index))
        completed = Completed(flight.index, self._idle_since_s, now, now, tuple(flight.counts))
        self._journal.completed(completed, outputs)

    def lost(self, stage: int, now: float) -> None:
        for did in chain(*self._spans, self._headed.values()):
            if did.end_s <= now:
                self._journal.computed(did)
        self._spans.clear()
        self._headed.clear()
        for busy in self._busy:
            busy.clear()
            busy.append((-inf, -inf))
        self._journal.lost(stage, now, "a planted fault")


def _seen(busy: Iterable[tuple[float, float]], at_s: float) -> float:
    """When a stage sees what came at `at_s`: at once, or at the end of what it computes then."""
    for start_s, end_s in busy:
        if start_s < at_s <= end_s:
            return end_s
    return at_s
