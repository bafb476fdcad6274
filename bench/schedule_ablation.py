"""What each rule and constant of `uniform` is worth: taken out one at a time.

    python bench/schedule_ablation.py --traces DIR --cache FILE.jsonl [--page docs/schedules.md]
                                      [--only WORD] [--workloads NAME ...]

Three cells of `schedules.py` at one load each (`CELLS`), seeds 1 to 3. Each figure is how much more
than with everything in, as a mean over the seeds; behind it the least and the most, which is what a
seed moves it by. What lies on both sides of nothing is worth nothing.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import reduce
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from report import plain_table, show
from schedule_cases import SLOS, UNIFORM_TOKENS, Case, setup_of
from schedule_goodput import Tried, good_shares
from schedule_search import SEEDS, at_rate, ceiling_of, lengths_of

from pipeserve.core.policies import uniform
from pipeserve.core.policies.uniform import Uniform

CELLS = (
    ("TP1xPP8", "arxiv", 0.5, True),
    ("TP4xPP2", "azure-conv", 0.9, True),
    ("TP1xPP8", "sharegpt", 0.8, False),
)
"""Layout, trace, load as a share of the ceiling, and whether short trials do: in lulls, where what
stages compute is the bound, and where KV is, which takes long to fill. All within 1 s between
tokens, under the order that `uniform` has by default."""

Cell = tuple[str, str, float, bool]


def _as_they_come(budget: Any, num_prefill: int) -> float:
    """In place of `_Budget._filled`."""
    seconds: float = budget._price.on_bottleneck(budget._num_decodes, budget._context, num_prefill)
    return seconds


ALL_IN = "everything in"
WITHOUT: Mapping[str, Mapping[str, Any]] = {
    ALL_IN: {},
    "a margin below the limit": {"MARGIN": 1.0},
    "a knee: as large as the limits allow": {"_knee": lambda view, price: 2 * UNIFORM_TOKENS},
    "prompts spread over more than a turn": {"SPREAD": 1},
    "a least size to spread to": {"ENOUGH": 0.0},
    "filling whole tiles": {"_Budget._filled": _as_they_come},
    "a least piece": {"MIN_PIECE": 1},
    "what KV sustains": {"_Budget._sustained": lambda budget: float("inf")},
    "waiting for outputs to be typical": {"ENOUGH_ENDED": 0},
    "free KV spread over turns": {"TURNS": 1e-9},
    "a least piece that KV restricts to": {"MIN_THROTTLED": 1},
    "a longest turn": {"LONGEST_TURN": 1e9},
    "decodes that wait in a lull": {"_waits_for_more": lambda *_: False},
    "a price of that wait": {"SAVED_PER_DELAY": 0.0},
    "a longest turn in a lull": {"LONGEST_LULL": 1.0},
    "decodes evened out with a limit": {"SPLIT_BELOW": 0.0},
    "evening out only where it saves": {"SPLIT_BELOW": 1.0},
    "decodes by context, not by number": {"_tokens_per_position": lambda view, price: 0.0},
    "a due time: only the limit of a microbatch": {"_due_s": lambda *_: float("inf")},
}
"""What is taken out, and what stands for it in `uniform` then."""

FIGURES: Mapping[str, Callable[[Tried], float]] = {
    "busy, %": lambda tried: 100 * max(tried.trial.busy),
    "good, %": lambda tried: 100 * good_shares(tried.met, SLOS["strict"])[0],
    "TTFT P50, s": lambda tried: tried.trial.ttft_p50_s,
    "TTFT P99, s": lambda tried: tried.trial.ttft_p99_s,
    "TBT P99, ms": lambda tried: 1e3 * tried.trial.tbt_p99_s,
}


def trial(row: str, cell: Cell, seed: int, traces: Path | None) -> list[float]:
    """The figures, in a process of its own: it changes `uniform`."""
    os.nice(5)
    for name, value in WITHOUT[row].items():
        *owners, last = name.split(".")
        owner = reduce(getattr, owners, uniform)
        assert hasattr(owner, last), name
        setattr(owner, last, value)
    layout, workload, load, is_quick = cell
    knobs = (("max_num_batched_tokens", UNIFORM_TOKENS),)
    case = Case(layout, workload, "uniform", knobs, SLOS["strict"], Uniform.traits.order)
    top = ceiling_of(setup_of(case), lengths_of(workload, traces), SLOS["strict"])
    tried = at_rate(case, traces, load * top.rate, is_quick, seed)
    return [figure(tried) for figure in FIGURES.values()]


def table(found: Mapping[tuple[str, Cell], Sequence[Sequence[float]]]) -> str:
    """`found`: by row and cell, the figures of each seed."""
    rows = []
    for (name, cell), seeds in found.items():
        base = found[ALL_IN, cell]
        row = [name, "{}, {}, {:g}".format(*cell)]
        for place in range(len(FIGURES)):
            values = [seed[place] for seed in seeds]
            if seeds is not base:
                values = [v - seed[place] for v, seed in zip(values, base, strict=True)]
            sign = "" if seeds is base else "+"
            figures = (fmean(values), min(values), max(values))
            row.append("{} ({} to {})".format(*[f"{each:{sign}.2f}" for each in figures]))
        rows.append(row)
    return plain_table(["without", "cell, load", *FIGURES], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--cache", type=Path, required=True, help="what was found, a line each")
    parser.add_argument("--only", default="", help="rows that have this in their names")
    parser.add_argument("--workloads", nargs="*", default=[cell[1] for cell in CELLS])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--page", type=Path, help="docs/schedules.md: where the table is put")
    given = parser.parse_args()
    kept: dict[tuple[str, str], list[list[float]]] = {}
    if given.cache.exists():
        for line in given.cache.read_text().splitlines():
            row, workload, figures = json.loads(line)
            kept[row, workload] = figures
    rows = [row for row in WITHOUT if given.only in row or row == ALL_IN]
    found = {}
    with ProcessPoolExecutor(given.processes, max_tasks_per_child=1) as pool:
        for row, cell in product(rows, [cell for cell in CELLS if cell[1] in given.workloads]):
            if (row, cell[1]) not in kept:
                tried = [pool.submit(trial, row, cell, seed, given.traces) for seed in SEEDS]
                kept[row, cell[1]] = [each.result() for each in tried]
                with given.cache.open("a") as file:
                    file.write(json.dumps([row, cell[1], kept[row, cell[1]]]) + "\n")
                print(row, *cell, kept[row, cell[1]], flush=True)
            found[row, cell] = kept[row, cell[1]]
    show(table(found), "ablation", given.page)


if __name__ == "__main__":
    main()
