"""What `--live` shows: the last seconds of a run that goes on, as one frame of text."""

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pipeserve.core.nouns import RequestId
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
from pipeserve.profiling.ledger.causes import CAUSES
from pipeserve.profiling.ledger.ledger import Ledger, explain
from pipeserve.profiling.ledger.running import without_open_heads
from pipeserve.profiling.recording.clocks import align
from pipeserve.profiling.recording.recording import recording_of
from pipeserve.profiling.recording.summary import percentiles

WINDOW_S = 5.0
"""What is shown."""
_HISTORY_S = 10.0
"""What the ledger is made of: with less before the window, it cannot tell where waiting began."""
_MOST_RECORDS = 3000
_MOST_MICROBATCHES = 4  # named in a stage's row
_MOST_CAUSES = 3
_LEAST_SHARE = 0.005

_BUSY = "#5b86bd"
_EMPTY = "#47443e"
_COLOURS = {
    "fill": "#9a948a",
    "drain": "#716c63",
    "no_requests": "#6b675f",
    "too_few_microbatches": "#9384d8",
    "kv_full": "#6650b0",
    "prefill_length": "#f0a202",
    "prefill_vs_decode": "#f7d046",
    "context_length": "#cf8a24",
    "decode_count": "#a06c17",
    "stage_imbalance": "#dd62ad",
    "head_and_sampling": "#a82c7b",
    "all_reduce": "#eab0d2",
    "rank_wait": "#7a2260",
    "token_feedback": "#00a78d",
    "planning": "#00806d",
    "control": "#6fcdb5",
    "link": "#8fc31d",
    "jitter": "#ee6540",
    "fault": "#c22020",
    "unknown": "#f2f2f2",
}
"""Those of the page (`profiling/pages/report/theme.js`) on a dark ground."""


class LiveFrame:
    """Takes the records of one run as they come, and draws how it stands. Times in seconds of the
    driver's clock."""

    def __init__(self, meta: Mapping[str, Any]) -> None:
        """`meta`: as of a recording."""
        self._meta = meta
        self._num_stages = len(meta["plan"]["stages"])
        self._recent: deque[Record] = deque()
        self._flying: dict[int, Planned] = {}
        self._passed: dict[int, int] = {}  # stages that are done with it, of those that fly
        self._last: Planned | None = None
        self._told_s: dict[RequestId, float | None] = {}  # last token of those that go on
        self._tokens: deque[tuple[float, int]] = deque()
        self._gaps: deque[tuple[float, float]] = deque()
        self._start_s: float | None = None
        self._num_ended = 0

    def take(self, records: Iterable[Record]) -> None:
        """What was told since, in order."""
        for record in records:
            self._recent.append(record)
            match record:
                case Planned():
                    self._flying[record.index] = self._last = record
                    self._passed[record.index] = 0
                case Span():
                    if record.index in self._passed:
                        self._passed[record.index] = record.stage + 1
                case Completed():
                    self._count(record)
                case Arrived():
                    self._told_s[record.request_id] = None
                    if self._start_s is None:
                        self._start_s = record.at_s
                case Ended():
                    self._told_s.pop(record.request_id, None)
                    self._num_ended += 1
                case Fault():
                    self._flying.clear()
                    self._passed.clear()

    def _count(self, completed: Completed) -> None:
        """Tokens and the gaps between them; those of requests that have ended were dropped."""
        planned = self._flying.pop(completed.index, None)
        self._passed.pop(completed.index, None)
        if planned is None:
            return
        now, num_tokens = completed.done_s, 0
        for chunk, count in zip(planned.chunks, completed.counts, strict=True):
            if count and chunk.request_id in self._told_s:
                before = self._told_s[chunk.request_id]
                if before is not None:
                    self._gaps.append((now, now - before))
                self._gaps += [(now, 0.0)] * (count - 1)  # they became known together
                self._told_s[chunk.request_id] = now
                num_tokens += count
        self._tokens.append((now, num_tokens))

    def frame(self, now: float, width: int = 100) -> RenderableType:
        """The run at `now`, for a terminal of so many columns."""
        self._forget(now)
        title = f"policy {self._meta['policy']} · {self._num_stages} stages"
        model = self._meta.get("config", {}).get("model")
        if model:
            title = f"{model} · {title}"
        elapsed_s = now - self._start_s if self._start_s is not None else 0.0
        return Panel(
            Group(self._stage_rows(now, width), Text(), self._numbers(now)),
            title=title,
            title_align="left",
            subtitle=f"{elapsed_s:.0f} s · busy and idle of the last {WINDOW_S:g} s",
            subtitle_align="right",
            border_style="dim",
            width=width,
        )

    def _forget(self, now: float) -> None:
        for series in (self._tokens, self._gaps):
            while series and series[0][0] < now - WINDOW_S:
                series.popleft()
        recent = self._recent
        while recent and (len(recent) > _MOST_RECORDS or _at_s(recent[0]) < now - _HISTORY_S):
            recent.popleft()

    # ---- stages ---------------------------------------------------------------------------------

    def _stage_rows(self, now: float, width: int) -> Table:
        """Two lines for each: its time as a bar, and below what it lost and what it has to do."""
        ledger = self._ledger()
        label_width, share_width = len(f"stage {self._num_stages - 1}"), len("100%")
        bar_width = max(10, width - label_width - share_width - 8)  # borders and gaps
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=label_width)
        table.add_column(width=share_width, justify="right")
        table.add_column(width=bar_width, no_wrap=True)
        for stage in range(self._num_stages):
            busy, causes = _shares(ledger, stage, now) if ledger else (None, {})
            share = "" if busy is None else f"{busy:.0%}"
            table.add_row(f"stage {stage}", share, _bar(busy, causes, bar_width))
            table.add_row("", "", self._below(stage, causes, bar_width))
        return table

    def _below(self, stage: int, causes: Mapping[str, float], width: int) -> Text:
        """Causes at the left, microbatches at the right where there is room for them."""
        line, here = _named(causes), self._microbatches_at(stage)
        gap = width - line.cell_len - here.cell_len
        if gap >= 2:
            line.append(" " * gap).append(here)
        return line

    def _ledger(self) -> Ledger | None:
        """Of what is remembered; None before anything was computed."""
        known = without_open_heads(self._recent) if self._flying else self._recent
        recording = recording_of(known, self._num_stages, {})
        if not any(recording.spans):
            return None
        return explain(align(recording).recording)

    def _microbatches_at(self, stage: int) -> Text:
        """Those that this stage runs or has before it, the oldest first; behind the last stage
        there is only the way to the driver."""
        here = [
            i for i, passed in self._passed.items() if min(passed, self._num_stages - 1) == stage
        ]
        shown = [
            f"#{index} {sum(c.num_tokens for c in self._flying[index].chunks)} tok"
            for index in here[:_MOST_MICROBATCHES]
        ]
        if len(here) > len(shown):
            shown.append(f"+{len(here) - len(shown)}")
        return Text(" · ".join(shown), style="dim")

    # ---- the run --------------------------------------------------------------------------------

    def _numbers(self, now: float) -> Text:
        parts = [self._rate(now)]
        if self._gaps:
            tbt = percentiles([gap for _, gap in self._gaps])
            parts.append(f"TBT p50 {1000 * tbt.p50:,.0f} ms, p99 {1000 * tbt.p99:,.0f} ms")
        last = self._last
        if last is not None:
            num_blocks = self._meta["limits"]["num_blocks"]
            parts.append(f"{last.num_running} running, {last.num_waiting} waiting")
            parts.append(f"KV {1 - last.num_free_blocks / num_blocks:.0%}")
        parts.append(f"{self._num_ended} done")
        return Text(" · ".join(parts))

    def _rate(self, now: float) -> str:
        since_s = now - WINDOW_S if self._start_s is None else max(self._start_s, now - WINDOW_S)
        num_tokens = sum(count for _, count in self._tokens)
        return f"{num_tokens / max(now - since_s, 1e-3):,.1f} tokens/s"


def _at_s(record: Record) -> float:
    """When it was, or about when: a span's machine may have another clock."""
    match record:
        case Planned():
            return record.sent_s
        case Completed():
            return record.done_s
        case Span() | Headed():
            return record.end_s
        case Ping():
            return record.received_s
    return record.at_s


def _shares(ledger: Ledger, stage: int, now: float) -> tuple[float | None, dict[str, float]]:
    """Busy share, and idle shares by cause, of the window up to the end of what is known of this
    stage; None where that is before the window."""
    idle_s, stop_s = dict.fromkeys(CAUSES, 0.0), ledger.stop_s
    start_s = max(ledger.start_s, now - WINDOW_S)
    for idle in ledger.idle[stage]:
        if idle.index < 0:  # since its last microbatch: what it waits for is not known yet
            stop_s = idle.start_s
            continue
        inside_s = idle.end_s - max(idle.start_s, start_s)
        if inside_s > 0:
            share = inside_s / (idle.end_s - idle.start_s)
            for cause, seconds in zip(CAUSES, idle.seconds, strict=True):
                idle_s[cause] += seconds * share
    known_s = stop_s - start_s
    if known_s <= 0:
        return None, {}
    shares = {cause: seconds / known_s for cause, seconds in idle_s.items()}
    return max(1 - sum(shares.values()), 0.0), shares


def _bar(busy: float | None, causes: Mapping[str, float], width: int) -> Text:
    """Busy, then each cause in its colour, by share."""
    bar = Text()
    if busy is None:
        return bar.append("─" * width, _EMPTY)
    ends, reached = [], 0.0
    for colour, share in ((_BUSY, busy), *((_COLOURS[c], s) for c, s in _largest(causes))):
        reached += share
        ends.append((colour, min(round(reached * width), width)))
    for colour, end in ends:
        bar.append("█" * (end - len(bar)), colour)
    return bar.append("─" * (width - len(bar)), _EMPTY)


def _named(causes: Mapping[str, float]) -> Text:
    """The largest, in their colours."""
    shown = [pair for pair in _largest(causes) if pair[1] >= _LEAST_SHARE][:_MOST_CAUSES]
    return Text("  ").join(
        Text(f"{cause.replace('_', ' ')} {share:.0%}", _COLOURS[cause]) for cause, share in shown
    )


def _largest(causes: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(causes.items(), key=lambda pair: -pair[1])
