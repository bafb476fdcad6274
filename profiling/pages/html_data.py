"""A recording and its ledger as the page of `html_report` reads them: columns, compact.

Times are whole ticks since the ledger's start (a microsecond, or more in runs over an hour), as a
gap and a duration for each block of a row. The page adds them up again, so nothing drifts.
"""

import base64
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import msgspec
import numpy as np

from pipeserve.core.nouns import Chunk
from pipeserve.core.records import Completed, Headed, Planned, Span
from pipeserve.profiling.ledger.causes import CAUSES
from pipeserve.profiling.ledger.critical_path import Idle
from pipeserve.profiling.ledger.ledger import Ledger
from pipeserve.profiling.recording.recording import Recording

DECODE, MIXED, PREFILL, UNKNOWN = range(4)  # kinds of microbatch
PLANNING, COMPLETING = range(2)  # kinds of the driver's blocks
BLOCK = 256
"""Microbatches whose details are packed together."""
_MAX_TICKS = 2**32 - 1
_SHARES = 255  # a whole interval
_MOST = 2.0**53  # of JavaScript's whole numbers; what is beyond is damaged


class PackedColumns:
    """Arrays, put behind each other into one piece of text."""

    def __init__(self) -> None:
        self.layout: dict[str, tuple[int, int, int]] = {}
        """Name -> offset and length in bytes, bytes for each value."""
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, name: str, values: np.ndarray) -> None:
        """Whole numbers: uint8 as they are; others as uint32, all first bytes first, which
        compresses better."""
        if values.dtype == np.uint8:
            part = values.tobytes()
        else:
            planes = np.ascontiguousarray(values, "<u4").view(np.uint8).reshape(-1, 4)
            part = np.ascontiguousarray(planes.T).tobytes()
        self.layout[name] = (self._size, len(part), 1 if values.dtype == np.uint8 else 4)
        self._parts.append(part)
        self._size += len(part)

    def text(self) -> str:
        return pack(b"".join(self._parts))


def pack(data: bytes) -> str:
    """Deflated, as base64."""
    return base64.b64encode(zlib.compress(data, 6)).decode("ascii")


class PageClock(NamedTuple):
    """Seconds of the recording as ticks of the page."""

    start_s: float
    tick_s: float
    stop: int

    @classmethod
    def of(cls, ledger: Ledger) -> "PageClock":
        tick_s = 1e-6
        while ledger.seconds / tick_s > _MAX_TICKS:
            tick_s *= 10
        return cls(ledger.start_s, tick_s, round(ledger.seconds / tick_s))

    def ticks(self, times_s: Sequence[float] | np.ndarray) -> np.ndarray:
        """int64; what is outside of the ledger's window is brought to its edge."""
        ticks = np.rint((np.asarray(times_s, float) - self.start_s) / self.tick_s)
        return np.nan_to_num(np.clip(ticks, 0, self.stop)).astype(np.int64)


# ---- rows -------------------------------------------------------------------------------------


def microbatch_indices(recording: Recording) -> np.ndarray:
    """All that are named anywhere, in order; elsewhere on the page they go by their place here."""
    found = {planned.index for planned in recording.planned}
    for spans in recording.spans:
        found.update([span.index for span in spans])
    found.update([head.index for head in recording.headed])
    return np.array(sorted(found), np.int64)


def add_stage(
    columns: PackedColumns,
    name: str,
    spans: list[Span],
    idle: list[Idle],
    clock: PageClock,
    all_: np.ndarray,
    heads: Sequence[Headed] = (),
) -> None:
    """A stage's blocks, and what the gap before each is put down to; the last gap is the end. A
    head by itself is a block, too."""
    blocks = sorted([*spans, *heads], key=lambda did: did.start_s)
    starts = clock.ticks([did.start_s for did in blocks])
    ends = clock.ticks([did.end_s for did in blocks])
    numbers = [did.index for did in blocks]
    are_heads = [type(did) is Headed for did in blocks]
    places = np.searchsorted(all_, np.array(numbers, np.int64))
    _add_blocks(columns, name, starts, ends, places, clock)
    columns.add(f"{name}.head", np.array(are_heads, np.uint8))
    seconds_of = {(interval.index, interval.before_head): interval.seconds for interval in idle}
    none = (0.0,) * len(CAUSES)
    keys = [*zip(numbers, are_heads, strict=True), (-1, False)]
    rows = [seconds_of.get(key, none) for key in keys]
    _add_shares(columns, name, np.array(rows))


def add_driver(
    columns: PackedColumns, recording: Recording, clock: PageClock, all_: np.ndarray
) -> None:
    """Plans made and completions taken up."""
    blocks = [(p.start_s, p.sent_s, p.index, PLANNING) for p in recording.planned]
    blocks += [(c.received_s, c.done_s, c.index, COMPLETING) for c in recording.completed]
    blocks.sort()
    starts, ends, numbers, kinds = zip(*blocks, strict=True) if blocks else ((), (), (), ())
    places = np.searchsorted(all_, np.array(numbers, np.int64))
    _add_blocks(columns, "driver", clock.ticks(starts), clock.ticks(ends), places, clock)
    columns.add("driver.kind", np.array(kinds, np.uint8))


def _add_blocks(
    columns: PackedColumns,
    name: str,
    starts: np.ndarray,
    ends: np.ndarray,
    places: np.ndarray,
    clock: PageClock,
) -> None:
    ends = np.maximum.accumulate(np.maximum(ends, starts))
    before = np.concatenate([[0], ends])
    starts = np.maximum(starts, before[:-1])  # a damaged recording may have blocks that overlap
    columns.add(f"{name}.gap", np.append(starts, clock.stop) - before)
    columns.add(f"{name}.length", ends - starts)
    columns.add(f"{name}.place", places)


def _add_shares(columns: PackedColumns, name: str, seconds: np.ndarray) -> None:
    """For each gap: how many causes it has, which, and the share of each in 255ths."""
    totals = seconds.sum(axis=1, keepdims=True)
    parts = seconds / np.where(totals > 0, totals, 1.0) * _SHARES
    whole = np.floor(parts)
    missing = (np.rint(parts.sum(axis=1)) - whole.sum(axis=1)).astype(int)
    ranks = np.argsort(np.argsort(-(parts - whole), axis=1, kind="stable"), axis=1)
    shares = (whole + (ranks < missing[:, None])).astype(np.uint8)
    present = shares > 0
    columns.add(f"{name}.causes", present.sum(axis=1).astype(np.uint8))
    columns.add(f"{name}.cause", np.nonzero(present)[1].astype(np.uint8))
    columns.add(f"{name}.share", shares[present])


def add_microbatches(columns: PackedColumns, recording: Recording, all_: np.ndarray) -> None:
    """Index, kind and tokens of each, by place."""
    kinds = np.full(len(all_), UNKNOWN, np.uint8)
    tokens = np.zeros(len(all_), np.int64)
    places = np.searchsorted(all_, [planned.index for planned in recording.planned])
    for place, planned in zip(places.tolist(), recording.planned, strict=True):
        kinds[place], tokens[place] = kind_of(planned), _num_tokens(planned)
    columns.add("microbatch.index", np.diff(all_, prepend=0))
    columns.add("microbatch.kind", kinds)
    columns.add("microbatch.tokens", tokens)


def kind_of(planned: Planned) -> int:
    """By its chunks: those of one position are decodes."""
    decodes = sum([chunk.stop - chunk.start == 1 for chunk in planned.chunks])
    if decodes == len(planned.chunks):
        return DECODE
    return MIXED if decodes else PREFILL


def _num_tokens(planned: Planned) -> int:
    return sum([chunk.stop - chunk.start for chunk in planned.chunks])


def add_queues(
    columns: PackedColumns, recording: Recording, num_blocks: int, clock: PageClock
) -> None:
    """What stood after each plan: KV blocks in use, requests that run and that wait."""
    planned = recording.planned
    times = np.maximum.accumulate(clock.ticks([plan.sent_s for plan in planned]))
    columns.add("queue.at", np.diff(times, prepend=0))
    used = [max(num_blocks - plan.num_free_blocks, 0) for plan in planned]
    columns.add("queue.kv", np.array(used, np.int64))
    columns.add("queue.running", np.array([plan.num_running for plan in planned], np.int64))
    columns.add("queue.waiting", np.array([plan.num_waiting for plan in planned], np.int64))


# ---- details ----------------------------------------------------------------------------------


def details(recording: Recording, clock: PageClock, all_: np.ndarray) -> Iterator[str]:
    """What the page shows of a single microbatch, `BLOCK` of them a line; read when wanted."""
    plans = {plan.index: plan for plan in recording.planned}
    completed = {done.index: done for done in recording.completed}
    stages = [_StageDetails(spans, clock, all_) for spans in recording.spans]
    for first in range(0, len(all_), BLOCK):
        indices = all_[first : first + BLOCK].tolist()
        of_block = [plans.get(index) for index in indices]
        results = [completed.get(index) for index in indices]
        block = {
            "plans": [
                plan and _plan_row(plan, done, clock)
                for plan, done in zip(of_block, results, strict=True)
            ],
            "spans": [stage.columns(first, first + len(indices)) for stage in stages],
            "chunks": chunk_columns(of_block, results),
        }
        yield pack(msgspec.json.encode(block))


def _plan_row(plan: Planned, done: Completed | None, clock: PageClock) -> list[Any]:
    moments = clock.ticks([plan.woken_s, plan.start_s, plan.sent_s]).tolist()
    predicted = [round(seconds / clock.tick_s) for seconds in plan.predicted_s]
    taken_up = done and clock.ticks([done.waiting_s, done.received_s, done.done_s]).tolist()
    return [plan.waited_for, plan.after, *moments, plan.num_free_blocks, predicted, taken_up]


class _StageDetails:
    """What a stage's spans tell beside start and end, by place; times relative to these, so that
    numbers are short."""

    def __init__(self, spans: list[Span], clock: PageClock, all_: np.ndarray) -> None:
        times = np.array([span[3:11] for span in spans], float).reshape(-1, 8).T
        plan, input_, start, head, end, sent, cpu, _ = times
        lengths = {
            "length": end - start,
            "plan": start - plan,
            "input": start - input_,
            "head": end - head,
            "sent": sent - end,
            "cpu": cpu,
            "summed": np.array([span.all_reduce_s for span in spans]),
            "waited": np.array([span.rank_wait_s for span in spans]),
        }
        ticks = {name: values / clock.tick_s for name, values in lengths.items()}
        ticks["bytes"] = np.array([span.num_bytes for span in spans], float)
        places = np.searchsorted(all_, [span.index for span in spans])
        self._columns = {name: np.full(len(all_), np.nan) for name in ticks}
        for name, values in ticks.items():
            self._columns[name][places] = np.rint(values)

    def columns(self, first: int, stop: int) -> dict[str, list[int | None]]:
        """None where there is no span, and for what a span does not know."""
        return {name: _whole(values[first:stop]) for name, values in self._columns.items()}


def _whole(values: np.ndarray) -> list[int | None]:
    known = np.isfinite(values)
    numbers = np.where(known, values, 0.0).clip(-_MOST, _MOST).astype(np.int64).tolist()
    if known.all():
        return numbers
    return [number if is_known else None for number, is_known in zip(numbers, known, strict=True)]


def chunk_columns(
    plans: Sequence[Planned | None], results: Sequence[Completed | None]
) -> dict[str, list[int]]:
    """Requests (the difference to the chunk before), lengths, starts (the difference to where the
    request's chunk before stopped, 0 for the first), and tokens that were sampled (0 of what was
    not completed): in a run of decodes, nearly all are equal.
    """
    chunks_of = [plan.chunks if plan is not None else () for plan in plans]
    chunks = [chunk for chunks in chunks_of for chunk in chunks]
    requests = np.array([chunk[0] for chunk in chunks], np.int64)
    starts = np.array([chunk[1] for chunk in chunks], np.int64)
    stops = np.array([chunk[2] for chunk in chunks], np.int64)
    order = np.argsort(requests, kind="stable")
    follows = requests[order][1:] == requests[order][:-1]
    expected = np.zeros_like(starts)
    expected[order[1:]] = np.where(follows, stops[order][:-1], 0)
    return {
        "counts": [len(chunks) for chunks in chunks_of],
        "requests": np.diff(requests, prepend=0).tolist(),
        "lengths": (stops - starts).tolist(),
        "starts": (starts - expected).tolist(),
        "sampled": list(chain.from_iterable(map(_sampled, chunks_of, results))),
    }


def _sampled(chunks: Sequence[Chunk], done: Completed | None) -> list[int]:
    """How many tokens each chunk sampled; a damaged recording may not say it of all."""
    counts = list(done.counts) if done is not None else []
    return (counts + [0] * len(chunks))[: len(chunks)]
