"""`pipeserve tune`: the layout, layer split, window and policy that serve a workload best, searched
in the simulator.

`docs/tune.md` says how, and documents the keys of `--json`.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from pipeserve.configs import RunConfig
from pipeserve.configs.recipes import write_recipe
from pipeserve.core.cost.shape import ModelShape
from pipeserve.errors import CapacityError
from pipeserve.launch.inputs.workload import Workload
from pipeserve.launch.run.processes import processes
from pipeserve.launch.show.tables import print_notes
from pipeserve.launch.verbs.tune_search import (
    SEARCHED,
    TuningGoal,
    bars,
    make_wanted,
    search,
    searched,
)
from pipeserve.machine import num_cpus
from pipeserve.profiling.search.tuning import Tried

_MOST_ROWS = 20


def tune(
    config: RunConfig,
    shape: ModelShape,
    workload: Workload,
    rate: float | None,
    num_gpus: int | None,
    fixed: Mapping[str, Any],
    num_processes: int | None,
    output: Path | None,
) -> dict[str, Any]:
    """Searches, prints the table, writes the best recipe to `output` or prints it, and returns the
    object that `--json` writes. `fixed`: fields of the run that are not to be searched.

    Raises ConfigError for what cannot be searched, and CapacityError when nothing is within the
    SLO.
    """
    num_gpus = num_gpus or config.tensor_parallel_size * config.pipeline_parallel_size
    tried = searched(config, shape, num_gpus, fixed)
    wanted = make_wanted(config, shape, workload, rate, tried)
    with (
        bars(Console(stderr=True)) as progress,
        processes(num_processes or num_cpus()) as run,
    ):
        ranked = search(config, shape, wanted, tried, run, progress)
    print_ranked(wanted, ranked, Console())
    if not ranked[0].found.is_within:
        raise CapacityError(
            f"no candidate serves {wanted.workload} with TBT p99 within {wanted.slo_tbt_s:g} s; "
            "give a longer --slo-tbt, more --gpus or a lower --rate"
        )
    text = recipe(config, num_gpus, wanted, ranked)
    if output is None:
        print(text, end="")
    else:
        output.write_text(text, encoding="utf-8")
        print(f"{output}: the first of the table")
    return make_report(config, num_gpus, wanted, ranked)


def make_report(
    config: RunConfig, num_gpus: int, wanted: TuningGoal, ranked: Sequence[Tried]
) -> dict[str, Any]:
    """The object that `--json` writes."""
    return {
        "workload": wanted.workload,
        "requests": len(wanted.lengths),
        "left_out": wanted.num_left_out,
        "notes": list(wanted.notes),
        "slo_tbt_s": wanted.slo_tbt_s,
        "rate": wanted.rate,
        "gpus": num_gpus,
        "ceiling_rps": wanted.ceiling,
        "candidates": [
            {**asdict(each.candidate), "round": each.round, **asdict(each.found)} for each in ranked
        ],
        "best": asdict(best_config(config, ranked)) if ranked[0].found.is_within else None,
    }


def best_config(config: RunConfig, ranked: Sequence[Tried]) -> RunConfig:
    return replace(config, **asdict(ranked[0].candidate))


def recipe(config: RunConfig, num_gpus: int, wanted: TuningGoal, ranked: Sequence[Tried]) -> str:
    """The best candidate as a recipe, with what it was tuned for and what was found."""
    found = ranked[0].found
    goal = "as many requests as possible"
    if wanted.rate is not None:
        goal = f"{wanted.rate:g} requests/s"
    served = f"{found.rate:.3g} requests/s, {found.output_tokens_per_s:,.0f} output tokens/s"
    comment = (
        f"By `pipeserve tune`: {config.model} on {num_gpus} GPUs of {config.device_profile}, for "
        f"{wanted.workload} ({len(wanted.lengths):,} requests), {goal} with 99 % of the times "
        f"between tokens within {wanted.slo_tbt_s:g} s. Simulated, seed {config.seed}: {served}, "
        f"TTFT p50 {found.ttft_p50_s:.2f} s, TBT p99 {found.tbt_p99_s:.3f} s; the best of "
        f"{len(ranked)} candidates."
    )
    return write_recipe(best_config(config, ranked), SEARCHED, textwrap.fill(comment, 96))


def print_ranked(wanted: TuningGoal, ranked: Sequence[Tried], console: Console) -> None:
    """The table: those of the last round first."""
    goal = "as many requests as can be" if wanted.rate is None else f"{wanted.rate:g} requests/s"
    title = f"{wanted.workload}, {goal}; TTFT p50, TBT p99 within {wanted.slo_tbt_s:g} s"
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for name in ("TPxPP", "layers", "window", "policy"):
        table.add_column(name, overflow="fold")
    for name in ("tokens", "req/s", "tok/s", "TTFT", "TBT", "within"):
        table.add_column(name, justify="right")
    for each in ranked[:_MOST_ROWS]:
        table.add_row(*_row(each, is_rate_given=wanted.rate is not None))
    console.print(table)
    if len(ranked) > _MOST_ROWS:
        console.print(f"{len(ranked) - _MOST_ROWS} more gave less; --json has all of them")
    print_notes({"notes": wanted.notes}, console)
    if wanted.num_left_out:
        console.print(f"note: {wanted.num_left_out:,} requests that fit nowhere were left out")


def _row(tried: Tried, is_rate_given: bool) -> Iterator[str]:
    """`req/s` is blank where a candidate was dropped before its capacity was searched."""
    candidate, found = tried.candidate, tried.found
    yield f"{candidate.tensor_parallel_size}x{candidate.pipeline_parallel_size}"
    yield "even" if candidate.pipeline_layers is None else _in_runs(candidate.pipeline_layers)
    yield str(candidate.pipeline_window or candidate.pipeline_parallel_size)
    yield candidate.policy
    yield str(candidate.max_num_batched_tokens or "")
    if found.capacity_rps == 0:
        yield "cannot"
    else:
        yield f"{found.rate:.3g}" if is_rate_given or found.capacity_rps else ""
    yield f"{found.output_tokens_per_s:,.0f}"
    yield f"{found.ttft_p50_s:.2f}"
    yield f"{found.tbt_p99_s:.3f}"
    yield "yes" if found.is_within else "no"


def _in_runs(layers: Sequence[int]) -> str:
    """(11, 10, 10, 9) as "11+2x10+9"."""
    runs = [(count, len(list(run))) for count, run in groupby(layers)]
    return "+".join(f"{length}x{count}" if length > 1 else str(count) for count, length in runs)
