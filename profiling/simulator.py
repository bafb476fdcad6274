"""Serving on virtual time: the same engine object that runs real stages, over stages that are FIFO
servers with links between them.

A stage's time of a microbatch is known when it is planned, and stages and links serve in order, so
a microbatch's whole way through the pipeline follows at once from when each server is free. What is
left to wait for are arrivals and completions; there is no other event.

Times are seconds of virtual time. Pure: no clock, nothing random, nothing is read or written.
"""

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple, Protocol

from pipeserve.core.engine import Engine
from pipeserve.core.nouns import (
    Microbatch,
    Output,
    Request,
    RequestId,
    SamplingParams,
    StepResult,
    Wait,
)
from pipeserve.profiling.summary import RequestRecord


class StageTimes(Protocol):
    """How long things take: the truth of a simulation, which no policy may look into."""

    control_s: float
    """From the driver to a stage, or from the last stage to the driver and to stage 0."""

    def compute_s(self, microbatch: Microbatch) -> Sequence[float]:
        """Seconds of each stage's own compute, in stage order."""
        ...

    def hop_s(self, microbatch: Microbatch) -> Sequence[float]:
        """Seconds that the activations take over each of the P - 1 seams."""
        ...


class Flight(NamedTuple):
    """One microbatch's way through the pipeline."""

    index: int
    num_tokens: int
    num_decodes: int
    planned_s: float
    starts_s: tuple[float, ...]
    """On each stage."""
    ends_s: tuple[float, ...]
    known_s: float
    """When the driver has its tokens."""


@dataclass(slots=True)
class Served:
    """One request: when it came, when it first ran, when each of its tokens was known."""

    num_prompt_tokens: int
    max_tokens: int
    arrival_s: float
    started_s: float | None = None
    """Stage 0 began its first chunk; None while it waits."""
    token_times_s: array = field(default_factory=lambda: array("d"))

    @property
    def finished(self) -> bool:
        return len(self.token_times_s) == self.max_tokens

    def record(self) -> RequestRecord:
        """What a run's summary is made of."""
        return RequestRecord(
            num_prompt_tokens=self.num_prompt_tokens,
            arrival_s=self.arrival_s,
            token_times_s=tuple(self.token_times_s),
        )


class SimulatedPipeline:
    """One engine and its stages. Whoever holds the clock calls `add` and `advance` in time order,
    so that several pipelines can share one clock."""

    def __init__(
        self,
        engine: Engine,
        times: StageTimes,
        on_flight: Callable[[Microbatch, Flight], None] = lambda microbatch, flight: None,
    ) -> None:
        """`on_flight` is told of each microbatch as it is planned; only there are its chunks."""
        self.engine = engine
        self._on_flight = on_flight
        self.flights: list[Flight] = []
        """Every microbatch so far, in index order; the host may clear it."""
        self.started: list[tuple[RequestId, float]] = []
        """Admissions, with the time that stage 0 takes them up; the host clears it."""
        self._times = times
        self._plans_ahead = engine.policy.traits.plans_ahead
        num_stages = len(engine.pipeline.stages)
        self._stage_free = [0.0] * num_stages
        self._link_free = [0.0] * (num_stages - 1)
        self._outstanding: deque[tuple[Flight, int]] = deque()  # with how many tokens it samples
        self._known_s: dict[int, float] = {}  # of outstanding microbatches, for token feedback

    @property
    def next_event_s(self) -> float:
        """When the oldest outstanding microbatch completes; inf when there is none."""
        return self._outstanding[0][0].known_s if self._outstanding else inf

    def add(self, request: Request, now: float) -> None:
        """Queues a request; raises what `Engine.add` raises. `advance` plans it."""
        self.engine.add(request, now)

    def advance(self, now: float) -> list[Output]:
        """Completes what is due by `now`, then plans what the window allows."""
        outputs: list[Output] = []
        while self._outstanding and self._outstanding[0][0].known_s <= now:
            outputs += self._complete(*self._outstanding.popleft())
        while not isinstance(planned := self.engine.plan(now), Wait):
            self._fly(planned, now)
        return outputs

    def _complete(self, flight: Flight, num_sampled: int) -> list[Output]:
        del self._known_s[flight.index]
        for stage, (start, end) in enumerate(zip(flight.starts_s, flight.ends_s, strict=True)):
            self.engine.observe(flight.index, stage, end - start)
        return self.engine.complete(StepResult(flight.index, (0,) * num_sampled), flight.known_s)

    def _fly(self, microbatch: Microbatch, now: float) -> None:
        """The microbatch's way: each server takes it when it is there and the server is free."""
        compute_s = self._times.compute_s(microbatch)
        hop_s = self._times.hop_s(microbatch)
        starts, ends = [], []
        there = max(now + self._times.control_s, self._tokens_there(microbatch))
        for stage, seconds in enumerate(compute_s):
            start = max(there, self._stage_free[stage])
            end = self._stage_free[stage] = start + seconds
            starts.append(start)
            ends.append(end)
            if stage < len(hop_s):
                there = max(end, self._link_free[stage]) + hop_s[stage]
                self._link_free[stage] = there
        known_s = end + self._times.control_s
        summary = self.engine.last
        flight = Flight(
            microbatch.index,
            summary.num_decodes + summary.num_prefill_tokens,
            summary.num_decodes,
            now,
            tuple(starts),
            tuple(ends),
            known_s,
        )
        self._known_s[microbatch.index] = known_s
        self.started += [(a.request_id, starts[0]) for a in microbatch.admitted]
        num_sampled = sum([chunk.num_logits for chunk in microbatch.chunks])
        self._outstanding.append((flight, num_sampled))
        self.flights.append(flight)
        self._on_flight(microbatch, flight)

    def _tokens_there(self, microbatch: Microbatch) -> float:
        """When stage 0 has the tokens that were on their way when the microbatch was planned."""
        if not self._plans_ahead:
            return 0.0
        sources = [c.token_from for c in microbatch.chunks if c.token_from is not None]
        return self._known_s[max(sources)] if sources else 0.0


class Arrival(NamedTuple):
    """A request of these lengths (tokens) that comes at `arrival_s`."""

    arrival_s: float
    num_prompt_tokens: int
    max_tokens: int


def in_order(times_s: Sequence[float], lengths: Sequence[tuple[int, int]]) -> list[Arrival]:
    """Requests by time; those that come at once keep their order."""
    arrivals = [Arrival(at, *pair) for at, pair in zip(times_s, lengths, strict=True)]
    return sorted(arrivals, key=lambda arrival: arrival.arrival_s)


def request_of(request_id: int, arrival: Arrival) -> Request:
    """A request of the arrival's lengths; its ids mean nothing, so no prefix cache goes with it."""
    params = SamplingParams(max_tokens=arrival.max_tokens, ignore_eos=True, seed=0)
    return Request(id=RequestId(request_id), prompt=(0,) * arrival.num_prompt_tokens, params=params)


class Simulation:
    """One pipeline and its requests, served in order of arrival."""

    def __init__(self, pipeline: SimulatedPipeline, arrivals: Iterable[Arrival]) -> None:
        """`arrivals`: by time; may have no end, then `run_until` needs one."""
        self.pipeline = pipeline
        self.served: list[Served] = []
        """Every request that has arrived, in order; its id is its place here."""
        self._arrivals = iter(arrivals)
        self._next = next(self._arrivals, None)

    def run_until(self, stop_s: float = inf) -> None:
        """Runs on to `stop_s`, or until every request that will come has ended."""
        pipeline = self.pipeline
        while True:
            arrival_s = self._next.arrival_s if self._next is not None else inf
            now = min(arrival_s, pipeline.next_event_s)
            if now > stop_s or now == inf:
                return
            if arrival_s == now:
                self._add_arrived(now)
            self._note(pipeline.advance(now), now)
            self._note_starts()

    def _add_arrived(self, now: float) -> None:
        while self._next is not None and self._next.arrival_s <= now:
            arrival = self._next
            self.pipeline.add(request_of(len(self.served), arrival), now)
            self.served.append(
                Served(arrival.num_prompt_tokens, arrival.max_tokens, arrival.arrival_s)
            )
            self._next = next(self._arrivals, None)

    def _note(self, outputs: list[Output], now: float) -> None:
        served = self.served
        for output in outputs:
            served[output.request_id].token_times_s.append(now)

    def _note_starts(self) -> None:
        for request_id, start_s in self.pipeline.started:
            served = self.served[request_id]
            if served.started_s is None:
                served.started_s = start_s
        self.pipeline.started.clear()
