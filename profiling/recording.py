"""A recorded run: what was told of it, in memory. `recording_writer.py` has it in files."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import inf
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
        """`size` bounds records and their chunks together: about 200 bytes each."""
        self.size = size
        self.whole_from_s = -inf
        """The end of the latest span that was dropped: what came later is all there."""
        self._records: deque[Record] = deque()
        self._held = 0

    def record(self, record: Record) -> None:
        """The `Recorder`."""
        self._records.append(record)
        self._held += _size(record)
        while self._held > self.size:
            self._drop(self._records.popleft())

    def _drop(self, record: Record) -> None:
        self._held -= _size(record)
        if type(record) is Span:
            self.whole_from_s = max(self.whole_from_s, record.end_s)

    def clear(self) -> None:
        """Forgets all, as if nothing had been recorded."""
        self._records.clear()
        self._held = 0
        self.whole_from_s = -inf

    def spans(self) -> list[Span]:
        """Of all stages, as they came."""
        return [record for record in self._records if type(record) is Span]

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


def _size(record: Record) -> int:
    return 1 + len(record.chunks) if type(record) is Planned else 1
