"""How idle time is split among causes: by what the critical paths hold.

Each event (a plan, a start, an end, a result taken up) happened when the last thing that it needed
was there. Followed back to the run's first arrival, that chain is the event's critical path, and
what the time went to along it (compute by parts, links, feedback, planning, ...) sums to the
event's time. So an idle interval, between the end of one microbatch and the start of the next, is
the difference of two such sums: what the path to the start holds more of than the path to the end.

In this way a delay counts where it costs, not where it happens to be waited for: a slow link in the
loop from stage 0 to the last stage and back is `link` on every stage, those too whose activations
are there at once; and a slow link that nothing waits for is nothing.

The steps on a path are counted. A path to a start that has n steps more than that to the end before
says that microbatches were missing: n times the stage's last step is `too_few_microbatches` (or why
they were: `no_requests`, `kv_full`, `fill`, `fault`), and only the rest a difference between
microbatches.

Where both ends of the pipeline have the vocabulary head, one at the first stage is an event of its
own between two microbatches there: it needs the last stage's rows, and the stage. What follows from
the tokens (results, plans, the next chunks of those requests) follows from its end.

Computed forwards, a vector for each event. Source: the critical path method (Kelley and Walker,
"Critical-path planning and scheduling", 1959), over the max-plus recurrence of a pipeline.
"""

from bisect import bisect_right
from collections import deque
from itertools import compress
from math import inf, isnan
from operator import add, itemgetter, sub
from typing import NamedTuple

from pipeserve.core.nouns import RequestId, one_each
from pipeserve.core.records import Headed, Planned, Span
from pipeserve.core.work import work_of
from pipeserve.profiling.ledger.bounds import bounds_of, is_whole
from pipeserve.profiling.ledger.faults import outages_of
from pipeserve.profiling.ledger.path_vectors import (
    CONTROL,
    FAULT,
    FEEDBACK,
    LINK,
    NO_REQUESTS,
    PLANNING,
    PREFILL_STEPS,
    SIZE,
    STEPS,
    UNKNOWN,
    Vector,
    at_an_edge,
    by_cause,
    carry,
    divide,
    later,
    step_by_step,
)
from pipeserve.profiling.ledger.step_parts import (
    HEAD,
    JITTER,
    NUM_PARTS,
    StepParts,
    has_prefill,
    head_parts,
    measured_parts,
)
from pipeserve.profiling.recording.recording import Recording

_KEPT = 4096
"""Microbatches whose vectors are remembered: more than are ever outstanding."""

PathEvent = tuple[Vector, float]
"""What led to it, and when; all but the last two components sum to the time since the start."""


class Idle(NamedTuple):
    """A stage without work, from one microbatch's end to the next one's start."""

    stage: int
    index: int
    """Of the microbatch that ended it; -1 for what follows the stage's last one."""
    start_s: float
    end_s: float
    seconds: tuple[float, ...]
    """By cause, in the order of `CAUSES`; none is negative, and they sum to the interval."""
    before_head: bool = False
    """It was the microbatch's head, at the first stage, that ended it."""


class Walk:
    """PathEvent after event of a recording, in the order of microbatches and stages."""

    def __init__(self, recording: Recording) -> None:
        num_stages = recording.num_stages
        self.planned = {planned.index: planned for planned in recording.planned}
        self.completed = {completed.index: completed for completed in recording.completed}
        self.spans = [{span.index: span for span in spans} for spans in recording.spans]
        self.heads = {head.index: head for head in recording.headed}
        """Those that the first stage applied."""
        self.unwalked = deque(sorted(recording.headed, key=lambda head: head.start_s))
        self.is_whole = is_whole(recording)
        self.start_s, self.stop_s = bounds_of(recording)
        self.model = StepParts.fit(recording)
        origin: PathEvent = [0.0] * SIZE, self.start_s
        self.sent = origin
        """The latest plan."""
        self.ends: list[dict[int, PathEvent]] = [{} for _ in recording.spans]
        self.head_ends: dict[int, PathEvent] = {}
        self.last = [origin] * num_stages
        """The latest end on each stage."""
        self.last_parts: list[Vector | None] = [None] * num_stages
        self.sampled_by: dict[RequestId, int] = {}
        """The microbatch that sampled the latest token of each request."""
        self.done_s = [completed.done_s for completed in recording.completed]
        self.done = [completed.index for completed in recording.completed]
        self.carried = [[0.0] * SIZE for _ in recording.spans]
        """What the intervals before were given too little (over 0) and too much of; sums to 0."""
        self.outages = outages_of(recording)
        self.last_index = [-1] * num_stages
        self.idle: list[list[Idle]] = [[] for _ in recording.spans]
        self.busy_s = [0.0] * num_stages

    def run(self) -> None:
        """Fills `idle` and `busy_s`."""
        for index in sorted(set(self.planned).union(*self.spans)):
            self._microbatch(index)
        self._heads_until(inf, "drain")
        for stage in range(len(self.spans)):
            self._trailing(stage)

    # ---- one microbatch -------------------------------------------------------------------------

    def _microbatch(self, index: int) -> None:
        """Its plan, its way through the stages, and its result."""
        planned = self.planned.get(index)
        predicted, prefills, missing = None, False, "unknown"
        if planned is not None:
            missing = self._missing(planned)
        self._heads_until(self._begins_s(index), None if missing == "fault" else missing)
        if planned is not None:
            self._plan(planned, missing)
            predicted, prefills = self.model.parts(work_of(planned)), has_prefill(planned)
        for stage, spans in enumerate(self.spans):
            span = spans.get(index)
            if span is None:
                continue
            start = self._start(span, planned)
            self._idle(span, start, missing)
            if predicted is None:
                parts = [span.end_s - span.start_s] + [0.0] * (NUM_PARTS - 1)
            else:
                parts = measured_parts(predicted[stage], span)
            parts += [0.0] * (PREFILL_STEPS - NUM_PARTS) + [float(prefills), 1.0]
            self.last_parts[stage] = parts
            event = list(map(add, start, parts)), span.end_s
            self.ends[stage][index] = event
            self.ends[stage].pop(index - _KEPT, None)
            self._end(span, event)
            self.last_index[stage] = index
        if planned is not None:
            sampling = [c.request_id for c in compress(planned.chunks, one_each(planned.chunks))]
            self.sampled_by.update(dict.fromkeys(sampling, index))

    def _begins_s(self, index: int) -> float:
        """By when the first stage has applied the heads that come before this microbatch."""
        span, planned = self.spans[0].get(index), self.planned.get(index)
        if span is not None:
            return span.start_s
        return planned.sent_s if planned is not None else -inf

    def _heads_until(self, time_s: float, missing: str | None) -> None:
        """Those that the first stage began before; their microbatches have left the last one."""
        while self.unwalked:
            head = self.unwalked[0]
            if not (head.start_s < time_s or head.end_s <= time_s):
                return
            self.unwalked.popleft()
            start = self._begun(head, self._rows_there(head))
            self._idle(head, start, missing)
            parts = head_parts(head) + [0.0] * (SIZE - NUM_PARTS)
            event = list(map(add, start, parts)), head.end_s
            self.head_ends[head.index] = event
            self.head_ends.pop(head.index - _KEPT, None)
            self._end(head, event)

    def _missing(self, planned: Planned) -> str | None:
        """Why microbatches are missing before it; None where as many are outstanding as there are
        stages. Paths may differ in steps all the same: two chains of microbatches that take turns
        have long histories of their own."""
        if any(planned.index == outage.next_index for outage in self.outages):
            return "fault"
        place = bisect_right(self.done_s, planned.start_s)
        latest = self.done[place - 1] if place else -1
        if planned.index - latest >= len(self.spans):
            return None
        if planned.waited_for == "kv":
            return "kv_full"
        if planned.num_waiting + planned.num_running < len(self.spans):
            return "no_requests"
        return "too_few_microbatches"

    def _plan(self, planned: Planned, missing: str | None) -> None:
        """The event of its plan."""
        vector, time_s = self.sent
        if missing == "fault":
            self.sent = later(vector, FAULT, planned.sent_s - time_s), planned.sent_s
            return
        if planned.after >= 0:
            vector, time_s = self._received(planned.after)
        elif planned.waited_for:  # for an arrival
            waited_s = planned.woken_s - time_s
            vector, time_s = later(vector, NO_REQUESTS, waited_s), planned.woken_s
        self.sent = later(vector, PLANNING, planned.sent_s - time_s), planned.sent_s

    def _start(self, span: Span, planned: Planned | None) -> Vector:
        """What led to the start: the last to be there of plan, input and the device itself."""
        vector, there_s = self.last[span.stage]
        if max(span.plan_s, span.input_s) > there_s:
            if span.plan_s >= span.input_s:
                vector, there_s = self._plan_there(span, planned), span.plan_s
            elif span.stage:
                vector, there_s = self._activations_there(span), span.input_s
            else:
                vector, there_s = self._tokens_there(span, planned), span.input_s
        return self._begun(span, (vector, there_s))

    def _begun(self, did: Span | Headed, there: PathEvent) -> Vector:
        """The start, of what had all that it needed."""
        vector, there_s = there
        lag_s = did.start_s - there_s
        own_s = lag_s if isnan(did.between_cpu_s) else min(lag_s, did.between_cpu_s)
        vector = later(vector, CONTROL, own_s)
        vector[JITTER] += lag_s - own_s
        return vector

    def _plan_there(self, span: Span, planned: Planned | None) -> Vector:
        if planned is None:
            return self._unknown(span.stage, span.plan_s)
        vector, sent_s = self.sent
        return later(vector, CONTROL, span.plan_s - sent_s)

    def _activations_there(self, span: Span) -> Vector:
        event = self.ends[span.stage - 1].get(span.index)
        if event is None:
            return self._unknown(span.stage, span.input_s)
        return later(event[0], LINK, span.input_s - event[1])

    def _tokens_there(self, span: Span, planned: Planned | None) -> Vector:
        """From the microbatch whose tokens came last."""
        chunks = planned.chunks if planned is not None else ()
        sources = {self.sampled_by.get(chunk.request_id, -1) for chunk in chunks}
        if not self.heads:  # the last stage tells of all in order
            sources = {max(sources, default=-1)}
        known = [sent for source in sources if (sent := self._tokens_sent(source)) is not None]
        if not known:
            return self._unknown(span.stage, span.input_s)
        vector, sent_s = max(known, key=itemgetter(1))
        return later(vector, FEEDBACK, span.input_s - sent_s)

    def _tokens_sent(self, index: int) -> PathEvent | None:
        event = self._sampled(index)
        if event is None:
            return None
        vector, end_s = event
        did = self.heads.get(index) or self.spans[-1][index]
        sent_s = min(did.sent_s, end_s)  # before it ended, if it also scored
        return later(vector, HEAD, sent_s - end_s), sent_s

    def _sampled(self, index: int) -> PathEvent | None:
        """The end of the microbatch, at the end of the pipeline that had its head."""
        return (self.head_ends if index in self.heads else self.ends[-1]).get(index)

    def _rows_there(self, head: Headed) -> PathEvent:
        """From the last stage, or, where the first one was busy until later, that."""
        free = self.last[head.stage]
        if head.input_s <= free[1]:
            return free
        event = self.ends[-1].get(head.index)
        if event is None:
            return self._unknown(head.stage, head.input_s), head.input_s
        return later(event[0], LINK, head.input_s - event[1]), head.input_s

    def _unknown(self, stage: int, time_s: float) -> Vector:
        vector, there_s = self.last[stage]
        return later(vector, UNKNOWN, time_s - there_s)

    def _end(self, did: Span | Headed, event: PathEvent) -> None:
        """No moment counts twice, also where damaged spans overlap or run backwards."""
        stage = did.stage
        free_s = self.last[stage][1]
        begin_s, end_s = max(did.start_s, free_s), min(did.end_s, self.stop_s)
        self.busy_s[stage] += max(end_s - begin_s, 0.0)
        self.last[stage] = event[0], max(did.end_s, did.start_s, free_s)

    def _received(self, index: int) -> PathEvent:
        """The driver took up a result: when it came, or when the driver had done what it was at:
        the latest plan, or, where that was sent before, something that kept it for a while."""
        completed, event = self.completed.get(index), self._sampled(index)
        vector, time_s = self.sent
        if completed is None:
            return self.sent
        received_s = completed.received_s
        if event is None:
            return later(vector, UNKNOWN, received_s - time_s), received_s
        if completed.waiting_s > event[1]:
            if event[1] > time_s:
                vector, time_s = event
            vector = later(vector, PLANNING, completed.waiting_s - time_s)
            return later(vector, CONTROL, received_s - completed.waiting_s), received_s
        return later(event[0], CONTROL, received_s - event[1]), received_s

    # ---- idle intervals -------------------------------------------------------------------------

    def _idle(self, did: Span | Headed, start: Vector, missing: str | None) -> None:
        """Between the stage's last end and this start."""
        stage = did.stage
        before, end_s = self.last[stage]
        if did.start_s <= end_s:
            return
        lost_s = self._lost_since(stage, did.index)
        if lost_s is not None:
            self._idle_by_fault(did, start, min(max(lost_s, end_s), did.start_s))
            return
        last_parts = self.last_parts[stage]
        difference = list(map(sub, start, before))
        if last_parts is None or missing == "drain":
            first = "fill" if self.is_whole else "unknown"
            edge = first if last_parts is None else "drain"
            split = divide(at_an_edge(difference), did.start_s - end_s)
            self._note(stage, did, end_s, did.start_s, by_cause(split, edge))
            return
        if missing is None:
            difference[STEPS] = 0.0
        wanted = list(map(add, step_by_step(difference, last_parts), self.carried[stage]))
        split = divide(wanted, did.start_s - end_s)
        self.carried[stage] = carry(wanted, split)
        self._note(
            stage,
            did,
            end_s,
            did.start_s,
            by_cause(split, missing or "too_few_microbatches"),
        )

    def _lost_since(self, stage: int, index: int) -> float | None:
        """When the stage's wait for this microbatch became one for a stage that was lost."""
        if not self.outages:
            return None
        behind = range(self.last_index[stage] + 1, index + 1)
        return min((o.from_s for o in self.outages if o.next_index in behind), default=None)

    def _idle_by_fault(self, did: Span | Headed, start: Vector, lost_s: float) -> None:
        """From the last sign of life of the stage that was lost, all is that fault's; what the wait
        had been for before that, the paths say."""
        stage = did.stage
        before, end_s = self.last[stage]
        difference = list(map(sub, start, before))
        difference[FAULT] = 0.0
        split = divide(at_an_edge(difference), lost_s - end_s)
        self._note(stage, did, end_s, lost_s, by_cause(split, "fault"))
        fault = [0.0] * SIZE
        fault[FAULT] = did.start_s - lost_s
        self._note(stage, did, lost_s, did.start_s, by_cause(fault, "fault"))
        self.carried[stage] = [0.0] * SIZE

    def _trailing(self, stage: int) -> None:
        """From the stage's last end to the end of the run."""
        before, end_s = self.last[stage]
        after, after_s = self._received(max(self.completed, default=-1))
        if self.last_parts[stage] is None or after_s < self.stop_s:
            is_fault = bool(self.outages) and self.outages[-1].fault.at_s >= after_s
            after = later(before, FAULT if is_fault else UNKNOWN, self.stop_s - end_s)
        split = divide(at_an_edge(list(map(sub, after, before))), self.stop_s - end_s)
        self._note(stage, None, end_s, self.stop_s, by_cause(split, "drain"))

    def _note(
        self,
        stage: int,
        did: Span | Headed | None,
        from_s: float,
        to_s: float,
        seconds: tuple[float, ...],
    ) -> None:
        """Keeps what lies inside the run; `did` ended it, or else the run's end."""
        begin_s, end_s = max(from_s, self.start_s), min(to_s, self.stop_s)
        inside_s = end_s - begin_s
        if inside_s <= 0:
            return
        if inside_s < to_s - from_s:
            share = inside_s / (to_s - from_s)
            seconds = tuple([value * share for value in seconds])
        index = -1 if did is None else did.index
        self.idle[stage].append(
            Idle(stage, index, begin_s, begin_s + inside_s, seconds, type(did) is Headed)
        )
