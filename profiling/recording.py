"""A recorded run: what was told of it, kept in memory."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeserve.core.records import Arrived, Completed, Ended, Fault, Ping, Planned, Record, Span


@dataclass(slots=True)
class Recording:
    """A whole run, in the order of indices; may lack what was lost."""

    meta: dict[str, Any]
    """What was run: documented in `docs/timeline.md`."""
    arrived: list[Arrived] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    planned: list[Planned] = field(default_factory=list)
    completed: list[Completed] = field(default_factory=list)
    spans: list[list[Span]] = field(default_factory=list)
    """Of each stage."""
    pings: list[Ping] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is missing, one line each."""

    @property
    def num_stages(self) -> int:
        return len(self.spans)


def recording_of(records: Iterable[Record], num_stages: int, meta: dict[str, Any]) -> Recording:
    """Sorted out by kind and stage; each kind keeps its order."""
    recording = Recording(meta, spans=[[] for _ in range(num_stages)])
    lists = {
        Arrived: recording.arrived.append,
        Ended: recording.ended.append,
        Planned: recording.planned.append,
        Completed: recording.completed.append,
        Ping: recording.pings.append,
        Fault: recording.faults.append,
    }
    for record in records:
        if type(record) is Span:
            recording.spans[record.stage].append(record)
        else:
            lists[type(record)](record)
    return recording


class Ring:
    """Keeps the latest records; what a run is watched by while it goes on."""

    def __init__(self, size: int = 1 << 20) -> None:
        self._records: deque[Record] = deque(maxlen=size)
        self.record = self._records.append
        """The `Recorder`."""
        self.clear = self._records.clear

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)
