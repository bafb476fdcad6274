"""What each rule and constant of `uniform` is worth: taken out one at a time.

    python bench/schedule_ablation.py --traces DIR --cache FILE.jsonl [--page docs/schedules.md]
                                      [--only WORD] [--workloads NAME ...]

Three cells of `schedules.py` at one load each (`CELLS`), seeds 1 to 3, short trials. Each figure is
how much more than with everything in, as a mean over the seeds; behind it the least and the most,
which is what a seed moves it by. What lies on both sides of nothing is worth nothing.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import reduce
from itertools import product
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any

from report import plain_table, show
from schedule_cases import SLOS, UNIFORM_TOKENS, Case, setup_of
from schedule_goodput import Tried, good_shares
from schedule_search import SEEDS, at_rate, ceiling_of, lengths_of

from pipeserve.core.policies import uniform
from pipeserve.core.policies.mix import Mix, Price
from pipeserve.core.policies.uniform import Uniform
from pipeserve.core.view import RequestView, View

Cell = tuple[str, str, float, int | None]
CELLS: tuple[Cell, ...] = (
    ("TP1xPP8", "arxiv", 0.5, None),
    ("TP4xPP2", "azure-conv", 0.9, None),
    ("TP1xPP8", "sharegpt", 0.9, 20_000),
)
"""Layout, trace, load as a share of the ceiling, and blocks of KV where they are fewer than the
device has: in lulls, where what stages compute is the bound, and where KV is (a quarter of it: all
of it takes long to fill). All within 1 s between tokens, under the order that `uniform` has by
default."""


def _as_they_come(view: View, price: Price, num_prefill: int) -> float:
    """In place of `_filled`."""
    num_decodes, context = view.num_decoding // view.window, view.decoding_context // view.window
    return price.on_bottleneck(num_decodes, context, num_prefill)


def _only_where_none_runs(view: View, mix: Mix, start: int, left: int, *_: float) -> int:
    """In place of `_least`."""
    return 0 if view.outstanding or mix.num_tokens else min(left, uniform.MIN_PIECE)


def _share_alone(view: View, price: Price, ready: Sequence[RequestView], *_: float) -> int:
    """In place of `_num_going`."""
    return uniform._share(view, price, ready)


ALL_IN = "everything in"
WITHOUT: Mapping[str, Mapping[str, Any]] = {
    ALL_IN: {},
    "time: a knee": {"_knee": lambda *_: 2 * UNIFORM_TOKENS},
    "time: a margin below the limit": {"MARGIN": 1.0},
    "time: a due time, only the longest microbatch": {"_due_s": lambda *_: inf},
    "decodes: spread over a turn": {"_num_going": lambda view, price, ready, *_: len(ready)},
    "decodes: all go where one would be late": {"_num_going": _share_alone},
    "decodes: spread by context, not by number": {"_tokens_per_position": lambda view, price: 0.0},
    "prompts: an even share": {"_budget": lambda view, price, longest: ("longest", longest)},
    "prompts: spread over more than a turn": {"SPREAD": 1},
    "prompts: a least size to spread to": {"ENOUGH": 0.0},
    "prompts: whole tiles": {"_filled": _as_they_come},
    "prompts: a tolerance": {"TOLERANCE": 1.0},
    "prompts: a least piece": {"MIN_PIECE": 1},
    "prompts: a piece where none fits": {"_least": _only_where_none_runs},
    "kv: free blocks spread over turns": {"TURNS": 1e-9},
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
    layout, workload, load, num_blocks = cell
    knobs = [("max_num_batched_tokens", UNIFORM_TOKENS)]
    if num_blocks is not None:
        knobs.append(("num_gpu_blocks_override", num_blocks))
    case = Case(layout, workload, "uniform", tuple(knobs), SLOS["strict"], Uniform.traits.order)
    top = ceiling_of(setup_of(case), lengths_of(workload, traces), SLOS["strict"])
    tried = at_rate(case, traces, load * top.rate, quick=True, seed=seed)
    return [figure(tried) for figure in FIGURES.values()]


def table(found: Mapping[tuple[str, Cell], Sequence[Sequence[float]]]) -> str:
    """`found`: by row and cell, the figures of each seed."""
    rows = []
    for (name, cell), seeds in found.items():
        base = found[ALL_IN, cell]
        row = [name, "{}, {}, {:g}".format(*cell[:3])]
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
