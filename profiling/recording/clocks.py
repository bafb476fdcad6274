"""The clocks of several machines, brought to the driver's.

What a stage's clock is ahead of the driver's is taken as a line over the run: offset and drift. No
message arrives before it is sent, so each one bounds the lines from one side: a ping and its answer
from both, and so do plans, activations, sampled tokens and results. Of all lines within the bounds
those are taken that keep the greatest least distance to them (as in Moon, Skelly and Towsley,
"Estimation and removal of clock skew from network delay measurements", INFOCOM 1999, for one
direction); all machines at once, because messages between two of them bound their lines together.
The stages of one machine have one clock, which goes by the first of them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import isfinite
from typing import NamedTuple, TypeVar

import numpy as np

from pipeserve.core.records import Headed, Span
from pipeserve.profiling.recording.recording import Recording

MAX_DRIFT = 500e-6
"""Seconds a second, of one clock against another: as much as NTP slews a clock; quartz alone drifts
by less than 100e-6."""
_DRIVER = -1
_BINS = 400  # of a run: of the messages in one, those that bound the most are enough
_ROUNDS = 20
_TOLERANCE_S = 1e-9
_TIMES = ("plan_s", "input_s", "start_s", "head_s", "end_s", "sent_s")
"""By the stage's clock, of a span or a head."""


_Did = TypeVar("_Did", Span, Headed)


class Aligned(NamedTuple):
    """A recording on one clock."""

    recording: Recording
    residuals_s: tuple[float, ...]
    """Of each stage: its times are at most so far off, if its clock runs evenly; 0 on the driver's
    machine. With violated bounds, by how much those are is in it."""


class _Messages(NamedTuple):
    """From one machine to another; each was sent before it was received. Stages or `_DRIVER`, and
    times of their clocks, shape (messages,)."""

    sender: int
    receiver: int
    sent_s: np.ndarray
    received_s: np.ndarray


class _Line(NamedTuple):
    """How far a clock is ahead: `start_s` at `from_s` of its own time, `stop_s` at `to_s`."""

    from_s: float
    to_s: float
    start_s: float
    stop_s: float

    def shares(self, times_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of `start_s` and `stop_s` in the offset at those times."""
        stop = (times_s - self.from_s) / (self.to_s - self.from_s)
        return 1.0 - stop, stop

    def offset_s(self, times_s: np.ndarray) -> np.ndarray:
        start, stop = self.shares(times_s)
        return self.start_s * start + self.stop_s * stop


def align(recording: Recording) -> Aligned:
    """Spans on the driver's clock. A stage without pings is on the driver's machine: untouched.

    Says in the notes how well the clocks are known, or that a line does not explain them.
    """
    pinged = {ping.stage for ping in recording.pings}
    stages = [s for s, spans in enumerate(recording.spans) if s in pinged and spans]
    if not stages:
        return Aligned(recording, (0.0,) * recording.num_stages)
    clocks = _clocks(recording, stages)
    messages = _between(clocks, _messages(recording, stages))
    guesses = _guesses(recording, clocks)
    found, residuals_s, violation_s = _fit(messages, guesses)
    lines = dict(zip(guesses, found, strict=True))
    spans = [
        _moved(own, lines[clocks[stage]]) if stage in clocks else own
        for stage, own in enumerate(recording.spans)
    ]
    headed = recording.headed
    if headed and 0 in clocks:
        headed = _moved(headed, lines[clocks[0]])
    notes = [*recording.notes, _note(stages, residuals_s, violation_s)]
    by_clock = dict(zip(guesses, residuals_s, strict=True))
    return Aligned(
        replace(recording, spans=spans, headed=headed, notes=notes),
        tuple(by_clock.get(clocks.get(s, _DRIVER), 0.0) for s in range(recording.num_stages)),
    )


def _clocks(recording: Recording, stages: list[int]) -> dict[int, int]:
    """Of each of these stages, the first one that has the same clock; where the recording does not
    say which have, each has its own."""
    machines = recording.meta.get("machines") or range(recording.num_stages)
    first: dict[int, int] = {}
    return {stage: first.setdefault(machines[stage], stage) for stage in stages}


def _between(clocks: dict[int, int], messages: Iterable[_Messages]) -> list[_Messages]:
    """By clocks in place of stages; what one clock has timed at both ends says nothing of it."""
    moved = [
        message._replace(
            sender=clocks.get(message.sender, _DRIVER),
            receiver=clocks.get(message.receiver, _DRIVER),
        )
        for message in messages
    ]
    return [each for each in moved if len(each.sent_s) and each.sender != each.receiver]


def _note(stages: list[int], residuals_s: list[float], violation_s: float) -> str:
    names = ", ".join(map(str, stages))
    within = f"to within {max(residuals_s) * 1e3:.3f} ms"
    if violation_s > _TOLERANCE_S:
        return (
            f"the clocks of stages {names} do not run evenly: aligned {within}, with messages "
            f"received up to {violation_s * 1e3:.3f} ms before they were sent"
        )
    return f"the clocks of stages {names} are aligned to the driver's {within}"


def _moved(dids: list[_Did], line: _Line) -> list[_Did]:
    names = [name for name in _TIMES if hasattr(dids[0], name)]
    times_s = np.array([[getattr(did, name) for name in names] for did in dids])
    known = np.isfinite(times_s)
    times_s[known] -= line.offset_s(times_s[known])
    return [
        did._replace(**dict(zip(names, row, strict=True)))
        for did, row in zip(dids, times_s.tolist(), strict=True)
    ]


# ---- messages -----------------------------------------------------------------------------------


def _messages(recording: Recording, stages: list[int]) -> Iterator[_Messages]:
    """All between two machines that is in the recording. A plan or an input is there by the start
    that needs it; when it came is stamped early where it came while the stage computed.

    Where both ends have the head, the tokens of a microbatch come from the one that applied it."""
    starts_s = [{span.index: span.start_s for span in spans} for spans in recording.spans]
    for stage in stages:
        pings = [ping for ping in recording.pings if ping.stage == stage]
        remote_s = [ping.remote_s for ping in pings]
        yield _made(_DRIVER, stage, [ping.sent_s for ping in pings], remote_s)
        yield _made(stage, _DRIVER, remote_s, [ping.received_s for ping in pings])
        sent_s = {planned.index: planned.sent_s for planned in recording.planned}
        yield _matched(_DRIVER, stage, sent_s, starts_s[stage])
    last = recording.num_stages - 1
    sent = [{span.index: span.sent_s for span in spans} for spans in recording.spans]
    for stage in range(last):
        if stage in stages or stage + 1 in stages:
            yield _matched(stage, stage + 1, sent[stage], starts_s[stage + 1])
    received_s = {completed.index: completed.received_s for completed in recording.completed}
    heads = {head.index: head for head in recording.headed}
    ends = {last: {index: at_s for index, at_s in sent[last].items() if index not in heads}}
    if heads:
        ends[0] = {index: head.sent_s for index, head in heads.items()}
    sources = [(p.index, c.token_from) for p in recording.planned for c in p.chunks]
    for end, sent_s in ends.items():
        if end in stages:
            yield _matched(end, _DRIVER, sent_s, received_s)
        if last and (last in stages or 0 in stages):
            fed = {i: sent_s[source] for i, source in sources if source in sent_s}
            yield _matched(end, last - end, fed, starts_s[last - end])
    if last and (last in stages or 0 in stages):
        rows = {index: sent[last][index] for index in heads if index in sent[last]}
        yield _matched(last, 0, rows, {index: head.start_s for index, head in heads.items()})


def _matched(
    sender: int, receiver: int, sent_s: dict[int, float], received_s: dict[int, float]
) -> _Messages:
    """Of the microbatches that both have."""
    both = [
        (sent_s[index], there_s)
        for index, there_s in received_s.items()
        if index in sent_s and isfinite(there_s)
    ]
    return _made(sender, receiver, [s for s, _ in both], [r for _, r in both])


def _made(sender: int, receiver: int, sent_s: list[float], received_s: list[float]) -> _Messages:
    return _Messages(sender, receiver, np.array(sent_s), np.array(received_s))


# ---- lines --------------------------------------------------------------------------------------


def _guesses(recording: Recording, clocks: dict[int, int]) -> dict[int, _Line]:
    """Level, at the middle of the quickest ping; over the time that its stages are heard of."""
    guesses = {}
    for clock in dict.fromkeys(clocks.values()):
        pings = [ping for ping in recording.pings if clocks.get(ping.stage) == clock]
        best = min(pings, key=lambda ping: ping.received_s - ping.sent_s)
        offset_s = best.remote_s - (best.sent_s + best.received_s) / 2
        spans = [recording.spans[stage] for stage, own in clocks.items() if own == clock]
        from_s = min(*(each[0].start_s for each in spans), *(ping.remote_s for ping in pings))
        to_s = max(*(each[-1].end_s for each in spans), *(ping.remote_s for ping in pings))
        guesses[clock] = _Line(from_s, max(to_s, from_s + 1.0), offset_s, offset_s)
    return guesses


def _fit(
    messages: list[_Messages], guesses: dict[int, _Line]
) -> tuple[list[_Line], list[float], float]:
    """Lines and residuals in the order of `guesses`, and by how much a bound is violated.

    What is fitted is by how much `start_s` and `stop_s` differ from the guess.
    """
    rows, slacks = zip(*(_bounds(m, guesses) for m in messages), strict=True)
    kept = [_tightest(m, slack) for m, slack in zip(messages, slacks, strict=True)]
    num = 2 * len(guesses)
    drift, allowed = _drift_bounds(guesses)
    for _ in range(_ROUNDS):
        matrix = np.concatenate([drift, *(r[k] for r, k in zip(rows, kept, strict=True))])
        bounds = np.concatenate([allowed, *(s[k] for s, k in zip(slacks, kept, strict=True))])
        is_message = (np.arange(len(bounds)) >= len(allowed)).astype(float)
        widest = 2 * float(np.abs(bounds).max()) + 1.0
        with_distance = np.column_stack([matrix, is_message])
        *found, distance = _maximise(np.eye(num + 1)[num], with_distance, bounds, widest)
        over = [r @ found - s for r, s in zip(rows, slacks, strict=True)]
        late = [np.flatnonzero(o > max(-distance, 0.0) + _TOLERANCE_S) for o in over]
        if not any(map(len, late)):
            break
        kept = [np.union1d(k, more) for k, more in zip(kept, late, strict=True)]
    violation_s = max(-distance, 0.0)
    bounds = bounds + is_message * (violation_s + _TOLERANCE_S)
    lines, residuals_s = [], []
    for place, line in enumerate(guesses.values()):
        ends = [2 * place, 2 * place + 1]
        lines.append(line._replace(start_s=line.start_s + found[ends[0]],
                                   stop_s=line.stop_s + found[ends[1]]))  # fmt: skip
        far = [_farthest(end, found[end], matrix, bounds, widest) for end in ends]
        residuals_s.append(float(max(far) + violation_s))
    return lines, residuals_s, violation_s


def _farthest(
    end: int, found_s: float, matrix: np.ndarray, bounds: np.ndarray, widest: float
) -> float:
    """From what was found to the farthest that is within the bounds. A line's distance to another
    is greatest at one of their ends."""
    axis = np.eye(matrix.shape[1])[end]
    most = _maximise(axis, matrix, bounds, widest)[end]
    least = _maximise(-axis, matrix, bounds, widest)[end]
    return max(most - found_s, found_s - least)


def _bounds(messages: _Messages, guesses: dict[int, _Line]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and slacks of: received - sent >= 0 on the driver's clock, by the lines."""
    rows = np.zeros((len(messages.sent_s), 2 * len(guesses)))
    slack = messages.received_s - messages.sent_s
    ends = (messages.receiver, messages.received_s, 1.0), (messages.sender, messages.sent_s, -1.0)
    for stage, times_s, sign in ends:
        if stage in guesses:
            line = guesses[stage]
            slack -= sign * line.offset_s(times_s)
            place = 2 * list(guesses).index(stage)
            rows[:, place], rows[:, place + 1] = (sign * share for share in line.shares(times_s))
    return rows, slack


def _drift_bounds(guesses: dict[int, _Line]) -> tuple[np.ndarray, np.ndarray]:
    rows, allowed = [], []
    for place, line in enumerate(guesses.values()):
        row = np.zeros(2 * len(guesses))
        row[2 * place : 2 * place + 2] = -1.0, 1.0
        rows += [row, -row]
        allowed += [MAX_DRIFT * (line.to_s - line.from_s)] * 2
    return np.array(rows), np.array(allowed)


def _tightest(messages: _Messages, slack: np.ndarray) -> np.ndarray:
    """Places of those that leave the least slack, one for each part of the run."""
    times_s = messages.sent_s
    share = (times_s - times_s.min()) / max(np.ptp(times_s), 1e-9)
    part = np.minimum((share * _BINS).astype(int), _BINS - 1)
    order = np.lexsort((slack, part))
    return np.sort(order[np.unique(part[order], return_index=True)[1]])


def _maximise(
    objective: np.ndarray, matrix: np.ndarray, bounds: np.ndarray, widest: float
) -> np.ndarray:
    """The x with the greatest `objective @ x` where `matrix @ x <= bounds` and |x| <= `widest`.

    The dual simplex method: few unknowns, and of the many bounds the one that is violated most
    enters the basis.
    """
    num = len(objective)
    # Slightly uneven, so that no step is of length 0 and nothing goes in circles.
    objective = objective + 1e-9 * np.arange(1, num + 1) * np.where(objective < 0, -1.0, 1.0)
    box = np.diag(np.where(objective < 0, -1.0, 1.0))
    matrix = np.concatenate([box, -box, matrix])
    bounds = np.concatenate([np.full(2 * num, widest), bounds])
    basis = np.arange(num)
    while True:
        point = np.linalg.solve(matrix[basis], bounds[basis])
        over = matrix @ point - bounds
        over[basis] = 0.0
        enters = int(over.argmax())
        if over[enters] <= 1e-12:
            return point
        weights = np.linalg.solve(matrix[basis].T, objective)
        change = np.linalg.solve(matrix[basis].T, matrix[enters])
        rising = change > 1e-12
        if not rising.any():
            return point  # no x is within all bounds: only by rounding, see `_fit`
        ratios = np.where(rising, np.maximum(weights, 0.0), np.inf) / np.where(rising, change, 1.0)
        basis[int(ratios.argmin())] = enters
