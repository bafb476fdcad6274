"""What lay between computes in a recorded run: links, messages, planning, a stage's own work.

A message's time is seen only where its receiver stood and waited for it: what came while a stage
computed is stamped when the stage looks, later than it came. So each delay is the median over those
that were waited for; one that never was cannot be told, and it did not matter.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite

import numpy as np

from pipeserve.core.nouns import RequestId
from pipeserve.core.records import Headed, Planned, Span
from pipeserve.profiling.calibration.fit_tables import solve_relative
from pipeserve.profiling.recording.recording import Recording

_LEAST_SEEN = 3
_WAITED = 0.01
"""Share of a median span that a stage must have stood idle before what it waited for came."""


@dataclass(frozen=True, slots=True)
class Delays:
    """Seconds."""

    hops: tuple[tuple[float, float], ...]
    """Of each seam: a microbatch, and each of its tokens."""
    control_s: float
    """One message between the driver and a stage: the mean of there and back."""
    feedback_s: float
    """From the last stage's hand-over to stage 0."""
    planning_s: float
    """From what woke the driver to the plan's hand-over."""
    own_s: tuple[float, ...]
    """Of each stage, from one microbatch's end to the next one's start when all is there."""


def delays_of(recording: Recording) -> Delays:
    """Of a recording whose spans are on the driver's clock; 0 for what was never seen."""
    planned = {plan.index: plan for plan in recording.planned}
    spans = [{span.index: span for span in of_stage} for of_stage in recording.spans]
    headed = {head.index: head for head in recording.headed}
    sampled = {**spans[-1], **headed}
    tokens_back = {k: span for k, span in spans[-1].items() if k not in headed}
    lengths = [span.end_s - span.start_s for of_stage in recording.spans for span in of_stage]
    tolerance_s = _WAITED * float(np.median(lengths)) if lengths else 0.0
    sources = sources_of(recording.planned)
    control_s = _control_s(recording, planned, sampled, tolerance_s)
    feedback_s = _feedback_s(recording, tokens_back, sources, tolerance_s)
    if feedback_s is None:
        feedback_s = control_s
    hops = _hops(recording.spans, spans, tolerance_s)
    plan_there_s = {index: plan.sent_s + control_s for index, plan in planned.items()}
    inputs_there_s = [
        {
            k: source.sent_s + feedback_s * (source.index not in headed)
            if (source := sampled.get(sources.get(k, -1))) is not None
            else -inf
            for k in planned
        },
        *map(_arrivals_s, recording.spans, hops),
    ]
    return Delays(
        hops=hops,
        control_s=control_s,
        feedback_s=feedback_s,
        planning_s=_median([p.sent_s - p.woken_s for p in recording.planned]) or 0.0,
        own_s=tuple(
            _own_s(of_stage, plan_there_s, input_there_s)
            for of_stage, input_there_s in zip(recording.spans, inputs_there_s, strict=True)
        ),
    )


def _hops(
    by_stage: Sequence[Sequence[Span]], spans: Sequence[Mapping[int, Span]], tolerance_s: float
) -> tuple[tuple[float, float], ...]:
    seams = [
        _transfers(sender, receiver, tolerance_s)
        for sender, receiver in zip(spans, by_stage[1:], strict=False)
    ]
    pooled = [pair for seam in seams for pair in seam]
    return tuple(_fit_hop(seam if len(seam) >= _LEAST_SEEN else pooled) for seam in seams)


def _transfers(
    sender: Mapping[int, Span], receiver: Sequence[Span], tolerance_s: float
) -> list[tuple[int, float]]:
    """Tokens and seconds of those that were waited for. A link carries one microbatch at a time:
    while the one before is on its way, the next is not."""
    seen, link_free_s = [], -inf
    for span, free_s in _with_free_s(receiver):
        if span.index in sender and span.input_s > free_s + tolerance_s:
            sent_s = sender[span.index].sent_s
            seen.append((span.num_tokens, span.input_s - max(sent_s, link_free_s)))
            link_free_s = span.input_s
    return seen


def _fit_hop(seen: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Seconds of a microbatch and of each token."""
    pairs = [(tokens, seconds) for tokens, seconds in seen if seconds > 0]
    if not pairs:
        return 0.0, 0.0
    tokens, seconds = np.array(pairs, dtype=float).T
    alpha, beta = solve_relative(np.column_stack([np.ones(len(pairs)), tokens]), seconds)
    return float(alpha), float(beta)


def _control_s(
    recording: Recording,
    planned: Mapping[int, Planned],
    sampled: Mapping[int, Span | Headed],
    tolerance_s: float,
) -> float:
    there = [
        span.plan_s - planned[span.index].sent_s
        for span, free_s in _with_free_s(recording.spans[0], recording.headed)
        if span.index in planned and span.plan_s > free_s + tolerance_s
    ]
    back = [
        completed.received_s - sampled[completed.index].sent_s
        for completed in recording.completed
        if completed.index in sampled and completed.received_s > completed.waiting_s
    ]
    seen = [max(seconds, 0.0) for seconds in map(_median, (there, back)) if seconds is not None]
    return sum(seen) / len(seen) if seen else 0.0


def _feedback_s(
    recording: Recording,
    last: Mapping[int, Span],
    sources: Mapping[int, int],
    tolerance_s: float,
) -> float | None:
    seen = [
        span.input_s - last[sources[span.index]].sent_s
        for span, free_s in _with_free_s(recording.spans[0], recording.headed)
        if sources.get(span.index) in last and span.input_s > free_s + tolerance_s
    ]
    found = _median(seen)
    return None if found is None else max(found, 0.0)


def sources_of(planned: Sequence[Planned]) -> dict[int, int]:
    """Microbatch -> the latest one before it that samples a token that stage 0 embeds in it."""
    sampled_by: dict[RequestId, int] = {}
    sources = {}
    for plan in planned:
        found = max([sampled_by.get(chunk.request_id, -1) for chunk in plan.chunks], default=-1)
        if found >= 0:
            sources[plan.index] = found
        for chunk in plan.chunks:
            if chunk.samples:
                sampled_by[chunk.request_id] = plan.index
    return sources


def _arrivals_s(sender: Sequence[Span], hop: tuple[float, float]) -> dict[int, float]:
    """When the next stage has what this one sent, one after the other."""
    found, link_free_s = {}, -inf
    for span in sender:
        link_free_s = max(span.sent_s, link_free_s) + hop[0] + hop[1] * span.num_tokens
        found[span.index] = link_free_s
    return found


def _own_s(
    of_stage: Sequence[Span],
    plan_there_s: Mapping[int, float],
    input_there_s: Mapping[int, float],
) -> float:
    """Median from one span's end to the next one's start where all was there a span earlier; where
    that never happened, what a span that waited took to begin and to hand on."""
    sure = [
        span.start_s - before.end_s
        for before, span in pairwise(of_stage)
        if plan_there_s.get(span.index, inf) < before.start_s
        and input_there_s.get(span.index, inf) < before.start_s
    ]
    if len(sure) >= _LEAST_SEEN:
        return _median(sure)
    begin = _median([span.start_s - max(span.plan_s, span.input_s) for span in of_stage])
    hand_on = _median([span.sent_s - span.end_s for span in of_stage])
    return max((begin or 0.0) + (hand_on or 0.0), 0.0)


def _with_free_s(
    of_stage: Sequence[Span], heads: Sequence[Headed] = ()
) -> Iterator[tuple[Span, float]]:
    """Each span with when its stage was done with what it did before."""
    free_s = -inf
    for did in sorted([*of_stage, *heads], key=lambda did: did.start_s) if heads else of_stage:
        if isinstance(did, Span) and isfinite(did.start_s):
            yield did, free_s
        free_s = did.sent_s


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if len(values) else None
