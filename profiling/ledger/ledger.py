"""The bubble ledger: every idle interval of every stage, put down to causes that sum to the whole.

`critical_path.py` says how an interval is split.
"""

from dataclasses import dataclass
from operator import add

import numpy as np

from pipeserve.core.nouns import RequestId
from pipeserve.profiling.ledger.causes import CAUSES
from pipeserve.profiling.ledger.critical_path import Idle, Walk
from pipeserve.profiling.ledger.faults import FaultCost, costs_of
from pipeserve.profiling.recording.recording import Recording


@dataclass(frozen=True, slots=True)
class Ledger:
    """A recording, explained. Times in seconds of the driver's clock."""

    start_s: float
    """First arrival."""
    stop_s: float
    """Last token, or the fault that ended the run."""
    idle: tuple[list[Idle], ...]
    """Of each stage, by time. Intervals of no length are left out."""
    busy_s: tuple[float, ...]
    """Of each stage; with its idle intervals exactly `stop_s - start_s`."""
    faults: tuple[FaultCost, ...] = ()
    """What each cost, in order."""

    @property
    def seconds(self) -> float:
        """Wall time."""
        return self.stop_s - self.start_s

    def again_s(self, stage: int) -> float:
        """Of its busy seconds, those in which it computed what a fault had taken."""
        return sum([cost.again_s[stage] for cost in self.faults])

    def idle_s(self, stage: int) -> dict[str, float]:
        """Seconds of a stage by cause; every cause is there."""
        return dict(zip(CAUSES, _sum(self.idle[stage]), strict=True))

    def idle_shares(self, stage: int) -> dict[str, float]:
        """Shares of wall time by cause, of those that are over 0: `idle_by_cause` in `--json`."""
        idle_s = self.idle_s(stage)
        return {cause: value / self.seconds for cause, value in idle_s.items() if value > 0}

    def over_time(self, num_bins: int) -> np.ndarray:
        """Seconds, shape (stages, bins of equal length, causes)."""
        edges = np.linspace(self.start_s, self.stop_s, num_bins + 1)
        return np.array([_binned(idle, edges) for idle in self.idle])

    def by_microbatch(self) -> dict[int, tuple[float, ...]]:
        """Index -> seconds by cause that stages stood idle before it, all stages together."""
        found: dict[int, tuple[float, ...]] = {}
        for idle in self.idle:
            for interval in idle:
                before = found.get(interval.index)
                seconds = interval.seconds
                found[interval.index] = tuple(map(add, before, seconds)) if before else seconds
        found.pop(-1, None)
        return found

    def by_request(self, recording: Recording) -> dict[RequestId, tuple[float, ...]]:
        """Request -> seconds by cause that stages stood idle before its microbatches: SARATHI's
        bubble time of a request (arXiv:2308.16369, section 3.3), by cause."""
        idle_before = self.by_microbatch()
        row_of: dict[RequestId, int] = {}
        for planned in recording.planned:
            for chunk in planned.chunks:
                row_of.setdefault(chunk.request_id, len(row_of))
        totals = np.zeros((len(row_of), len(CAUSES)))
        for planned in recording.planned:
            seconds = idle_before.get(planned.index)
            if seconds is not None:
                totals[[row_of[chunk.request_id] for chunk in planned.chunks]] += seconds
        return {request: tuple(totals[row].tolist()) for request, row in row_of.items()}


def explain(recording: Recording) -> Ledger:
    """The ledger of a recording; of what is there of it, where something is missing.

    Spans are on the driver's clock (`clocks.align`). Raises ValueError without any span.
    """
    if not any(recording.spans):
        raise ValueError("the recording has no spans")
    walk = Walk(recording)
    walk.run()
    costs = costs_of(recording, walk.outages, walk.model, walk.stop_s)
    return Ledger(walk.start_s, walk.stop_s, tuple(walk.idle), tuple(walk.busy_s), tuple(costs))


def _sum(intervals: list[Idle]) -> list[float]:
    totals = [0.0] * len(CAUSES)
    for interval in intervals:
        totals = list(map(add, totals, interval.seconds))
    return totals


def _binned(intervals: list[Idle], edges: np.ndarray) -> np.ndarray:
    """Seconds, shape (bins, causes); an interval that an edge cuts is spread evenly."""
    totals = np.zeros((len(edges) - 1, len(CAUSES)))
    if not intervals:
        return totals
    starts = np.array([interval.start_s for interval in intervals])
    ends = np.array([interval.end_s for interval in intervals])
    seconds = np.array([interval.seconds for interval in intervals])
    # Of the intervals so far, by time: linear within an interval, level between two.
    times = np.column_stack([starts, ends]).ravel()
    sums = seconds.cumsum(axis=0)
    for cause in np.flatnonzero(sums[-1] > 0):
        reached = np.column_stack([sums[:, cause] - seconds[:, cause], sums[:, cause]]).ravel()
        totals[:, cause] = np.diff(np.interp(edges, times, reached))
    return totals
