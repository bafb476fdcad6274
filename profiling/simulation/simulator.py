"""Serving on virtual time: the same engine object that runs real stages, over stages that are FIFO
servers with links between them.

A stage's time of a microbatch is known when it is planned, and stages and links serve in order, so
a microbatch's whole way through the pipeline follows at once from when each server is free (but for
a head that goes back to the first stage: `first_stage_heads.py`). What is left to wait for are
arrivals and completions; there is no other event.

Times are seconds of virtual time. Pure: no clock, nothing random, nothing is read or written.
"""

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from math import inf
from typing import NamedTuple

from pipeserve.core.engine import Engine
from pipeserve.core.nouns import Microbatch, Output, Request, RequestId, StepResult, Wait, one_each
from pipeserve.core.records import Recorder, ignore
from pipeserve.profiling.recording.recording import no_collection
from pipeserve.profiling.recording.summary import RequestRecord
from pipeserve.profiling.simulation.first_stage_heads import FirstStageHeads
from pipeserve.profiling.simulation.simulated_records import Flight, Silent, Teller
from pipeserve.profiling.simulation.stage_times import StageTimes
from pipeserve.sampling_params import SamplingParams


@dataclass(slots=True)
class Served:
    """One request: when it came, when it first ran, when each of its tokens was known."""

    num_prompt_tokens: int
    max_tokens: int
    arrival_s: float
    priority: int = 0
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


class _Fault(NamedTuple):
    at_s: float
    stage: int
    outage_s: float


class SimulatedPipeline:
    """One engine and its stages. Whoever holds the clock calls `add` and `advance` in time order,
    so that several pipelines can share one clock."""

    def __init__(self, engine: Engine, times: StageTimes, record: Recorder = ignore) -> None:
        self.engine = engine
        self.flights: list[Flight] = []
        """Every microbatch so far, in index order, but those that a fault took; the host may clear
        it."""
        self.started: list[tuple[RequestId, float]] = []
        """Admissions, with the time that stage 0 takes them up; the host clears it."""
        self._times = times
        self._feedback_s = times.control_s if times.feedback_s is None else times.feedback_s
        self._tell = Silent() if record is ignore else Teller(engine, times, record)
        num_stages = len(engine.pipeline.stages)
        self._stage_free = [0.0] * num_stages
        self._link_free = [0.0] * (num_stages - 1)
        self._latency_s = times.latency_s or [0.0] * (num_stages - 1)
        self._heads = FirstStageHeads(times.control_s, self._tell.headed)
        self._driver_free_s = -inf
        self._wanted_s = inf  # since when the driver has something to do beside completions
        self._outstanding: deque[Flight] = deque()
        # So slow that stage 0 may lack a token of which driver and plan knew.
        self._is_feedback_slow = self._feedback_s > 2 * times.control_s + times.planning_s
        self._fed_s: dict[RequestId, float] = {}  # when stage 0 has the newest token
        self._faults: deque[_Fault] = deque()

    @property
    def next_event_s(self) -> float:
        """When `advance` has something to do: the oldest outstanding microbatch completes, or what
        was added can be planned; inf when there is nothing."""
        next_s = self._outstanding[0].known_s if self._outstanding else inf
        if self._wanted_s < next_s:
            next_s = self._wanted_s
        if next_s < self._driver_free_s:
            next_s = self._driver_free_s
        if self._faults and self.engine.has_work:
            return min(next_s, self._faults[0].at_s)
        return next_s

    def add(self, request: Request, now: float) -> None:
        """Queues a request; raises what `Engine.add` raises. `advance` plans it."""
        self.engine.add(request, now)
        self._tell.added(request, now)
        self._wanted_s = min(self._wanted_s, now)

    def fail(self, stage: int, at_s: float, outage_s: float) -> None:
        """Plants a fault: the stage is lost at that time, and with it all that is outstanding;
        after the outage every stage is back, without any KV. Call it in order of time; a fault
        after the last request has ended does not happen."""
        self._faults.append(_Fault(at_s, stage, outage_s))

    def advance(self, now: float) -> list[Output]:
        """Completes what is due by `now`, then plans what the window allows."""
        while self._faults and self._faults[0].at_s <= now:
            self._lose(self._faults.popleft())
        outputs: list[Output] = []
        if now < self._driver_free_s:
            return outputs
        while self._outstanding and self._outstanding[0].known_s <= now:
            outputs += self._complete(self._outstanding.popleft(), now)
        while not isinstance(planned := self.engine.plan(now), Wait):
            sent_s = now + self._times.planning_s
            self._tell.planned(planned, now, sent_s)
            self._fly(planned, sent_s)
            now = sent_s
        self._tell.waits(planned.reason, now)
        self._driver_free_s, self._wanted_s = now, inf
        return outputs

    def _complete(self, flight: Flight, now: float) -> list[Output]:
        for stage, (start, end) in enumerate(zip(flight.starts_s, flight.ends_s, strict=True)):
            self.engine.observe(flight.index, stage, start, start, end)
        if flight.head is not None:
            self._stage_free[0] = self._heads.before(now, self._stage_free[0])
            self.engine.observe_head(flight.index, flight.head.start_s, flight.head.end_s)
        result = StepResult(flight.index, (0,) * sum(flight.counts), flight.counts)
        outputs = self.engine.complete(result, now)
        self._tell.completed(flight, outputs, now)
        return outputs

    def _fly(self, microbatch: Microbatch, sent_s: float) -> None:
        """The microbatch's way: each server takes it when it is there and the server is free."""
        compute_s = self._times.compute_s(microbatch)
        hop_s = self._times.hop_s(microbatch)
        inputs, starts, ends = [self._tokens_there(microbatch)], [], []
        there = max(sent_s + self._times.control_s, inputs[0])
        stage_free, link_free = self._stage_free, self._link_free
        stage_free[0] = self._heads.before(there, stage_free[0])
        for stage, seconds in enumerate(compute_s):
            start = max(there, stage_free[stage])
            end = stage_free[stage] = start + seconds
            starts.append(start)
            ends.append(end)
            if stage < len(hop_s):
                there = max(end, link_free[stage]) + hop_s[stage]
                link_free[stage] = there - self._latency_s[stage]
                inputs.append(there)
        summary, counts = self.engine.last, one_each(microbatch.chunks)
        flight = Flight(
            microbatch.index,
            summary.num_decodes + summary.num_prefill_tokens,
            summary.num_decodes,
            sent_s,
            tuple(inputs),
            tuple(starts),
            tuple(ends),
            end + self._times.control_s,
            counts,
        )
        if microbatch.head_at_first:
            self._heads.add(flight, end + self._feedback_s, self._times.head_s(microbatch))
        self._heads.come_after(self._stage_free[0])
        self.started += [(a.request_id, starts[0]) for a in microbatch.admitted]
        if self._is_feedback_slow:
            sampling = [c.request_id for c in compress(microbatch.chunks, counts)]
            fed_s = -inf if microbatch.head_at_first else end + self._feedback_s
            self._fed_s |= dict.fromkeys(sampling, fed_s)
        self._outstanding.append(flight)
        self.flights.append(flight)
        self._tell.flew(microbatch, flight)

    def _tokens_there(self, microbatch: Microbatch) -> float:
        """When stage 0 has those tokens that do not come with the plan; -inf without any that may
        be late."""
        there = self._fed(microbatch) if self._is_feedback_slow else -inf
        sources = [c.token_from for c in microbatch.chunks if c.token_from is not None]
        if sources:
            oldest = self._outstanding[0].index
            for source in set(sources):
                there = max(there, self._sampled(self._outstanding[source - oldest]))
        return there

    def _sampled(self, flight: Flight) -> float:
        """When stage 0 has its tokens."""
        return flight.ends_s[-1] + self._feedback_s if flight.head is None else flight.head.end_s

    def _fed(self, microbatch: Microbatch) -> float:
        """Of those that the last stage has sampled, whether they are known to the plan or not."""
        for request_id in microbatch.released:
            self._fed_s.pop(request_id, None)
        for admission in microbatch.admitted:
            self._fed_s.pop(admission.request_id, None)
        return max([self._fed_s.get(chunk.request_id, -inf) for chunk in microbatch.chunks])

    def _lose(self, fault: _Fault) -> None:
        self._heads.before(fault.at_s, self._stage_free[0])
        self._heads.forget()
        self.engine.lost(fault.at_s)
        self._tell.lost(fault.stage, fault.at_s)
        if self._outstanding:
            del self.flights[-len(self._outstanding) :]
        self._outstanding.clear()
        self._fed_s.clear()
        back_s = fault.at_s + fault.outage_s
        self._stage_free = [back_s] * len(self._stage_free)
        self._link_free = [back_s] * len(self._link_free)
        self._driver_free_s = self._wanted_s = back_s
        self._tell.waits("", back_s)


class Arrival(NamedTuple):
    """A request of these lengths (tokens) that comes at `arrival_s`."""

    arrival_s: float
    num_prompt_tokens: int
    max_tokens: int
    priority: int = 0


def arrivals_in_order(
    times_s: Sequence[float],
    lengths: Sequence[tuple[int, int]],
    priorities: Sequence[int] = (),
) -> list[Arrival]:
    """Requests by time; those that come at once keep their order. No `priorities`: all 0."""
    parts = zip(times_s, lengths, priorities or [0] * len(lengths), strict=True)
    arrivals = [Arrival(at_s, *pair, priority) for at_s, pair, priority in parts]
    return sorted(arrivals, key=lambda arrival: arrival.arrival_s)


def request_of(request_id: int, arrival: Arrival) -> Request:
    """A request of the arrival's lengths; its ids mean nothing, so no prefix cache goes with it."""
    params = SamplingParams(max_tokens=arrival.max_tokens, ignore_eos=True, seed=0)
    return Request(
        id=RequestId(request_id),
        prompt=(0,) * arrival.num_prompt_tokens,
        params=params,
        priority=arrival.priority,
    )


def served_of(arrival: Arrival) -> Served:
    """What is noted of a request, of which nothing has run yet."""
    return Served(
        num_prompt_tokens=arrival.num_prompt_tokens,
        max_tokens=arrival.max_tokens,
        arrival_s=arrival.arrival_s,
        priority=arrival.priority,
    )


class Simulation:
    """One pipeline and its requests, served in order of arrival."""

    def __init__(self, pipeline: SimulatedPipeline, arrivals: Iterable[Arrival]) -> None:
        """`arrivals`: by time; may have no end, then `run_until` needs one."""
        self.pipeline = pipeline
        self.served: list[Served] = []
        """Every request that has arrived, in order; its id is its place here."""
        self._arrivals = iter(arrivals)
        self._next = next(self._arrivals, None)

    @no_collection()
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
            self.served.append(served_of(arrival))
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
