"""The ledger of a run that goes on: seconds of each stage by cause, added up piece by piece.

A piece is explained together with the end of what came before it, for waiting begins long before it
shows. Nothing else of the past is kept, however long the run is.
"""

from collections import deque
from collections.abc import Iterable, Sequence

from pipeserve.core.records import (
    Arrived,
    Completed,
    Ended,
    Headed,
    Ping,
    Planned,
    Record,
    Span,
)
from pipeserve.profiling.ledger.causes import CAUSES
from pipeserve.profiling.ledger.ledger import Ledger, explain
from pipeserve.profiling.recording.clocks import align
from pipeserve.profiling.recording.recording import recording_of

COMPUTING = "computing"
_HISTORY_S = 2.0
"""What the next piece is explained with."""
_PINGS_S = 60.0
"""Pings are rare, and clocks drift slowly."""
_MOST_RECORDS = 50_000
"""At once: of stages so fast that a piece has more, the oldest count as unknown."""
_SETTLED_S = 0.5
"""After this long without a record, nothing is on its way to the driver."""


class RunningLedger:
    """Takes records as they come. Times in seconds of the driver's clock."""

    def __init__(self, num_stages: int, now: float) -> None:
        self.seconds = [dict.fromkeys((COMPUTING, *CAUSES), 0.0) for _ in range(num_stages)]
        """Of each stage, since `now`: up to the end of its last microbatch, or, while there is
        nothing to serve, up to the latest `advance`."""
        self._known_s = [now] * num_stages
        """Up to when the seconds of each stage are."""
        self._recent: deque[Record] = deque()
        self._pings: deque[Ping] = deque()
        self._has_new_spans = False
        self._latest_s = now
        self._last_planned = self._last_completed = -1

    def take(self, record: Record) -> None:
        """In the order in which they were told."""
        match record:
            case Ping():
                self._pings.append(record)
                return
            case Ended():
                return
            case Arrived():  # the first one tells when the run began
                if self._last_planned < 0 and not self._recent:
                    self._recent.append(record)
                return
            case Planned():
                self._latest_s, self._last_planned = record.sent_s, record.index
            case Completed():
                self._latest_s, self._last_completed = record.done_s, record.index
            case Span():
                self._has_new_spans = True
        self._recent.append(record)
        if len(self._recent) > _MOST_RECORDS:
            self._recent.popleft()

    def miss(self) -> None:
        """Records are missing between the last and the next: time that they told of is unknown."""
        self._recent.clear()

    def advance(self, now: float) -> None:
        """Add up what was told since the last time."""
        if self._has_new_spans and any(type(record) is Span for record in self._recent):
            recent: Sequence[Record] = self._recent
            if self._last_planned != self._last_completed:
                recent = without_open_heads(recent)
            recording = recording_of([*recent, *self._pings], len(self.seconds), {})
            ledger = explain(align(recording).recording)
            for stage in range(len(self.seconds)):
                self._add(stage, ledger)
            self._has_new_spans = False
            self._forget()
        if self._last_planned == self._last_completed and now - self._latest_s > _SETTLED_S:
            for stage in range(len(self.seconds)):
                self._pass_time(stage, now, "no_requests")

    def _add(self, stage: int, ledger: Ledger) -> None:
        """What is new of it, up to its last end: what it waits for then is not known yet."""
        idle = ledger.idle[stage]
        stop_s = idle[-1].start_s if idle and idle[-1].index < 0 else ledger.stop_s
        is_first = type(self._recent[0]) is Arrived
        self._pass_time(
            stage, min(ledger.start_s, stop_s), "no_requests" if is_first else "unknown"
        )
        seconds, known_s = self.seconds[stage], self._known_s[stage]
        left_s = stop_s - known_s
        if left_s <= 0:
            return
        for interval in idle:
            inside_s = min(interval.end_s, stop_s) - max(interval.start_s, known_s)
            if inside_s > 0:
                left_s -= inside_s
                share = inside_s / (interval.end_s - interval.start_s)
                for cause, cause_s in zip(CAUSES, interval.seconds, strict=True):
                    seconds[cause] += cause_s * share
        seconds[COMPUTING] += max(left_s, 0.0)
        self._known_s[stage] = stop_s

    def _pass_time(self, stage: int, until_s: float, cause: str) -> None:
        passed_s = until_s - self._known_s[stage]
        if passed_s > 0:
            self.seconds[stage][cause] += passed_s
            self._known_s[stage] = until_s

    def _forget(self) -> None:
        recent, since_s = self._recent, self._latest_s - _HISTORY_S
        while recent and _told_s(recent[0]) < since_s:
            recent.popleft()
        while self._pings and self._pings[0].received_s < self._latest_s - _PINGS_S:
            self._pings.popleft()


def without_open_heads(records: Iterable[Record]) -> list[Record]:
    """Of a run that goes on: without heads behind the first stage's last span. What that stage
    waits for around them is not known yet, just as behind its last span."""
    kept = list(records)
    spans = (p for p, record in enumerate(kept) if type(record) is Span and record.stage == 0)
    last = max(spans, default=0)
    return [*kept[:last], *(record for record in kept[last:] if type(record) is not Headed)]


def _told_s(record: Record) -> float:
    """About when: spans may be of another clock, and go with what was told before them."""
    match record:
        case Planned():
            return record.sent_s
        case Completed():
            return record.done_s
        case Arrived():
            return record.at_s
    return float("-inf")
