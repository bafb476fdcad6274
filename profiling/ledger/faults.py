"""What a lost stage cost: the time until something was computed again, and what was computed a
second time."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipeserve.core.nouns import Chunk, RequestId
from pipeserve.core.records import Fault, Planned
from pipeserve.core.work import work_of
from pipeserve.profiling.ledger.step_parts import StepParts
from pipeserve.profiling.recording.recording import Recording


class Outage(NamedTuple):
    """A fault, and the time around it in which the pipeline did nothing for it."""

    fault: Fault
    from_s: float
    """The lost stage's last sign of life: the end of what it computed last, or when it was given
    what it did not come to compute."""
    next_index: int
    """Of the first microbatch behind it; none, where that is above all."""


class FaultCost(NamedTuple):
    """Of one fault; nothing of one that came while another was not over, whose cost it shares."""

    fault: Fault
    idle_s: float
    """From the last sign of life to the first new compute, or to the end of the run."""
    num_tokens: int
    """Positions whose KV was computed again."""
    again_s: tuple[float, ...]
    """What that took, of each stage."""


def outages_of(recording: Recording) -> list[Outage]:
    """In order of time."""
    sent_s = [planned.sent_s for planned in recording.planned]
    found = []
    for fault in recording.faults:
        place = bisect_left(sent_s, fault.at_s)
        planned = recording.planned
        next_index = planned[place].index if place < len(planned) else 1 << 62
        last_sign_s = _last_sign_s(recording, fault, planned[:place], next_index)
        found.append(Outage(fault, last_sign_s, next_index))
    return found


def _last_sign_s(
    recording: Recording, fault: Fault, planned: Sequence[Planned], next_index: int
) -> float:
    stage = fault.stage
    ends_s = [
        {span.index: span.end_s for span in spans if span.index < next_index}
        for spans in recording.spans[max(stage - 1, 0) : stage + 1]
    ]
    own_s = ends_s[-1]
    heads_s = [head.end_s for head in recording.headed if head.index < next_index and not stage]
    last = max(own_s, default=-1)
    owed = next((each for each in planned if each.index > last), None)
    given_s = fault.at_s
    if owed is not None:
        given_s = ends_s[0].get(owed.index, fault.at_s) if stage else owed.sent_s
    elif last not in {each.index for each in recording.completed}:
        given_s = float("-inf")  # all that was waited for since was a result that never came
    return min(max(own_s.get(last, given_s), given_s, *heads_s), fault.at_s)


def costs_of(
    recording: Recording, outages: Sequence[Outage], model: StepParts, stop_s: float
) -> list[FaultCost]:
    """Of each fault, by the run's own measurements of what steps take."""
    if not outages:
        return []
    firsts = {outage.next_index: outage for outage in reversed(outages)}
    spans = [{span.index: span for span in spans} for spans in recording.spans]
    heads = {head.index: head for head in recording.headed}
    tokens = dict.fromkeys(firsts, 0)
    again_s = {index: [0.0] * recording.num_stages for index in firsts}
    for planned, rest, since in _computed_again(recording, sorted(firsts)):
        tokens[since] += sum(c.stop - c.start for c in planned.chunks)
        tokens[since] -= sum(c.stop - c.start for c in rest.chunks)
        whole_s = map(sum, model.parts(work_of(planned)))
        rest_s = map(sum, model.parts(work_of(rest))) if rest.chunks else [0.0] * len(spans)
        for stage, (whole, less) in enumerate(zip(whole_s, rest_s, strict=True)):
            span = spans[stage].get(planned.index)
            if span is not None:
                share = 1.0 - min(less / whole, 1.0) if whole > 0 else 1.0
                again_s[since][stage] += share * (span.end_s - span.start_s)
        head = heads.get(planned.index)
        if head is not None and not any(chunk.samples for chunk in rest.chunks):
            again_s[since][0] += head.end_s - head.start_s
    costs = []
    for outage in outages:
        index = outage.next_index
        if firsts[index] is not outage:
            costs.append(FaultCost(outage.fault, 0.0, 0, (0.0,) * recording.num_stages))
            continue
        starts_s = [s.start_s for of_stage in recording.spans for s in of_stage if s.index >= index]
        idle_s = max(min(starts_s, default=stop_s) - outage.from_s, 0.0)
        costs.append(FaultCost(outage.fault, idle_s, tokens[index], tuple(again_s[index])))
    return costs


def _computed_again(
    recording: Recording, firsts: Sequence[int]
) -> Iterator[tuple[Planned, Planned, int]]:
    """Each microbatch with something in it that had been computed before a fault, what is left of
    it without that, and the first microbatch behind that fault."""
    completed = {entry.index for entry in recording.completed}
    reached: dict[RequestId, int] = {}
    again: dict[RequestId, int] = {}
    since, left = -1, list(firsts)
    for planned in recording.planned:
        while left and left[0] <= planned.index:
            since = left.pop(0)
            again.update(reached)
        rest = [
            chunk._replace(start=max(chunk.start, again[chunk.request_id]))
            if chunk.request_id in again
            else chunk
            for chunk in planned.chunks
        ]
        rest = [chunk for chunk in rest if chunk.start < chunk.stop]
        if tuple(rest) != planned.chunks:
            yield planned, planned._replace(chunks=tuple(rest)), since
        if planned.index in completed:
            _note_reached(planned.chunks, reached, again)


def _note_reached(
    chunks: Sequence[Chunk], reached: dict[RequestId, int], again: dict[RequestId, int]
) -> None:
    for chunk in chunks:
        request = chunk.request_id
        reached[request] = max(reached.get(request, 0), chunk.stop)
        if chunk.stop >= again.get(request, 0):
            again.pop(request, None)
