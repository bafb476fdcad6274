"""A recorded run in numbers, and two compared: what `pipeserve report --json` writes."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipeserve.core.records import Span
from pipeserve.profiling.ledger.causes import CAUSES
from pipeserve.profiling.ledger.ledger import Ledger
from pipeserve.profiling.ledger.notes import notes_of
from pipeserve.profiling.pages.html_report import title_of
from pipeserve.profiling.recording.recording import Recording
from pipeserve.profiling.recording.request_times import records_of
from pipeserve.profiling.recording.summary import summarize

_WORST = 5


def report_of(name: str, recording: Recording, ledger: Ledger | None) -> dict[str, Any]:
    """One run (docs/timeline.md has the keys); `name`: of its folder."""
    records = records_of(recording)
    summary = asdict(summarize(records)) if records else {"requests": 0}
    meta = recording.meta
    layers = [stage["num_layers"] for stage in _planned_stages(recording)]
    found = {
        **summary,
        "stages": [],
        "policy": meta.get("policy"),
        "run": name,
        "title": title_of(recording),
        "kind": meta.get("kind"),
        "microbatches": len(recording.completed),
        "causes": [],
        "faults": [],
        "worst_microbatches": [],
        "notes": notes_of(recording, ledger),
        "config": meta.get("config"),
    }
    if ledger is not None and ledger.seconds > 0:
        found["stages"] = [
            {
                "busy": busy_s / ledger.seconds,
                "again": ledger.again_s(stage) / ledger.seconds,
                **_together(recording.spans[stage], ledger.seconds),
                "idle_by_cause": ledger.idle_shares(stage),
                **({"layers": layers[stage]} if layers else {}),
            }
            for stage, busy_s in enumerate(ledger.busy_s)
        ]
        found["faults"] = [
            {
                "stage": cost.fault.stage,
                "at_s": cost.fault.at_s - ledger.start_s,
                "reason": cost.fault.reason,
                "idle_s": cost.idle_s,
                "tokens_again": cost.num_tokens,
                "again_s": list(cost.again_s),
            }
            for cost in ledger.faults
        ]
        found["causes"] = causes_of(ledger, summary.get("total_tokens_per_s"))
        found["worst_microbatches"] = worst_microbatches(recording, ledger)
    return found


def _together(spans: Sequence[Span], seconds: float) -> dict[str, float]:
    """Shares of the time, and part of `busy`: of what the ranks of a stage do together."""
    return {
        "all_reduce": sum([span.all_reduce_s for span in spans]) / seconds,
        "rank_wait": sum([span.rank_wait_s for span in spans]) / seconds,
    }


def _planned_stages(recording: Recording) -> list[dict[str, Any]]:
    stages = (recording.meta.get("plan") or {}).get("stages") or []
    return [{**stage, "num_layers": stage["stop_layer"] - stage["first_layer"]} for stage in stages]


def causes_of(ledger: Ledger, tokens_per_s: float | None) -> list[dict[str, Any]]:
    """Largest first. Removing a cause shortens the run at most by the time that it takes of the
    stage that has most of it: so much more throughput it could give back, at most."""
    shares = [ledger.idle_shares(stage) for stage in range(len(ledger.busy_s))]
    found = []
    for cause, what in CAUSES.items():
        most = max(share.get(cause, 0.0) for share in shares)
        if most <= 0:
            continue
        gain = 1 / (1 - most) - 1 if most < 1 else None
        found.append(
            {
                "cause": cause,
                "what": what,
                "share": sum(share.get(cause, 0.0) for share in shares) / len(shares),
                "most": most,
                "gain_at_most": gain,
                "tokens_per_s_at_most": gain and tokens_per_s and tokens_per_s * (1 + gain),
            }
        )
    return sorted(found, key=lambda entry: -entry["share"])


def worst_microbatches(recording: Recording, ledger: Ledger) -> list[dict[str, Any]]:
    """Those that stages stood idle longest before, all stages together."""
    waited = sorted(ledger.by_microbatch().items(), key=lambda item: -sum(item[1]))[:_WORST]
    planned = {plan.index: plan for plan in recording.planned}
    found = []
    for index, seconds in waited:
        plan = planned.get(index)
        cause, largest = max(zip(CAUSES, seconds, strict=True), key=lambda pair: pair[1])
        chunks = plan.chunks if plan is not None else ()
        found.append(
            {
                "index": index,
                "at_s": plan.sent_s - ledger.start_s if plan is not None else None,
                "idle_s": sum(seconds),
                "cause": cause,
                "cause_s": largest,
                "requests": len(chunks),
                "tokens": sum(chunk.stop - chunk.start for chunk in chunks),
            }
        )
    return found


def compare(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two reports, cause by cause; busy time is one of the lines. For each, the mean stage's share
    of the time, and its milliseconds for each microbatch and for each output token."""
    lines = {name: [_line(each, name) for each in (first, second)] for name in ("busy", *CAUSES)}
    return {
        "a": first,
        "b": second,
        "changes": [
            {
                "name": name,
                "a": a,
                "b": b,
                "share_points": 100 * (b["share"] - a["share"]),
                "ms_per_microbatch": _difference(a, b, "ms_per_microbatch"),
                "ms_per_token": _difference(a, b, "ms_per_token"),
            }
            for name, (a, b) in lines.items()
            if a["share"] or b["share"]
        ],
    }


def _line(found: dict[str, Any], name: str) -> dict[str, float | None]:
    stages = found["stages"]
    shares = [stage["busy" if name == "busy" else "idle_by_cause"] for stage in stages]
    if name != "busy":
        shares = [by_cause.get(name, 0.0) for by_cause in shares]
    share = sum(shares) / len(shares) if shares else 0.0
    milliseconds = 1000 * share * found.get("seconds", 0.0)
    counts = {"microbatch": found["microbatches"], "token": found.get("output_tokens", 0)}
    per = {
        f"ms_per_{noun}": milliseconds / count if count else None for noun, count in counts.items()
    }
    return {"share": share, **per}


def _difference(a: dict[str, Any], b: dict[str, Any], key: str) -> float | None:
    return None if a[key] is None or b[key] is None else b[key] - a[key]
