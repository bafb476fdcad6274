"""A recorded run: what was told of it, in memory. `writer.py` has it in files."""

import contextlib
import gc
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from math import inf
from typing import Any

import msgspec

from pipeserve.core.records import (
    Arrived,
    Completed,
    Ended,
    Fault,
    Headed,
    Ping,
    Planned,
    Record,
    Span,
)
from pipeserve.profiling.recording.packed import pack, unpack

_PAGE_BYTES = 1 << 16


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
    headed: list[Headed] = field(default_factory=list)
    """In the order in which the first stage applied them, between two of its spans."""
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
        Headed: recording.headed.append,
        Ping: recording.pings.append,
        Fault: recording.faults.append,
    }
    with no_collection():
        for record in records:
            if type(record) is Span:
                recording.spans[record.stage].append(record)
            else:
                lists[type(record)](record)
    return recording


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """While millions of tuples are made that all stay, and no cycles: they would be walked again
    and again, half of the time of reading a recording, a tenth of a simulation's."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Page(msgspec.Struct, gc=False):
    """A stretch of a run: its records, encoded one behind the other, each with a head."""

    data: bytearray | bytes
    """Bytes once the page is full."""
    num_records: int = 0
    latest_s: float = -inf
    """The latest end of a span, or of a head."""

    def __iter__(self) -> Iterator[Record]:
        return unpack(bytes(self.data))  # a copy: the page may grow meanwhile


class Ring:
    """Keeps the latest records; what a run is watched by while it goes on.

    They are kept encoded, in pages of bytes: the garbage collector would walk a million tuples
    again and again, and stop the run for it. Nothing grows beyond a page, so no call takes long.
    """

    def __init__(self, max_bytes: int = 64 << 20) -> None:
        """`max_bytes` bounds what is kept, but for the last record: a span takes 104 bytes, a
        decode in a microbatch 17, and twelve times as much when it is read. What is oldest is
        dropped page by page."""
        self._max_bytes = max_bytes
        self._page_bytes = min(_PAGE_BYTES, max_bytes // 8)
        self.clear()

    def take(self) -> "Ring":
        """All that is kept, in a ring of its own; this one forgets it."""
        taken = Ring(self._max_bytes)
        vars(taken).update(vars(self))
        self.clear()
        return taken

    def clear(self) -> None:
        """Forgets all, as if nothing had been recorded."""
        self._pages: deque[_Page] = deque()
        self._full_bytes = 0
        self.whole_from_s = -inf
        """The end of the latest span or head that was dropped: what came later is all there."""
        self._begin_page()

    def _begin_page(self) -> None:
        self._page = _Page(bytearray())
        self._pages.append(self._page)

    def record(self, record: Record) -> None:
        """The `Recorder`."""
        page = self._page
        pack(record, page.data)
        page.num_records += 1
        if type(record) in (Span, Headed) and record.end_s > page.latest_s:
            page.latest_s = record.end_s
        if len(page.data) >= self._page_bytes:
            self._turn_page()

    def _turn_page(self) -> None:
        self._page.data = bytes(self._page.data)  # without the room that it had to grow
        self._full_bytes += len(self._page.data)
        self._begin_page()
        while self._full_bytes + self._page_bytes > self._max_bytes:
            oldest = self._pages.popleft()
            self._full_bytes -= len(oldest.data)
            self.whole_from_s = max(self.whole_from_s, oldest.latest_s)

    def spans(self) -> list[Span]:
        """Of all stages, as they came."""
        return [record for record in self if type(record) is Span]

    @property
    def num_bytes(self) -> int:
        """What is kept."""
        return self._full_bytes + len(self._page.data)

    def __iter__(self) -> Iterator[Record]:
        return chain.from_iterable(self._pages)

    def __len__(self) -> int:
        return sum([page.num_records for page in self._pages])
