"""Capacity and goodput of each case of `schedules.py`, searched once and kept in a file."""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

from schedule_cases import (
    MAX_MODEL_LEN,
    SLOS,
    TRACES,
    UNSEEN,
    Case,
    case_of,
    make_pipeline,
    setup_of,
)
from schedule_goodput import RULES, Tried

from pipeserve.launch.inputs.traces import read_trace
from pipeserve.launch.run.simulated import SimulatedRun
from pipeserve.profiling.search.capacity import Lengths, run_window
from pipeserve.profiling.search.ceiling import Ceiling, ceiling
from pipeserve.profiling.simulation.workloads import DISTRIBUTIONS, draw_lengths

SEED, SEEDS = 1, (1, 2, 3)
"""`uniform` was made looking at seed 0 of the built-in distributions."""

QUICK, STEADY = (1, 1, 200), (3, 3, 500)
"""Of a trial: lifetimes of its window, lifetimes of the ramp before it, least requests. A pipeline
fills for three lifetimes: until then it has fewer decodes than it will have, and serves more."""


@cache
def lengths_of(workload: str, traces: Path | None) -> Lengths:
    """(prompt, output) of requests that fit the context."""
    path = traces / {**TRACES, **UNSEEN}[workload] if traces is not None else None
    if path is not None and path.exists():
        lengths = read_trace(path).lengths
    else:
        lengths = draw_lengths(DISTRIBUTIONS[workload], 20_000, Random(0))
    return [(p, o) for p, o in lengths if p + o <= MAX_MODEL_LEN and o > 1]


def ceiling_of(setup: SimulatedRun, lengths: Lengths, slo_s: float, mixed: bool = True) -> Ceiling:
    return ceiling(
        setup.times,
        lengths,
        num_stages=len(setup.plan.stages),
        slo_tbt_s=slo_s,
        kv_positions=setup.limits.num_blocks * setup.limits.block_size,
        mixed=mixed,
    )


def search(
    case: Case,
    traces: Path | None,
    quick: bool,
    near: dict[str, Any] | None = None,
    seed: int = SEED,
) -> dict[str, Any]:
    """The highest rate by each rule (`RULES`), within each limit between tokens that the case is
    for, from one set of trials: bisected in steps of 5 % of the ceiling. (Of the requests that a
    seed draws for a window, the ceiling is itself up to 3 % off: finer steps would say nothing.)
    `near`: an earlier search of the case, whose result and its neighbours are tried first."""
    os.nice(5)
    setup, lengths = setup_of(case), lengths_of(case.workload, traces)
    kept: dict[int, Tried] = {}
    slos = [case.slo_s] if case.slo_s is not None else list(SLOS.values())
    top = ceiling_of(setup, lengths, max(slos)).rate
    steps = 20  # of the ceiling

    def is_within(step: int, rule: str, slo_s: float) -> bool:
        if step not in kept:
            kept[step] = at_rate(case, traces, top * step / steps, quick, seed)
        return kept[step].within(rule, slo_s)

    def highest(rule: str, slo_s: float) -> float:
        low, high = 0, steps  # at 0 nothing is late, and the ceiling no schedule reaches
        first = round(near[rule][str(slo_s)] * steps / top) if near else steps
        guesses = [first, first + 1, first - 1]
        while high - low > 1:
            guess = guesses.pop(0) if guesses else (low + high + 1) // 2
            if low < guess < high:
                if is_within(guess, rule, slo_s):
                    low = guess
                else:
                    high = guess
        return top * low / steps

    found = {rule: {str(slo_s): highest(rule, slo_s) for slo_s in slos} for rule in RULES}
    return {"case": asdict(case), **found, "trials": [asdict(tried) for tried in kept.values()]}


def at_rate(case: Case, traces: Path | None, rate: float, quick: bool, seed: int = SEED) -> Tried:
    setup, lengths = setup_of(case), lengths_of(case.workload, traces)
    lifetimes, ramp, requests = QUICK if quick else STEADY
    make = partial(make_pipeline, case, setup)
    return Tried.of(run_window(make, lengths, rate, requests, seed, lifetimes, ramp))


class Cache:
    """Searches that were done, in a file of lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                self.found[case_of(entry).key] = entry

    def add(self, entry: dict[str, Any]) -> None:
        self.found[case_of(entry).key] = entry
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def is_of(
    entry: dict[str, Any], layout: str, workload: str, slo_s: float, order: str | None = None
) -> bool:
    """Whether a search is of this cell, and of this order where one is given."""
    case = entry["case"]
    return (
        (case["layout"], case["workload"]) == (layout, workload)
        and case["order"] == (order or case["order"])
        and str(slo_s) in entry["capacity"]
        and not case["wrong"]
    )


def nearly_best(wanted: Sequence[Case], near: Cache) -> list[Case]:
    """Of the settings of each policy in each cell those within a step of its best in `near`, by
    either rule and for any limit between tokens."""
    found = {case.key: near.found[case.key] for case in wanted if case.key in near.found}
    step = 1.06  # of a rate: a step is 5 % of the ceiling

    def is_nearly_best(case: Case) -> bool:
        entry = found.get(case.key)
        if entry is None:
            return False
        rivals = [found[other.key] for other in wanted
                  if other.key in found and cell_of(other) == cell_of(case)]  # fmt: skip
        return any(
            rate > 0 and step * rate >= max(rival[rule].get(slo, 0.0) for rival in rivals)
            for rule in RULES
            for slo, rate in entry[rule].items()
        )

    return [case for case in wanted if is_nearly_best(case)]


def cell_of(case: Case) -> tuple[Any, ...]:
    return case.layout, case.workload, case.policy, case.order, case.slo_s


def search_all(
    wanted: Sequence[Case], cache: Cache, processes: int, near: Cache | None = None, **how: Any
) -> None:
    todo = [case for case in wanted if case.key not in cache.found]
    found = near.found if near is not None else {}
    with ProcessPoolExecutor(processes, max_tasks_per_child=1) as pool:
        futures = {
            pool.submit(search, case, near=found.get(case.key), **how): case for case in todo
        }
        for number, future in enumerate(as_completed(futures)):
            entry = future.result()
            cache.add(entry)
            case = futures[future]
            print(
                f"{number + 1}/{len(todo)} {case.layout} {case.workload} {case.policy} "
                f"{dict(case.knobs)} {case.order} slo {case.slo_s}: "
                f"{', '.join(f'{rule} {entry[rule]}' for rule in RULES)}",
                flush=True,
            )
