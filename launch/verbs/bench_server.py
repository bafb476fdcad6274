"""`pipeserve bench --url`: a workload through any server of OpenAI's API, measured as its clients
see it, so that two engines are measured by one and the same client.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from random import Random
from typing import Any

from rich.console import Console

from pipeserve.errors import StageError
from pipeserve.launch.inputs.load_target import Target
from pipeserve.launch.inputs.workload import Workload
from pipeserve.launch.run.http_load import Answer, Server, error_counts, run_load
from pipeserve.launch.show.tables import print_notes, run_table
from pipeserve.profiling.recording.summary import RequestRecord, percentiles, summarize
from pipeserve.profiling.simulation.workloads import WorkItem, poisson_times

_VOCAB_SIZE = 1000
"""Drawn ids are below it: every model has them."""
_WARMUP_REQUESTS = 8
_WARMUP_TOKENS = 8
_RESOLUTION = 0.05
_MOST_TRIALS = 16
_LEAST_RATE = 1 / 16
"""Of the rate at which all requests at once were answered. So few a second hardly meet each other:
where they miss the limits, no fewer would keep them."""


def bench_server(
    target: Target, workload: Workload, encode: Callable[[str], Sequence[int]] | None, repeat: int
) -> dict[str, Any]:
    """Returns the object that `--json` writes (docs/bench.md). Raises ConfigError, and StageError
    where no request of a run was answered."""
    workload = workload.tokenized(encode)
    _warm_up(target, _items(workload, 0))
    if target.find_capacity:
        return _capacity(target, workload)
    reports = [
        _report(target, workload, run_load(_server(target), _items(workload, number)))
        for number in range(repeat)
    ]
    by_duration = sorted(reports, key=lambda report: report["seconds"])
    return {
        **by_duration[(repeat - 1) // 2],
        "run_seconds": [report["seconds"] for report in reports],
    }


def _items(workload: Workload, number: int) -> list[WorkItem]:
    """The requests of one run. Where their ids are drawn, each run has others of the same lengths:
    a server may have the last ones in its prefix cache."""
    items = workload.with_ids(_VOCAB_SIZE)
    if number and workload.lengths:
        others = replace(workload, seed=f"{workload.seed}/{number}").with_ids(_VOCAB_SIZE)
        items = [
            replace(item, prompt=other.prompt) for item, other in zip(items, others, strict=True)
        ]
    return items


def _server(target: Target) -> Server:
    return Server(target.base, target.model, target.api_key)


def _warm_up(target: Target, items: Sequence[WorkItem]) -> None:
    rng = Random("warm-up")
    few = [
        WorkItem(
            prompt=tuple(rng.randrange(_VOCAB_SIZE) for _ in item.prompt),
            max_tokens=min(item.max_tokens, _WARMUP_TOKENS),
        )
        for item in items[:_WARMUP_REQUESTS]
    ]
    run_load(_server(target), few)


def _report(target: Target, workload: Workload, answers: Sequence[Answer]) -> dict[str, Any]:
    errors = error_counts(answers)
    records = [_record(answer) for answer in answers if not answer.error]
    if not records:
        why = next(iter(errors))
        raise StageError(f"{target.base} answered none of {len(answers)} requests: {why}")
    summary = summarize(records)
    good = sum(_is_good(target, record) for record in records)
    last_due_s = max(answer.due_s for answer in answers)
    notes = [*workload.notes]
    behind_s = max(record.token_times_s[0] for record in records) - last_due_s
    return {
        **asdict(summary),
        "e2e_s": asdict(
            percentiles([record.token_times_s[-1] - record.arrival_s for record in records])
        ),
        "errors": errors,
        "attainment": good / len(answers),
        "goodput": good / summary.seconds,
        "behind_s": behind_s,
        "url": target.base,
        "workload": workload.name,
        "policy": "of the server",
        "notes": notes,
    }


def _record(answer: Answer) -> RequestRecord:
    """Tokens that came in one event came at one time: so many gaps of 0, as its reader saw it."""
    times = list(answer.event_times_s)
    missing = answer.num_output_tokens - len(times)
    times += [times[-1]] * max(missing, 0)
    return RequestRecord(
        num_prompt_tokens=answer.num_prompt_tokens,
        arrival_s=answer.due_s,
        token_times_s=tuple(times),
    )


def _is_good(target: Target, record: RequestRecord) -> bool:
    times = record.token_times_s
    if target.slo_ttft_s is not None and times[0] - record.arrival_s > target.slo_ttft_s:
        return False
    gaps = [later - earlier for earlier, later in pairwise(times)]
    return not (target.slo_tbt_s and gaps) or percentiles(gaps).p99 <= target.slo_tbt_s


# ---- the highest rate ---------------------------------------------------------------------------


def _capacity(target: Target, workload: Workload) -> dict[str, Any]:
    """Begins at the rate at which all requests at once were answered, doubles it while it is
    served, then halves the bracket until it is narrow. 0 where even few requests a second miss the
    limits."""
    trials: list[dict[str, Any]] = []

    def is_served(rate: float) -> bool:
        items = _items(workload, len(trials))
        times = poisson_times(len(items), rate, Random(f"{workload.seed}/arrivals"))
        due = [
            WorkItem(prompt=item.prompt, max_tokens=item.max_tokens, arrival_s=time_s)
            for item, time_s in zip(items, times, strict=True)
        ]
        trials.append({"rate": rate, **_report(target, workload, run_load(_server(target), due))})
        attainment = trials[-1]["attainment"]
        print(f"{rate:.2f} requests/s: {attainment:.0%} keep the limits", file=sys.stderr)
        return attainment >= target.attainment

    at_once = [replace(item, arrival_s=0.0) for item in _items(workload, _MOST_TRIALS)]
    burst = _report(target, workload, run_load(_server(target), at_once))
    low, high, rate = 0.0, None, burst["requests"] / burst["seconds"]
    least_rate = _LEAST_RATE * rate
    if burst["attainment"] >= target.attainment:  # what one more a second would do, they cannot say
        note = "all requests at once keep the limits: give more --num-prompts, or tighter limits"
        return {**burst, "capacity": rate, "trials": [], "notes": [*burst["notes"], note]}
    while (
        len(trials) < _MOST_TRIALS
        and rate > least_rate
        and (high is None or high - low > _RESOLUTION * high)
    ):
        if is_served(rate):
            low = rate
        else:
            high = rate
        rate = 2 * low if high is None else (low + high) / 2
    best = [trial for trial in trials if trial["rate"] == low]
    chosen = best[0] if best else trials[-1]
    if not best:
        note = f"the limits are missed at {chosen['rate']:.2f} requests/s already: loosen them"
        chosen = {**chosen, "notes": [*chosen["notes"], note]}
    return {
        **chosen,
        "capacity": low,
        "trials": [
            {key: trial[key] for key in ("rate", "attainment", "goodput", "ttft_s", "tbt_s")}
            for trial in trials
        ],
    }


def print_server_report(report: dict[str, Any], target: Target, console: Console) -> None:
    """The report as a table, and what went wrong."""
    table = run_table({**report, "policy": report["url"]})
    table.title = f"{report['workload']} at {report['url']}"
    if target.slo_ttft_s is not None or target.slo_tbt_s is not None:
        table.add_row("within the limits", f"{report['attainment']:.1%} of requests")
        table.add_row("goodput", f"{report['goodput']:.2f} requests/s")
    if "capacity" in report:
        table.add_row("capacity", f"{report['capacity']:.2f} requests/s")
    for error, count in report["errors"].items():
        table.add_row("failed", f"{count}: {error}")
    console.print(table)
    print_notes(report, console)
