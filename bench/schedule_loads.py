"""Tables of `schedules.py` at given loads: beside the best rival, near the ceiling, and from a cost
profile that is wrong at the start.
"""

from concurrent.futures import Executor
from pathlib import Path
from statistics import fmean, median
from typing import Any

from report import plain_table
from schedule_cases import (
    LAYOUTS,
    NO_PROFILE,
    SLOS,
    TRACES,
    UNIFORM_TOKENS,
    UNSEEN,
    Case,
    case_of,
    make_pipeline,
    setup_of,
)
from schedule_search import SEED, SEEDS, Cache, at_rate, ceiling_of, is_of, lengths_of

from pipeserve.core.nouns import Microbatch
from pipeserve.profiling.search.capacity import poisson_arrivals
from pipeserve.profiling.simulation.simulator import Simulation


def cells_of(cache: Cache) -> list[Case]:
    """Of `uniform`, in the order of the tables."""
    cases = map(case_of, cache.found.values())
    cells = [case for case in cases if case.policy == "uniform" and not case.wrong]
    order = [*LAYOUTS, *TRACES, *UNSEEN]
    return sorted(
        cells, key=lambda c: (order.index(c.layout), order.index(c.workload), c.slo_s, c.order)
    )


def name_of(case: Case) -> str:
    return f"{case.layout}, {case.workload}, {case.slo_s:g} s, {case.order}"


def at_equal_load(cache: Cache, pool: Executor, how: dict[str, Any]) -> str:
    """`uniform` under each order beside the best `sarathi_serve` of the cell, first come first
    served, at 0.9 of the latter's capacity."""
    pairs = []
    for case in cells_of(cache):
        entries = [
            e
            for e in cache.found.values()
            if e["case"]["policy"] == "sarathi_serve"
            and is_of(e, case.layout, case.workload, case.slo_s, "fcfs")
        ]
        rival = max(entries, key=lambda e: e["capacity"][str(case.slo_s)])
        rate = 0.9 * rival["capacity"][str(case.slo_s)]
        trials = [pool.submit(at_rate, c, rate=rate, **how) for c in (case_of(rival), case)]
        pairs.append((case, trials))
    rows = []
    for case, trials in pairs:
        theirs, ours = (trial.result().trial for trial in trials)
        rows.append(
            [
                name_of(case),
                f"{ours.rate:.2f}",
                f"{theirs.ttft_p50_s:.2f} s",
                f"{ours.ttft_p50_s:.2f} s",
                f"{ours.ttft_p50_s / theirs.ttft_p50_s:.2f}",
                f"{theirs.ttft_p99_s:.1f} s",
                f"{ours.ttft_p99_s:.1f} s",
            ]
        )
    header = ["cell", "requests/s", "`sarathi_serve` P50", "`uniform` P50", "ratio",
              "`sarathi_serve` P99", "`uniform` P99"]  # fmt: skip
    return plain_table(header, rows)


def at_ninety(cache: Cache, pool: Executor, how: dict[str, Any]) -> str:
    """Stage-seconds of `uniform` at 0.9 of the ceiling."""
    rows = []
    for case in cells_of(cache):
        setup, lengths = setup_of(case), lengths_of(case.workload, how["traces"])
        top = ceiling_of(setup, lengths, case.slo_s)
        rate = 0.9 * top.rate
        tried = [pool.submit(at_rate, case, rate=rate, seed=seed, **how) for seed in SEEDS]
        trials = [each.result().trial for each in tried]
        seconds = [max(trial.busy) / trial.rate / top.stage_seconds for trial in trials]
        rows.append(
            [
                name_of(case),
                f"{rate:.2f}",
                f"{top.stage_seconds:.3f}",
                f"{fmean(seconds):.3f}",
                ", ".join(f"{each:.3f}" for each in seconds),
                ", ".join(f"{trial.queueing_p50_s:.1f}" for trial in trials),
                ", ".join(f"{trial.tbt_p99_s:.2f}" for trial in trials),
            ]
        )
    header = ["cell", "requests/s", "the ceiling's stage-seconds", "of these", "by seed",
              "queueing P50, s", "TBT P99, s"]  # fmt: skip
    return plain_table(header, rows)


LEARNT = 0.03
"""Median error of the predictions of `AMONG` microbatches in a row, of their mean over stages."""
AMONG = 5


def learnt_after(case: Case, traces: Path | None, rate: float) -> tuple[int, float] | None:
    """From a profile that is wrong: microbatches, and seconds, until predictions are right."""
    setup, lengths = setup_of(case), lengths_of(case.workload, traces)
    pipeline = make_pipeline(case, setup)
    engine, predicted_s = pipeline.engine, []
    plan = engine.plan

    def noted(now: float) -> Any:
        planned = plan(now)
        if isinstance(planned, Microbatch):
            predicted_s.append(sum(engine.last.cost.seconds))
        return planned

    engine.plan = noted
    Simulation(pipeline, poisson_arrivals(lengths, rate, SEED)).run_until(LEARNING_S)
    flights = pipeline.flights
    errors = [
        abs(predicted / (sum(flight.ends_s) - sum(flight.starts_s)) - 1)
        for predicted, flight in zip(predicted_s, flights, strict=False)
        if len(flight.ends_s) == len(setup.plan.stages)
    ]
    for first in range(len(errors) - AMONG):
        if median(errors[first : first + AMONG]) <= LEARNT:
            return first, flights[first].planned_s
    return None


LEARNING_S = 300.0
WRONG_LOAD = 0.85
"""Of the ceiling."""
WRONG = ((1.0, 1.0), (1.3, 0.7), (0.7, 1.3), (1.3, 1.3), (0.7, 0.7), NO_PROFILE)


def wrong_table(pool: Executor, how: dict[str, Any]) -> str:
    """What a cost profile that is off at the start changes, at 0.9 of the ceiling."""
    tried = []
    for layout in LAYOUTS:
        for factors in WRONG:
            knobs = (("max_num_batched_tokens", UNIFORM_TOKENS),)
            case = Case(layout, "sharegpt", "uniform", knobs, SLOS["strict"], "sjf", factors)
            setup, lengths = setup_of(case), lengths_of(case.workload, how["traces"])
            rate = WRONG_LOAD * ceiling_of(setup, lengths, SLOS["strict"]).rate
            trial = pool.submit(at_rate, case, rate=rate, **how)
            tried.append((case, trial, pool.submit(learnt_after, case, how["traces"], rate)))
    rows = []
    for case, trial, learning in tried:
        learnt, found = learning.result(), trial.result().trial
        rows.append(
            [
                case.layout,
                "no profile" if case.wrong == NO_PROFILE else "{:g}, {:g}".format(*case.wrong),
                "never" if learnt is None else f"{learnt[1]:.1f} s, {learnt[0]} microbatches",
                f"{found.output_tokens_per_s:.0f}",
                f"{found.tbt_p99_s:.3f} s",
                f"{found.ttft_p50_s:.2f} s",
            ]
        )
    header = ["layout", "products, attention off by", "learnt after", "output tokens/s",
              "TBT P99", "TTFT P50"]  # fmt: skip
    return plain_table(header, rows)
