"""A recording as a trace that opens in ui.perfetto.dev, in Chrome's trace event format.

One process, the run; a thread for the driver and for each stage; slices for microbatches and for
idle time (named by its largest cause); arrows that follow a microbatch; counters for KV blocks and
requests. Format: "Trace Event Format", Google, https://docs.google.com/document/d/
1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU; times are microseconds.
"""

from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

import msgspec

from pipeserve.core.records import Completed, Headed, Planned, Span
from pipeserve.profiling.ledger.causes import CAUSES
from pipeserve.profiling.ledger.critical_path import Idle
from pipeserve.profiling.ledger.ledger import Ledger
from pipeserve.profiling.pages.html_data import kind_of
from pipeserve.profiling.recording.recording import Recording

_RUN = 1  # the process
_DRIVER = 1  # the driver's thread; stage s is thread s + 2
_KINDS = ("decode", "mixed", "prefill")
# Names of colours that the format reserves.
_COLOURS = ("thread_state_running", "thread_state_runnable", "rail_response")
_NAMES = tuple(CAUSES)

TraceEvent = dict[str, Any]


def write_perfetto(path: str | Path, recording: Recording, ledger: Ledger) -> None:
    """Writes the trace, an event a line. Raises OSError."""
    with Path(path).open("wb") as file:
        file.write(b'{"displayTimeUnit":"ms","traceEvents":[\n')
        before = b""
        for event in events(recording, ledger):
            file.write(before + msgspec.json.encode(event))
            before = b",\n"
        file.write(b"\n]}\n")


def events(recording: Recording, ledger: Ledger) -> Iterator[TraceEvent]:
    """All events; times are since the first arrival."""
    yield from _names(recording)
    planned = {plan.index: plan for plan in recording.planned}
    start_s = ledger.start_s
    for plan in recording.planned:
        yield _plan(plan, start_s)
        yield from _counters(plan, start_s)
    for done in recording.completed:
        yield _completion(done, start_s)
    for spans, idle in zip(recording.spans, ledger.idle, strict=True):
        for span in spans:
            yield _microbatch(span, planned.get(span.index), start_s)
        for interval in idle:
            yield _idle(interval, start_s)
    for head in recording.headed:
        yield _head(head, start_s)
    yield from _arrows(recording, start_s)
    for fault in recording.faults:
        at = {"ts": _us(fault.at_s, start_s), "pid": _RUN, "tid": fault.stage + 2}
        yield {"ph": "i", "s": "p", "name": f"fault: {fault.reason}", **at}


def _names(recording: Recording) -> Iterator[TraceEvent]:
    meta = recording.meta
    config = meta.get("config") or {}
    model = meta.get("model") or config.get("model") or "pipeserve"
    yield _meta("process_name", 0, name=str(model))
    threads = ["driver", *(f"stage {stage}" for stage in range(recording.num_stages))]
    for thread, name in enumerate(threads, _DRIVER):
        yield _meta("thread_name", thread, name=name)
        yield _meta("thread_sort_index", thread, sort_index=thread)


def _meta(what: str, thread: int, **args: Any) -> TraceEvent:
    return {"ph": "M", "name": what, "pid": _RUN, "tid": thread, "args": args}


def _plan(plan: Planned, start_s: float) -> TraceEvent:
    args = {"microbatch": plan.index, "waited for": plan.waited_for or "nothing"}
    if plan.after >= 0:
        args["woken by"] = plan.after
    return _slice("plan", "driver", _DRIVER, plan.start_s, plan.sent_s, start_s, args)


def _completion(done: Completed, start_s: float) -> TraceEvent:
    args = {"microbatch": done.index}
    return _slice("result", "driver", _DRIVER, done.received_s, done.done_s, start_s, args)


def _microbatch(span: Span, plan: Planned | None, start_s: float) -> TraceEvent:
    args: dict[str, Any] = {"microbatch": span.index, "tokens": span.num_tokens}
    name, colour = f"{span.index}", {}
    if plan is not None:
        kind = kind_of(plan)
        name, colour = f"{span.index} {_KINDS[kind]}", {"cname": _COLOURS[kind]}
        args["requests"] = len(plan.chunks)
        args["prefill tokens"] = sum(c.stop - c.start for c in plan.chunks if c.stop - c.start > 1)
        if plan.predicted_s:
            args["predicted ms"] = round(plan.predicted_s[span.stage] * 1e3, 3)
    if isfinite(span.cpu_s):
        args["on its core ms"] = round(span.cpu_s * 1e3, 3)
    if span.all_reduce_s or span.rank_wait_s:
        args["all-reduce ms"] = round(span.all_reduce_s * 1e3, 3)
        args["waited for a rank ms"] = round(span.rank_wait_s * 1e3, 3)
    where = (span.stage + 2, span.start_s, span.end_s, start_s, args)
    return {**_slice(name, "microbatch", *where), **colour}


def _head(head: Headed, start_s: float) -> TraceEvent:
    args: dict[str, Any] = {"microbatch": head.index}
    if isfinite(head.cpu_s):
        args["on its core ms"] = round(head.cpu_s * 1e3, 3)
    where = (head.stage + 2, head.start_s, head.end_s, start_s, args)
    return _slice(f"{head.index} head", "microbatch", *where)


def _idle(interval: Idle, start_s: float) -> TraceEvent:
    """Named by the largest cause; the others are among its arguments, in ms."""
    seconds = interval.seconds
    largest = max(range(len(seconds)), key=seconds.__getitem__)
    args = {
        f"{cause} ms": round(value * 1e3, 4)
        for cause, value in zip(_NAMES, seconds, strict=True)
        if value > 0
    }
    where = (interval.stage + 2, interval.start_s, interval.end_s, start_s, args)
    return _slice(_NAMES[largest], "idle", *where)


def _slice(
    name: str, kind: str, thread: int, from_s: float, to_s: float, start_s: float, args: Any
) -> TraceEvent:
    from_us = _us(from_s, start_s)
    length = {"ts": from_us, "dur": max(round(_us(to_s, start_s) - from_us, 3), 0.0)}
    return {
        "ph": "X",
        "name": name,
        "cat": kind,
        "pid": _RUN,
        "tid": thread,
        **length,
        "args": args,
    }


def _arrows(recording: Recording, start_s: float) -> Iterator[TraceEvent]:
    """From the plan through the stages to the result; a step is bound to the slice around it."""
    steps: dict[int, list[tuple[float, int]]] = {}
    for plan in recording.planned:
        steps.setdefault(plan.index, []).append((plan.start_s, _DRIVER))
    for stage, spans in enumerate(recording.spans):
        for span in spans:
            steps.setdefault(span.index, []).append((span.start_s, stage + 2))
    for head in recording.headed:
        steps.setdefault(head.index, []).append((head.start_s, head.stage + 2))
    for done in recording.completed:
        steps.setdefault(done.index, []).append((done.received_s, _DRIVER))
    for index, ways in steps.items():
        for place, (at_s, thread) in enumerate(ways):
            last = place == len(ways) - 1
            phase = "s" if place == 0 else "f" if last else "t"
            if len(ways) < 2:
                continue
            end = {"bp": "e"} if last else {}
            at = {"ts": _us(at_s, start_s), "pid": _RUN, "tid": thread, "id": index}
            yield {"ph": phase, "name": "microbatch", "cat": "way", **at, **end}


def _counters(plan: Planned, start_s: float) -> Iterator[TraceEvent]:
    at = {"ph": "C", "ts": _us(plan.sent_s, start_s), "pid": _RUN}
    yield {"name": "free KV blocks", **at, "args": {"blocks": plan.num_free_blocks}}
    requests = {"running": plan.num_running, "waiting": plan.num_waiting}
    yield {"name": "requests", **at, "args": requests}


def _us(at_s: float, start_s: float) -> float:
    return round((at_s - start_s) * 1e6, 3)
