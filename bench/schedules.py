"""Every schedule on the Falcon-180B job, each with its published setting and the best of a sweep,
beside the ceiling that none can pass. Makes the tables of docs/schedules.md.

    python bench/schedules.py --traces DIR --cache FILE.jsonl [--processes 2] [--quick] [--print]

`--traces`: a folder with the published traces; without it the built-in distributions are used,
which are fitted to them. Every search is kept in the cache, so that a run that was ended goes on;
`--print` makes the tables of what is there.
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any, ClassVar

from report import plain_table, show

from pipeserve.configs import load_recipe, make_config
from pipeserve.core.cost.pipeline_cost import PipelineCost
from pipeserve.core.engine import Engine
from pipeserve.core.nouns import Microbatch
from pipeserve.core.policies import get_policy, uniform
from pipeserve.core.policies.sarathi_serve import SarathiServe
from pipeserve.core.policies.uniform import Uniform
from pipeserve.core.view import Policy, Traits
from pipeserve.launch.inputs.traces import read_trace
from pipeserve.launch.run.simulated import SimulatedRun, simulated_run
from pipeserve.profiling.search.capacity import Lengths, Trial, poisson_arrivals, run_trial
from pipeserve.profiling.search.ceiling import Ceiling, ceiling
from pipeserve.profiling.simulation.simulator import SimulatedPipeline, Simulation
from pipeserve.profiling.simulation.workloads import DISTRIBUTIONS, draw_lengths

LAYOUTS = {"TP1xPP8": "falcon-180b-8xa100", "TP4xPP2": "falcon-180b-2x4xa100"}
TRACES = {
    "sharegpt": "sharegpt_8k_filtered_stats_llama2_tokenizer.csv.gz",
    "arxiv": "arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv.gz",
    "azure-conv": "AzureLLMInferenceTrace_conv.csv.gz",
}
UNSEEN = {"mooncake": "mooncake_synthetic_trace.jsonl.gz"}
"""Not looked at while `uniform` was made; of its requests, those that fit the context."""
SLOS = {"strict": 1.0, "relaxed": 5.0}
"""Sarathi-Serve's for Falcon-180B (OSDI'24, table 3): P99 of the time between tokens."""
MAX_MODEL_LEN = 16_384
MAX_NUM_SEQS = 1024
UNIFORM_TOKENS = 2048
"""The one setting of `uniform`: a hard limit that nothing reaches."""
SEED, SEEDS = 1, (1, 2, 3)
"""`uniform` was made looking at seed 0 of the built-in distributions."""

QUICK, STEADY = (1, 1, 200), (3, 3, 500)
"""Of a trial: lifetimes of its window, lifetimes of the ramp before it, least requests. A pipeline
fills for three lifetimes: until then it has fewer decodes than it will have, and serves more."""

LONGEST = MAX_MODEL_LEN + MAX_NUM_SEQS  # a whole prompt beside every decode
PUBLISHED = {
    "request_level": [{"max_num_seqs": 8, "max_num_batched_tokens": LONGEST}],
    "orca": [{"max_num_seqs": 8, "max_num_batched_tokens": LONGEST}],
    "vllm": [{"max_num_seqs": 128, "max_num_batched_tokens": LONGEST}],
    "sarathi": [{"max_num_batched_tokens": 256}],
    "sarathi_serve": [{"max_num_batched_tokens": 512}, {"max_num_batched_tokens": 2048}],
    "splitfuse": [{"max_num_batched_tokens": 2048}],
    "token_throttle": [{"max_num_batched_tokens": 2048}],
}
"""As papers or code have them; of sarathi_serve the strict and the relaxed one."""
SWEPT: dict[str, list[dict[str, int]]] = {
    "request_level": [{"max_num_seqs": 32, "max_num_batched_tokens": LONGEST}],
    "orca": [{"max_num_seqs": 64, "max_num_batched_tokens": LONGEST}],
    "vllm": [{"max_num_batched_tokens": LONGEST}],
    "sarathi": [{"max_num_batched_tokens": 512}],
    "sarathi_serve": [{"max_num_batched_tokens": n} for n in (384, 256, 1024)],
    "splitfuse": [{"max_num_batched_tokens": n} for n in (384, 512)],
    "token_throttle": [{"max_num_batched_tokens": n} for n in (512, 1024, 4096)],
}
ORDER = [
    "sarathi_serve", "token_throttle", "vllm", "splitfuse", "sarathi", "orca", "request_level"
]  # fmt: skip
"""What comes near `uniform` is searched first."""


@dataclass(frozen=True, slots=True)
class Case:
    """A policy with its knobs, on a workload. Without an SLO of its own unless it heeds one."""

    layout: str
    workload: str
    policy: str
    knobs: tuple[tuple[str, int], ...]
    slo_s: float | None = None
    wrong: tuple[float, ...] = ()
    """Factors of the profile's terms that the policy's cost model starts from."""

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


# ---- making pipelines ---------------------------------------------------------------------------


def make_policy(name: str) -> Policy:
    return PARTS[name]() if name in PARTS else get_policy(name)


def setup_of(case: Case) -> SimulatedRun:
    known = case.policy not in PARTS
    values = {
        "policy": case.policy if known else "sarathi_serve",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": MAX_NUM_SEQS,
        **dict(case.knobs),
    }
    setup = simulated_run(make_config(load_recipe(LAYOUTS[case.layout]), values))
    return replace(setup, limits=replace(setup.limits, max_tbt_s=case.slo_s))


def make_pipeline(case: Case, setup: SimulatedRun) -> SimulatedPipeline:
    policy = make_policy(case.policy)
    cost = None
    if policy.traits.reads_cost:
        profile = WrongProfile(setup.profile, *case.wrong) if case.wrong else setup.profile
        size = setup.config.tensor_parallel_size
        cost = PipelineCost(profile, setup.shape, setup.plan, size)
    return SimulatedPipeline(Engine(setup.plan, policy, setup.limits, cost), setup.times)


class WrongProfile:
    """A profile whose matrix products and attention are off by these factors."""

    def __init__(self, profile: Any, linear: float, attention: float) -> None:
        self._profile = profile
        self.linear = _Scaled(profile.linear, linear)
        self.attention = _Scaled(profile.attention, attention)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._profile, name)


class _Scaled:
    """Times of another, times a factor."""

    def __init__(self, times: Any, factor: float) -> None:
        self._times, self._factor = times, factor

    def __getattr__(self, name: str) -> Any:
        method, factor = getattr(self._times, name), self._factor
        return lambda *where: factor * method(*where)


# ---- what each part brings ----------------------------------------------------------------------


class Pipelined(SarathiServe):
    traits = Traits(plans_ahead=False, chunk_pipelining=True, one_in_flight=False)


class Ahead(SarathiServe):
    traits = Traits(plans_ahead=True, chunk_pipelining=True, one_in_flight=False)


class Balanced(Ahead):
    """Decodes capped at their share of a turn, as gLLM does."""

    def compose(self, view: Any, now: float) -> Any:
        share = -(-view.num_decoding // view.window)
        first = dict(list(view.decodes.items())[:share])
        return super().compose(replace(view, decodes=first), now)


class _Without(Uniform):
    """`uniform` with some of its parts off."""

    off: ClassVar[dict[str, float]] = {}

    def compose(self, view: Any, now: float) -> Any:
        kept = {name: getattr(uniform, name) for name in self.off}
        vars(uniform).update(self.off)
        try:
            return super().compose(view, now)
        finally:
            vars(uniform).update(kept)


class TimeBudget(_Without):
    off: ClassVar = {
        "SUSTAINED": 1e6,
        "MIN_THROTTLED": 10**9,
        "PATIENCE_S": 0.0,
        "LONGEST_LULL": 0.0,
    }


class KvAsNeeded(_Without):
    off: ClassVar = {"PATIENCE_S": 0.0, "LONGEST_LULL": 0.0}


class Patient(_Without):
    off: ClassVar = {"LONGEST_LULL": 0.0}


PARTS = {
    "sarathi_serve as published": SarathiServe,
    "+ chunk pipelining": Pipelined,
    "+ planned ahead": Ahead,
    "+ balanced decodes": Balanced,
    "+ time budget": TimeBudget,
    "+ KV as needed": KvAsNeeded,
    "+ short prompts pass": Patient,
    "+ decodes merged in lulls (uniform)": Uniform,
}


# ---- searching ----------------------------------------------------------------------------------


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


def search(case: Case, traces: Path | None, quick: bool) -> dict[str, Any]:
    """Capacities within each SLO that the case is for, from one set of trials: bisected in steps of
    5 % of the ceiling. (Of the requests that a seed draws for a window, the ceiling is itself up to
    3 % off: finer steps would say nothing.)"""
    os.nice(5)
    setup, lengths = setup_of(case), lengths_of(case.workload, traces)
    kept: dict[int, Trial] = {}
    slos = [case.slo_s] if case.slo_s is not None else list(SLOS.values())
    top = ceiling_of(setup, lengths, max(slos)).rate
    steps = 20  # of the ceiling
    lifetimes, ramp, requests = QUICK if quick else STEADY

    def is_within(step: int, slo_s: float) -> bool:
        if step not in kept:
            make = partial(make_pipeline, case, setup)
            rate = top * step / steps
            kept[step] = run_trial(make, lengths, rate, requests, SEED, lifetimes, ramp)
        return kept[step].within(slo_s)

    found = {}
    for slo_s in slos:
        low, high = 0, steps  # at 0 nothing is late, and the ceiling no schedule reaches
        while high - low > 1:
            middle = (low + high + 1) // 2
            if is_within(middle, slo_s):
                low = middle
            else:
                high = middle
        found[str(slo_s)] = top * low / steps
    return {"case": asdict(case), "capacity": found, "trials": [asdict(t) for t in kept.values()]}


def at_rate(case: Case, traces: Path | None, rate: float, quick: bool, seed: int = SEED) -> Trial:
    setup, lengths = setup_of(case), lengths_of(case.workload, traces)
    lifetimes, ramp, requests = QUICK if quick else STEADY
    make = partial(make_pipeline, case, setup)
    return run_trial(make, lengths, rate, requests, seed, lifetimes, ramp)


def cases(layouts: Sequence[str], workloads: Sequence[str]) -> Iterator[Case]:
    for layout in layouts:
        for workload in workloads:
            for slo_s in SLOS.values():
                knobs = (("max_num_batched_tokens", UNIFORM_TOKENS),)
                yield Case(layout, workload, "uniform", knobs, slo_s)
    for policy in sorted(PUBLISHED, key=ORDER.index):
        for knobs in [*PUBLISHED[policy], *SWEPT[policy]]:
            for layout in layouts:
                for workload in workloads:
                    yield Case(layout, workload, policy, tuple(sorted(knobs.items())))


def ablation_cases() -> Iterator[Case]:
    for name in PARTS:
        heeds = issubclass(PARTS[name], Uniform)
        tokens = UNIFORM_TOKENS if heeds else 512
        knobs = (("max_num_batched_tokens", tokens),)
        yield Case("TP1xPP8", "sharegpt", name, knobs, SLOS["strict"])
        if not heeds:
            knobs = (("max_num_batched_tokens", 384),)
            yield Case("TP1xPP8", "sharegpt", name, knobs, SLOS["strict"])


class Cache:
    """Searches that were done, in a file of lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                self.found[_case_of(entry).key] = entry

    def add(self, entry: dict[str, Any]) -> None:
        self.found[_case_of(entry).key] = entry
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def _case_of(entry: dict[str, Any]) -> Case:
    values = entry["case"]
    knobs = tuple((name, value) for name, value in values["knobs"])
    return Case(**{**values, "knobs": knobs, "wrong": tuple(values["wrong"])})


def search_all(wanted: Sequence[Case], cache: Cache, processes: int, **how: Any) -> None:
    todo = [case for case in wanted if case.key not in cache.found]
    with ProcessPoolExecutor(processes, max_tasks_per_child=1) as pool:
        futures = {pool.submit(search, case, **how): case for case in todo}
        for number, future in enumerate(as_completed(futures)):
            entry = future.result()
            cache.add(entry)
            case = futures[future]
            print(
                f"{number + 1}/{len(todo)} {case.layout} {case.workload} {case.policy} "
                f"{dict(case.knobs)} slo {case.slo_s}: {entry['capacity']}",
                flush=True,
            )


# ---- tables -------------------------------------------------------------------------------------


def best_trial(entry: dict[str, Any], slo_s: float) -> dict[str, Any] | None:
    rate = entry["capacity"].get(str(slo_s), 0.0)
    return next((t for t in entry["trials"] if t["rate"] == rate and rate), None)


def cell_table(cache: Cache, layout: str, workload: str, slo_s: float, top: Ceiling) -> str:
    rows = []
    entries = [e for e in cache.found.values() if _is_of(e, layout, workload, slo_s)]
    for policy in ["uniform", *PUBLISHED]:
        mine = [e for e in entries if e["case"]["policy"] == policy]
        if not mine:
            continue
        published = [e for e in mine if _is_published(e, slo_s)]
        best = max(mine, key=lambda e: e["capacity"].get(str(slo_s), 0.0))
        for name, entry in [("published", e) for e in published] + [("best swept", best)]:
            if policy == "uniform":
                name = "one setting"
                if entry is not best:
                    continue
            rows.append(_row(policy, name, entry, slo_s, top))
    return plain_table(
        ["policy", "setting", "requests/s", "of the ceiling", "TTFT P50", "TBT P99"], rows
    )


def _row(policy: str, name: str, entry: dict[str, Any], slo_s: float, top: Ceiling) -> list[str]:
    trial, rate = best_trial(entry, slo_s), entry["capacity"].get(str(slo_s), 0.0)
    knobs = ", ".join(f"{value}" for _, value in entry["case"]["knobs"])
    return [
        f"`{policy}`",
        f"{name} ({knobs})",
        f"{rate:.2f}" if rate else f"under {top.rate / 20:.2f}",
        f"{rate / top.rate:.2f}",
        f"{trial['ttft_p50_s']:.2f} s" if trial else "",
        f"{trial['tbt_p99_s']:.2f} s" if trial else "",
    ]


def _is_of(entry: dict[str, Any], layout: str, workload: str, slo_s: float) -> bool:
    case = entry["case"]
    return (
        (case["layout"], case["workload"]) == (layout, workload)
        and str(slo_s) in entry["capacity"]
        and not case["wrong"]
    )


def _is_published(entry: dict[str, Any], slo_s: float) -> bool:
    case = entry["case"]
    settings = PUBLISHED.get(case["policy"], [])
    if case["policy"] == "sarathi_serve":
        settings = settings[:1] if slo_s == SLOS["strict"] else settings[1:]
    return dict(map(tuple, case["knobs"])) in settings


def tables(cache: Cache, layouts: Sequence[str], workloads: Sequence[str], traces: Any) -> str:
    parts = []
    for layout in layouts:
        for workload in workloads:
            case = Case(layout, workload, "sarathi_serve", (("max_num_batched_tokens", 512),))
            setup, lengths = setup_of(case), lengths_of(workload, traces)
            for slo, slo_s in SLOS.items():
                top = ceiling_of(setup, lengths, slo_s)
                even = ceiling_of(setup, lengths, slo_s, mixed=False)
                parts.append(
                    f"### {layout}, {workload}, {slo} ({slo_s:g} s)\n\nCeiling: {top.rate:.2f} "
                    f"requests/s, microbatches of {top.num_tokens} tokens and "
                    f"{top.microbatch_s * 1e3:.0f} ms (bound by: {top.bound}); with microbatches "
                    f"all of one size {even.rate / top.rate:.2f} of it ({even.num_tokens} tokens, "
                    f"{even.microbatch_s * 1e3:.0f} ms).\n\n"
                    + cell_table(cache, layout, workload, slo_s, top)
                )
    return "\n\n".join(parts)


def ablation_table(cache: Cache, traces: Path | None) -> str:
    rows = []
    slo_s = SLOS["strict"]
    for case in ablation_cases():
        entry = cache.found.get(case.key)
        if entry is None:
            continue
        top = ceiling_of(setup_of(case), lengths_of(case.workload, traces), slo_s)
        rows.append([f"{case.policy}", *_row("", "", entry, slo_s, top)[1:]])
    return plain_table(
        ["part", "tokens", "requests/s", "of the ceiling", "TTFT P50", "TBT P99"], rows
    )


def cells_of(cache: Cache) -> list[Case]:
    """Of `uniform`, in the order of the tables."""
    cases = map(_case_of, cache.found.values())
    cells = [case for case in cases if case.policy == "uniform" and not case.wrong]
    order = [*LAYOUTS, *TRACES, *UNSEEN]
    return sorted(cells, key=lambda c: (order.index(c.layout), order.index(c.workload), c.slo_s))


def name_of(case: Case) -> str:
    return f"{case.layout}, {case.workload}, {case.slo_s:g} s"


def at_equal_load(cache: Cache, pool: Executor, how: dict[str, Any]) -> str:
    """`uniform` beside the best `sarathi_serve` of the cell, at 0.9 of the latter's capacity."""
    pairs = []
    for case in cells_of(cache):
        entries = [
            e
            for e in cache.found.values()
            if e["case"]["policy"] == "sarathi_serve"
            and _is_of(e, case.layout, case.workload, case.slo_s)
        ]
        rival = max(entries, key=lambda e: e["capacity"][str(case.slo_s)])
        rate = 0.9 * rival["capacity"][str(case.slo_s)]
        trials = [pool.submit(at_rate, c, rate=rate, **how) for c in (_case_of(rival), case)]
        pairs.append((case, trials))
    rows = []
    for case, trials in pairs:
        theirs, ours = (trial.result() for trial in trials)
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
        trials = [trial.result() for trial in tried]
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
WRONG = ((1.0, 1.0), (1.3, 0.7), (0.7, 1.3), (1.3, 1.3), (0.7, 0.7))


def wrong_table(pool: Executor, how: dict[str, Any]) -> str:
    """What a cost profile that is off at the start changes, at 0.9 of the ceiling."""
    tried = []
    for layout in LAYOUTS:
        for factors in WRONG:
            knobs = (("max_num_batched_tokens", UNIFORM_TOKENS),)
            case = Case(layout, "sharegpt", "uniform", knobs, SLOS["strict"], factors)
            setup, lengths = setup_of(case), lengths_of(case.workload, how["traces"])
            rate = WRONG_LOAD * ceiling_of(setup, lengths, SLOS["strict"]).rate
            trial = pool.submit(at_rate, case, rate=rate, **how)
            tried.append((case, trial, pool.submit(learnt_after, case, how["traces"], rate)))
    rows = []
    for case, trial, learning in tried:
        learnt, found = learning.result(), trial.result()
        rows.append(
            [
                case.layout,
                f"{case.wrong[0]:g}, {case.wrong[1]:g}",
                "never" if learnt is None else f"{learnt[1]:.1f} s, {learnt[0]} microbatches",
                f"{found.output_tokens_per_s:.0f}",
                f"{found.tbt_p99_s:.3f} s",
                f"{found.ttft_p50_s:.2f} s",
            ]
        )
    header = ["layout", "products, attention off by", "learnt after", "output tokens/s",
              "TBT P99", "TTFT P50"]  # fmt: skip
    return plain_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="shorter trials")
    parser.add_argument("--print", action="store_true", help="only the tables of what is there")
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS))
    parser.add_argument("--workloads", nargs="*", default=list(TRACES))
    parser.add_argument("--policies", nargs="*")
    parser.add_argument("--ablation", action="store_true", help="what each part brings")
    parser.add_argument("--loads", action="store_true", help="at equal loads, and wrong profiles")
    parser.add_argument("--page", type=Path, help="docs/schedules.md: where the tables are put")
    given = parser.parse_args()
    cache = Cache(given.cache)
    wanted = list(ablation_cases() if given.ablation else cases(given.layouts, given.workloads))
    if given.policies:
        wanted = [case for case in wanted if case.policy in given.policies]
    how = {"traces": given.traces, "quick": given.quick}
    if not (given.print or given.loads):
        search_all(wanted, cache, given.processes, **how)
    if given.loads:
        with ProcessPoolExecutor(given.processes) as pool:
            show(at_equal_load(cache, pool, how), "equal load", given.page)
            show(at_ninety(cache, pool, how), "stage-seconds", given.page)
            show(wrong_table(pool, how), "wrong profile", given.page)
    elif given.ablation:
        show(ablation_table(cache, given.traces), "parts", given.page)
    else:
        name = "cells" if given.workloads == list(TRACES) else "unseen"
        show(tables(cache, given.layouts, given.workloads, given.traces), name, given.page)


if __name__ == "__main__":
    main()
