"""`report.html`: one page that holds a whole run and works without a network.

`html_data` packs the recording, `report/` holds the page's own files, and here they are put into
one. What the page shows is documented in `docs/timeline.md`.
"""

import json
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from pipeserve.profiling.ledger.causes import CAUSES
from pipeserve.profiling.ledger.ledger import Ledger
from pipeserve.profiling.ledger.notes import notes_of
from pipeserve.profiling.pages import html_data
from pipeserve.profiling.recording.recording import Recording
from pipeserve.profiling.recording.request_times import request_records
from pipeserve.profiling.recording.summary import RequestRecord, gaps_s, summarize

_SCRIPTS = (
    "data.js",
    "theme.js",
    "time_axis.js",
    "tracks.js",
    "followed.js",
    "whole_run.js",
    "timeline.js",
    "timeline_input.js",
    "details.js",
    "charts.js",
    "requests.js",
    "main.js",
)
_QUANTILES = 400
_WORST = 300  # requests in the table, of those that waited longest; and of other columns


def write_report(path: str | Path, recording: Recording, ledger: Ledger) -> None:
    """Writes the page. Raises OSError."""
    Path(path).write_text(page(recording, ledger), encoding="utf-8")


def page(recording: Recording, ledger: Ledger) -> str:
    """The whole page as text. `recording` is on the driver's clock, as `explain` takes it."""
    clock = html_data.PageClock.of(ledger)
    indices = html_data.microbatch_indices(recording)
    columns = html_data.PackedColumns()
    num_blocks = recorded_kv_blocks(recording)
    for stage, (spans, idle) in enumerate(zip(recording.spans, ledger.idle, strict=True)):
        heads = recording.headed if stage == 0 else ()
        html_data.add_stage(columns, f"stage{stage}", spans, idle, clock, indices, heads)
    html_data.add_driver(columns, recording, clock, indices)
    html_data.add_microbatches(columns, recording, indices)
    html_data.add_queues(columns, recording, num_blocks, clock)
    head = {
        **head_of(recording, ledger),
        "tick_s": clock.tick_s,
        "stop": clock.stop,
        "block": html_data.BLOCK,
        "kv_blocks": num_blocks,
        "layout": columns.layout,
    }
    parts = {
        "title": _escaped(head["title"]),
        "style": _read("style.css"),
        "script": "\n".join(map(_read, _SCRIPTS)),
        "head": json.dumps(head, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        "columns": columns.text(),
        "details": "\n".join(html_data.details(recording, clock, indices)),
    }
    pieces = _read("page.html").split("%%")  # text, name, text, name, ...
    for place in range(1, len(pieces), 2):
        pieces[place] = parts[pieces[place]]
    return "".join(pieces)


def head_of(recording: Recording, ledger: Ledger) -> dict[str, Any]:
    """What is read at once: the run, its stages, its requests."""
    meta = recording.meta
    records = request_records(recording)
    known = [record for record in records.values() if record.token_times_s]
    policy = meta.get("policy")
    return {
        "title": title_of(recording),
        "facts": [
            fact
            for fact in (
                meta.get("kind"),
                policy and f"policy {policy}",
                meta.get("started"),
            )
            if fact
        ],
        "causes": list(CAUSES.items()),
        "stages": [
            {"busy_s": busy_s, "idle_s": list(ledger.idle_s(stage).values())}
            for stage, busy_s in enumerate(ledger.busy_s)
        ],
        "seconds": ledger.seconds,
        "num_requests": len(recording.arrived),
        "num_ended": len(recording.ended),
        "summary": asdict(summarize(known)) if known else None,
        "ttft_s": _quantiles([r.token_times_s[0] - r.arrival_s for r in known]),
        "tbt_s": _quantiles(gaps_s(known)),
        "requests": _request_rows(recording, ledger, records),
        "faults": [
            [fault.stage, fault.at_s - ledger.start_s, fault.reason] for fault in recording.faults
        ],
        "notes": notes_of(recording, ledger),
    }


def title_of(recording: Recording) -> str:
    """One line that says what was run."""
    meta = recording.meta
    config = meta.get("config") or {}
    model = str(meta.get("model") or config.get("model") or "a run")
    model = model.rstrip("/").rpartition("/")[2] or model
    stages = recording.num_stages
    return f"{model} on {stages} stage{'s' if stages != 1 else ''}"


def recorded_kv_blocks(recording: Recording) -> int:
    """Of a stage; by what was free at most where the recording does not say."""
    limits = recording.meta.get("limits") or {}
    free = max((planned.num_free_blocks for planned in recording.planned), default=0)
    return int(limits.get("num_blocks") or free)


def _quantiles(values: list[float]) -> list[float]:
    """From the least to the largest, at even steps; all of them where there are few."""
    if len(values) <= _QUANTILES:
        return sorted(values)
    return np.quantile(values, np.linspace(0, 1, _QUANTILES)).tolist()


def _request_rows(
    recording: Recording, ledger: Ledger, records: dict[int, RequestRecord]
) -> list[list[Any]]:
    """The worst requests by each column: id, arrived, tokens, end, TTFT, TBT mean and largest, and
    the idle seconds of stages before its microbatches, in all and by cause."""
    waited = ledger.by_request(recording)
    reasons = {ended.request_id: ended.reason for ended in recording.ended}
    rows = []
    for request, record in records.items():
        gaps = gaps_s([record])
        times = record.token_times_s
        seconds = waited.get(request, ())
        rows.append(
            [
                request,
                record.arrival_s - ledger.start_s,
                record.num_prompt_tokens,
                len(times),
                reasons.get(request, "had not ended"),
                times[0] - record.arrival_s if times else None,
                sum(gaps) / len(gaps) if gaps else None,
                max(gaps) if gaps else None,
                sum(seconds),
                [[cause, value] for cause, value in enumerate(seconds) if value > 0],
                (times[-1] if times else ledger.stop_s) - ledger.start_s,
            ]
        )
    shown: dict[int, list[Any]] = {}
    for column in (8, 5, 7):
        worst = sorted(rows, key=lambda row: -(row[column] or 0.0))[:_WORST]
        shown.update((row[0], row) for row in worst)
    return list(shown.values())


def _read(name: str) -> str:
    return (files("pipeserve.profiling.pages") / "report" / name).read_text(encoding="utf-8")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
