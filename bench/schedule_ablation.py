"""What each rule and constant of `uniform` is worth: taken out one at a time.

    python bench/schedule_ablation.py --traces DIR --cache FILE.jsonl [--page docs/schedules.md]
                                      [--only WORD] [--cells WORD]

Seven loads (`CELLS`), seeds 1 to 3, short trials. Each figure is how much more than with everything
in, as a mean over the seeds; behind it the least and the most, which is what a seed moves it by.
What lies on both sides of nothing is worth nothing.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial, reduce
from itertools import product
from math import inf
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from learnt_cost_cases import cpu
from report import plain_table, show
from schedule_cases import SLOS, UNIFORM_TOKENS, Case, setup_of
from schedule_goodput import Tried, good_shares
from schedule_search import QUICK, SEEDS, at_rate, ceiling_of, lengths_of

from pipeserve.core.cost.pipeline_cost import PipelineCost
from pipeserve.core.cost.rough import ROUGH_CPU
from pipeserve.core.engine import Engine
from pipeserve.core.policies import get_policy, uniform
from pipeserve.core.policies.mix import Mix, Price
from pipeserve.core.policies.uniform import Uniform
from pipeserve.core.view import RequestView, View
from pipeserve.profiling.search.capacity import Arrival, Window, run_window
from pipeserve.profiling.simulation.simulator import SimulatedPipeline, Simulation
from pipeserve.profiling.simulation.stage_times import ProfiledTimes
from pipeserve.profiling.simulation.workloads import DISTRIBUTIONS, draw_lengths

# ---- the loads ----------------------------------------------------------------------------------


def on_a100s(
    layout: str, workload: str, load: float, traces: Path | None, seed: int, **knobs: Any
) -> Tried:
    """`load`: share of the ceiling. Within 1 s between tokens, and in the order that `uniform` has
    by default, or another."""
    order = knobs.pop("order", Uniform.traits.order)
    knobs["max_num_batched_tokens"] = UNIFORM_TOKENS
    case = Case(layout, workload, "uniform", tuple(knobs.items()), SLOS["strict"], order)
    top = ceiling_of(setup_of(case), lengths_of(workload, traces), SLOS["strict"])
    return at_rate(case, traces, load * top.rate, quick=True, seed=seed)


def on_cpus(rate: float, _: Path | None, seed: int, **changed: Any) -> Tried:
    """Two CPU stages, whose times have no steps and scatter; without a limit between tokens as
    there by default, which is without a profile."""
    lifetimes, ramp, requests = QUICK
    make, lengths = partial(_cpus, seed, changed), cpu().lengths
    return Tried.of(run_window(make, lengths, rate, requests, seed, lifetimes, ramp))


def at_once(_: Path | None, seed: int, number: int = 100) -> Tried:
    """The same: requests of ShareGPT, an eighth as long, that come together."""
    lengths = draw_lengths(DISTRIBUTIONS["sharegpt"], number, Random(seed))
    arrivals = [Arrival(0.0, prompt // 8 + 1, output // 8 + 2) for prompt, output in lengths]
    pipeline = _cpus(seed, {"max_tbt_s": None, "max_num_seqs": len(arrivals)})
    simulation = Simulation(pipeline, arrivals)
    simulation.run_until()
    stop_s = pipeline.flights[-1].ends_s[-1]
    return Tried.of(Window(simulation, len(arrivals) / stop_s, stop_s, 0.0, stop_s))


def _cpus(seed: int, changed: Mapping[str, Any]) -> SimulatedPipeline:
    cell = cpu()
    limits = replace(cell.limits, **changed)
    where = (cell.profile, cell.shape, cell.plan, cell.size)
    prior = cell.profile if limits.max_tbt_s is not None else ROUGH_CPU
    cost = PipelineCost(prior, *where[1:])
    engine = Engine(cell.plan, get_policy("uniform"), limits, cost)
    return SimulatedPipeline(engine, ProfiledTimes(*where, seed))


CELLS: Mapping[str, Callable[[Path | None, int], Tried]] = {
    "PP8, arXiv, 0.5": partial(on_a100s, "TP1xPP8", "arxiv", 0.5),
    "PP2, Azure, 0.9": partial(on_a100s, "TP4xPP2", "azure-conv", 0.9),
    "PP8, ShareGPT, 0.9": partial(
        on_a100s, "TP1xPP8", "sharegpt", 0.9, num_gpu_blocks_override=20_000
    ),
    "PP8, ShareGPT, 0.8, fcfs": partial(on_a100s, "TP1xPP8", "sharegpt", 0.8, order="fcfs"),
    "CPUs, 0.5 s": partial(on_cpus, 1.1),
    "CPUs, 32 seats": partial(on_cpus, 2.5, max_tbt_s=None, max_num_seqs=32),
    "CPUs, all at once": at_once,
}
"""In lulls, where what stages compute is the bound, where KV is (a quarter of it: all of it takes
long to fill), in order of arrival, where the limit between tokens is the bound, where seats are and
there is no limit, and where there are neither."""


# ---- what is taken out --------------------------------------------------------------------------


def _as_they_come(view: View, price: Price, num_prefill: int) -> float:
    """In place of `_filled`."""
    return price.on_bottleneck(*uniform._mean_decodes(view), num_prefill)


def _only_where_none_runs(view: View, mix: Mix, start: int, left: int, *_: float) -> int:
    """In place of `_least`."""
    return 0 if view.outstanding or mix.num_tokens else min(left, uniform.MIN_PIECE)


def _one_after_the_other(view: View, may_start: Callable[[], bool]) -> Iterator[RequestView]:
    """In place of `_in_order`, where all have one precedence."""
    yield from view.prefills.values()
    for new in uniform._startable(view):
        if not may_start():
            return
        yield new


ALL_IN = "everything in"
WITHOUT: Mapping[str, Mapping[str, Any]] = {
    ALL_IN: {},
    "time: a knee": {"_knee": lambda *_: 2 * UNIFORM_TOKENS},
    "time: a margin below the limit": {"MARGIN": 1.0},
    "time: a due time, only the longest microbatch": {"_due_s": lambda *_: inf},
    "decodes: spread over a turn": {"_num_decodes": lambda view, price, ready: len(ready)},
    "decodes: spread by context, not by number": {"_tokens_per_position": lambda view, price: 0.0},
    "prompts: an even share": {"Uniform._budget": lambda *given: ("longest", given[-1])},
    "prompts: pieces that all wait least for, but as few as can be": {
        "_pieces": lambda *given: given[-1]
    },
    "prompts: pieces no longer than enough": {"ENOUGH": uniform.KNEE},
    "prompts: side by side": {"_in_order": _one_after_the_other},
    "prompts: whole tiles": {"_filled": _as_they_come},
    "prompts: a tolerance": {"TOLERANCE": 1.0},
    "prompts: a least piece": {"MIN_PIECE": 1},
    "prompts: a piece where none fits": {"_least": _only_where_none_runs},
    "kv: free blocks spread over turns": {"TURNS": 1e-9},
}
"""What is taken out, and what stands for it in `uniform` then."""

FIGURES: Mapping[str, Callable[[Tried], float]] = {
    "output tokens/s": lambda tried: tried.trial.output_tokens_per_s,
    "good, %": lambda tried: 100 * good_shares(tried.met, SLOS["strict"])[0],
    "TTFT P50, s": lambda tried: tried.trial.ttft_p50_s,
    "TTFT P99, s": lambda tried: tried.trial.ttft_p99_s,
    "TBT P99, ms": lambda tried: 1e3 * tried.trial.tbt_p99_s,
}


def trial(row: str, cell: str, seed: int, traces: Path | None) -> list[float]:
    """The figures, in a process of its own: it changes `uniform`."""
    os.nice(5)
    for name, value in WITHOUT[row].items():
        *owners, last = name.split(".")
        owner = reduce(getattr, owners, uniform)
        assert hasattr(owner, last), name
        setattr(owner, last, value)
    tried = CELLS[cell](traces, seed)
    return [float(figure(tried)) for figure in FIGURES.values()]


def table(found: Mapping[tuple[str, str], Sequence[Sequence[float]]]) -> str:
    """`found`: by row and cell, the figures of each seed."""
    rows = []
    for (name, cell), seeds in found.items():
        base = found[ALL_IN, cell]
        row = [name, cell]
        for place in range(len(FIGURES)):
            values = [seed[place] for seed in seeds]
            if seeds is not base:
                values = [v - seed[place] for v, seed in zip(values, base, strict=True)]
            sign = "" if seeds is base else "+"
            figures = (fmean(values), min(values), max(values))
            row.append("{} ({} to {})".format(*[f"{each:{sign}.2f}" for each in figures]))
        rows.append(row)
    return plain_table(["without", "load", *FIGURES], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--cache", type=Path, required=True, help="what was found, a line each")
    parser.add_argument("--only", default="", help="rows that have this in their names")
    parser.add_argument("--cells", default="", help="loads that have this in their names")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--page", type=Path, help="docs/schedules.md: where the table is put")
    given = parser.parse_args()
    kept: dict[tuple[str, str], list[list[float]]] = {}
    if given.cache.exists():
        for line in given.cache.read_text().splitlines():
            row, cell, figures = json.loads(line)
            kept[row, cell] = figures
    rows = [row for row in WITHOUT if given.only in row or row == ALL_IN]
    found = {}
    with ProcessPoolExecutor(given.processes, max_tasks_per_child=1) as pool:
        for row, cell in product(rows, [cell for cell in CELLS if given.cells in cell]):
            if (row, cell) not in kept:
                tried = [pool.submit(trial, row, cell, seed, given.traces) for seed in SEEDS]
                kept[row, cell] = [each.result() for each in tried]
                with given.cache.open("a") as file:
                    file.write(json.dumps([row, cell, kept[row, cell]]) + "\n")
                print(row, cell, kept[row, cell], flush=True)
            found[row, cell] = kept[row, cell]
    show(table(found), "ablation", given.page)


if __name__ == "__main__":
    main()
