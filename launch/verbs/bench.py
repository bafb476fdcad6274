"""`pipeserve bench`: a workload through a driver that runs already, greedy and with `ignore_eos`.

`docs/bench.md` says what is measured and documents the keys of `--json`.
"""

import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, count
from random import Random
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pipeserve.core.nouns import Request, RequestId
from pipeserve.errors import ConfigError, StageError
from pipeserve.frontend.client import Client
from pipeserve.launch.inputs.workload import Workload
from pipeserve.launch.run.record import RecordedRun, context_notes, ring_notes, stage_shares
from pipeserve.launch.show.tables import memory_table, print_notes, run_table, stage_table
from pipeserve.profiling.ledger.notes import window_notes
from pipeserve.profiling.recording.recording import Ring
from pipeserve.profiling.recording.summary import (
    RequestRecord,
    Summary,
    cpu_shares,
    summarize,
    window,
)
from pipeserve.profiling.simulation.workloads import (
    WorkItem,
    check_within_limits,
    random_items,
)
from pipeserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pipeserve.driver.driver import Driver

_WAIT_S = 0.5
_SUBMITTED_AT_ONCE = 16
"""Requests of a burst, between two looks at what the stages say."""
_WARMUP_REQUESTS = 8
_WARMUP_TOKENS = 8
_REST_S = 1.0
"""Behind them, as between a server's first requests: stages bring memory of their KV pools then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One pass over the workload."""

    summary: Summary
    window: tuple[float, float]
    """First submission and last token, seconds."""
    ring: Ring
    """What was told of it: encoded, so that the next run is not stopped to walk through it."""


# ---- running ----------------------------------------------------------------------------------


def bench(
    driver: "Driver",
    records: RecordedRun,
    encode: Callable[[str], Sequence[int]] | None,
    workload: Workload,
    repeat: int,
) -> dict[str, Any]:
    """Warm up, run the workload `repeat` times, and report the run of median duration. `records`
    are the driver's; files hold every run, one after the other, without the warm-up.

    Returns the object that `--json` writes (docs/bench.md). `encode` makes ids of text prompts;
    None where there is no tokenizer. Emulated stages have nothing to warm up.
    Raises ConfigError for a request over the context or the KV pool, and StageError.
    """
    vocab_size = driver.shape.vocab_size
    workload = workload.tokenized(encode)
    items = workload.with_ids(vocab_size)
    lengths = [(len(item.prompt), item.max_tokens) for item in items]
    check_within_limits(lengths, driver.limits, workload.length_scale)
    for index, item in enumerate(items):
        if any(not 0 <= token < vocab_size for token in item.prompt):
            raise ConfigError(
                f"request {index} of the workload has ids outside 0 to {vocab_size - 1}, "
                "the model's vocabulary; make it with this model's tokenizer"
            )
    ids = map(RequestId, count())
    # A salt for each pass: no run finds its prompts in the prefix cache because an earlier one ran.
    if driver.setup.kind == "real":
        run_items(driver, _warmup_items(items, vocab_size), "warm-up", ids)
        driver.settle()
        time.sleep(_REST_S)
    records.start_writing()
    runs = [_run(driver, records, items, f"run {number}", ids) for number in range(repeat)]
    driver.refresh_memory()
    return _report(driver, records, workload, runs)


def run_items(
    client: Client, items: Sequence[WorkItem], salt: str, ids: Iterator[RequestId]
) -> list[RequestRecord]:
    """Submit each item when it is due, and note when each token became known, until all ended."""
    start_s = time.monotonic()
    numbered = [(next(ids), item) for item in items]
    due = deque(sorted(numbered, key=lambda pair: pair[1].arrival_s))
    requests = dict(numbered)
    # Arrays, of which the garbage collector walks nothing while the run goes on.
    token_times_s = {request_id: array("d") for request_id in requests}
    num_unfinished = num_at_once = len(due)  # at first nothing is under way that would wait
    while num_unfinished:
        now_s = time.monotonic() - start_s
        arrived = []
        while due and due[0][1].arrival_s <= now_s and len(arrived) < num_at_once:
            arrived.append(_request(*due.popleft(), salt))
        if arrived:
            client.submit(arrived)
        num_at_once = _SUBMITTED_AT_ONCE
        timeout_s = due[0][1].arrival_s - (time.monotonic() - start_s) if due else _WAIT_S
        outputs = client.outputs(min(max(timeout_s, 0.0), _WAIT_S))
        now_s = time.monotonic()
        for output in outputs:
            if output.error is not None:
                raise StageError(f"request {output.request_id}: {output.error}")
            if output.token is not None:
                token_times_s[output.request_id].append(now_s)
            num_unfinished -= output.finish_reason is not None
    return [
        RequestRecord(
            num_prompt_tokens=len(item.prompt),
            arrival_s=start_s + item.arrival_s,
            token_times_s=tuple(token_times_s[request_id]),
        )
        for request_id, item in requests.items()
    ]


def _request(request_id: RequestId, item: WorkItem, salt: str) -> Request:
    params = SamplingParams(temperature=0, max_tokens=item.max_tokens, ignore_eos=True, seed=0)
    return Request(
        id=request_id,
        prompt=tuple(item.prompt),
        params=params,
        cache_salt=salt,
        priority=item.priority,
    )


def _warmup_items(items: Sequence[WorkItem], vocab_size: int) -> list[WorkItem]:
    """A few requests of the workload's own prompt lengths, of other tokens."""
    rng = Random("warm-up")
    lengths = [
        (len(item.prompt), min(item.max_tokens, _WARMUP_TOKENS))
        for item in items[:_WARMUP_REQUESTS]
    ]
    return random_items(lengths, 1, vocab_size, rng)


def _run(
    driver: "Driver",
    records: RecordedRun,
    items: Sequence[WorkItem],
    salt: str,
    ids: Iterator[RequestId],
) -> Pass:
    records.ring.clear()
    served = run_items(driver, items, salt, ids)
    driver.settle()
    return Pass(summary=summarize(served), window=window(served), ring=records.ring.take())


# ---- reporting --------------------------------------------------------------------------------


def _report(
    driver: "Driver", records: RecordedRun, workload: Workload, runs: list[Pass]
) -> dict[str, Any]:
    by_duration = sorted(runs, key=lambda run: run.summary.seconds)
    median = by_duration[(len(runs) - 1) // 2]
    recording, (start_s, stop_s) = records.recording(median.ring), median.window
    computed = chain(*recording.spans, recording.headed)
    from_s = max(start_s, median.ring.whole_from_s)
    stages = [
        {
            **shares,
            "cpu": cpu,
            "layers": info.num_layers,
            "weight_bytes": info.weight_bytes,
            "kv_bytes": info.kv_bytes,
            "baseline_bytes": info.baseline_bytes,
            "peak_bytes": info.peak_bytes,
        }
        for info, shares, cpu in zip(
            driver.stages,
            stage_shares(recording),
            cpu_shares(computed, len(driver.stages), from_s, stop_s),
            strict=True,
        )
    ]
    return {
        **asdict(median.summary),
        "stages": stages,
        "policy": driver.config.policy,
        "workload": workload.name,
        "kind": driver.setup.kind,
        "dtype": driver.dtype,
        "run_seconds": [run.summary.seconds for run in runs],
        "notes": [
            *workload.notes,
            *context_notes(driver.shape, driver.limits),
            *ring_notes(median.ring),
            *window_notes(recording),
        ],
        "config": asdict(driver.config),
    }


def print_report(report: dict[str, Any], console: Console) -> None:
    """The report as tables: the run, its stages, their memory."""
    console.print(run_table(report))
    console.print(stage_table(report["stages"]))
    if report["kind"] == "real":  # emulated stages hold nothing
        console.print(memory_table(report["stages"]))
    print_notes(report, console)
