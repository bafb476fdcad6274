"""`pipeserve tune`: the layout, layer split, window and policy that serve a workload best, searched
in the simulator.

`docs/tune.md` says how, and documents the keys of `--json`.
"""

import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import groupby
from math import inf
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pipeserve.configs import RunConfig
from pipeserve.configs.device_profiles import load_profile
from pipeserve.configs.recipes import write_recipe
from pipeserve.core.cost.shape import ModelShape
from pipeserve.errors import CapacityError, ConfigError
from pipeserve.launch.inputs.workload import Workload
from pipeserve.launch.run.processes import Run, processes
from pipeserve.launch.run.simulated import SimulatedRun, simulated_run
from pipeserve.launch.show.tables import print_notes
from pipeserve.profiling.search.capacity import Lengths, Trial, find_capacity, run_trial
from pipeserve.profiling.search.ceiling import ceiling
from pipeserve.profiling.search.tuning import (
    POLICIES,
    Candidate,
    Found,
    Tried,
    candidates,
    halve,
    layouts,
)

_LONE_SHARE = 1 / 500  # of the ceiling: requests hardly ever meet
_LONE_REQUESTS = 50
_MOST_ROWS = 20
_SEARCHED = tuple(item.name for item in fields(Candidate))


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """One round of the search: how long its trials are."""

    name: str
    num_requests: int
    num_lifetimes: int
    finds_capacity: bool = False


ROUNDS = (
    Effort(name="short trials", num_requests=100, num_lifetimes=1),
    Effort(name="longer trials", num_requests=500, num_lifetimes=3),
    Effort(name="the last few", num_requests=1000, num_lifetimes=5),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is tuned for."""

    workload: str
    lengths: Lengths
    priorities: Sequence[int]
    """Parallel to `lengths`."""
    num_left_out: int
    """Requests that no layout can hold."""
    slo_tbt_s: float
    rate: float | None
    """Requests a second to serve; None: as many as possible."""
    ceiling: float
    """Requests a second that no schedule of any layout passes."""
    notes: tuple[str, ...] = ()
    """Of the workload."""


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
        processes(num_processes or len(os.sched_getaffinity(0))) as run,
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


# ---- what is searched ---------------------------------------------------------------------------


def searched(
    config: RunConfig, shape: ModelShape, num_gpus: int, fixed: Mapping[str, Any]
) -> list[Candidate]:
    """The run as it is, where it takes so many GPUs, and every candidate that has those fields as
    the user `fixed` them. Raises ConfigError when there are none."""
    if config.device_profile is None:
        raise ConfigError(
            "no device profile: give --device-profile NAME or FILE, or a recipe that names one"
        )
    sizes = layouts(num_gpus, shape, load_profile(config.device_profile))
    for name, place in (("tensor_parallel_size", 0), ("pipeline_parallel_size", 1)):
        sizes = [size for size in sizes if size[place] == fixed.get(name, size[place])]
    policies = POLICIES
    if "policy" in fixed:
        policies = {config.policy: POLICIES.get(config.policy, (config.max_num_batched_tokens,))}
    kept = {
        name: getattr(config, name)
        for name in ("pipeline_layers", "pipeline_window", "max_num_batched_tokens")
        if name in fixed
    }
    found = [replace(each, **kept) for each in candidates(shape, sizes, policies)]
    if config.tensor_parallel_size * config.pipeline_parallel_size == num_gpus:
        found.insert(0, Candidate(*(getattr(config, name) for name in _SEARCHED)))
    found = [each for each in dict.fromkeys(found) if _is_split_for(each)]
    if not found:
        raise ConfigError(
            f"no layout of {num_gpus} GPUs has the sizes that were given; leave "
            "--tensor-parallel-size or --pipeline-parallel-size out, or give another --gpus"
        )
    return found


def _is_split_for(candidate: Candidate) -> bool:
    layers = candidate.pipeline_layers
    return layers is None or len(layers) == candidate.pipeline_parallel_size


def make_wanted(
    config: RunConfig,
    shape: ModelShape,
    workload: Workload,
    rate: float | None,
    tried: Iterable[Candidate],
) -> Wanted:
    """The requests that some layout can hold, and the most that any can serve. Raises ConfigError:
    no SLO, no layout with room for the weights, no request that fits."""
    if rate is not None and rate == inf:
        raise ConfigError("--rate is inf; give the requests a second to serve, or leave it out")
    if config.slo_tbt is None:
        raise ConfigError("tune goes by --slo-tbt; give --slo-tbt SECONDS")
    setups = _setups(config, shape, tried)
    pool = max(each.limits.num_blocks * each.limits.block_size for each in setups)
    longest = min(pool, setups[0].limits.max_model_len)
    every = workload.token_lengths()
    fitting = [number for number, pair in enumerate(every) if sum(pair) <= longest]
    lengths = [every[number] for number in fitting]
    if not lengths:
        raise ConfigError(
            f"no request of {workload.name} fits: the shortest has {min(map(sum, every))} tokens, "
            f"there is room for {longest}; give a larger --scale or another workload"
        )
    if all(num_output == 1 for _, num_output in lengths):
        raise ConfigError(
            f"no request of {workload.name} has two output tokens, so there is no time between "
            "tokens to go by; give another workload"
        )
    highest = max(_ceiling(each, lengths, config.slo_tbt) for each in setups)
    if not highest:
        raise ConfigError(
            f"--slo-tbt is {config.slo_tbt:g} s, and on no layout is a turn of even the smallest "
            "microbatches as short; give a longer one"
        )
    return Wanted(
        workload=workload.name,
        lengths=lengths,
        priorities=[workload.request_priorities()[number] for number in fitting],
        num_left_out=len(every) - len(lengths),
        slo_tbt_s=config.slo_tbt,
        rate=rate,
        ceiling=highest,
        notes=workload.notes,
    )


def _setups(config: RunConfig, shape: ModelShape, tried: Iterable[Candidate]) -> list[SimulatedRun]:
    """One of each layout that has room for the weights. Raises ConfigError when none has."""
    found, reason = [], None
    sizes = {(each.tensor_parallel_size, each.pipeline_parallel_size): each for each in tried}
    for candidate in sizes.values():
        try:
            found.append(simulated_run(replace(config, **asdict(candidate)), shape))
        except ConfigError as error:
            reason = error
    if not found:
        raise reason
    return found


def _ceiling(setup: SimulatedRun, lengths: Lengths, slo_tbt_s: float) -> float:
    return ceiling(
        setup.times,
        lengths,
        num_stages=len(setup.plan.stages),
        slo_tbt_s=slo_tbt_s,
        kv_positions=setup.limits.num_blocks * setup.limits.block_size,
    ).rate


# ---- trying -------------------------------------------------------------------------------------


def search(
    config: RunConfig,
    shape: ModelShape,
    wanted: Wanted,
    tried: Sequence[Candidate],
    run: Run,
    progress: Progress,
) -> list[Tried]:
    """Ranked, the best first. Raises ConfigError when none can run."""

    def evaluate(
        effort: Effort, some: Sequence[Candidate]
    ) -> Iterator[tuple[Candidate, Found | None]]:
        bar = progress.add_task(effort.name, total=len(some))
        for pair in run(partial(measure, config, shape, wanted, effort), some):
            progress.advance(bar)
            yield pair

    *shorter, last = ROUNDS
    rounds = [*shorter, replace(last, finds_capacity=wanted.rate is None)]
    ranked = halve(tried, [partial(evaluate, each) for each in rounds], wanted.slo_tbt_s)
    if not ranked:
        raise ConfigError(
            "no candidate can run: none has room for the weights and the longest request; give "
            "more --gpus or a larger --scale"
        )
    return ranked


def measure(
    config: RunConfig, shape: ModelShape, wanted: Wanted, effort: Effort, candidate: Candidate
) -> Found | None:
    """What the candidate gives; None where it has no room for the weights or for a request, or its
    policy cannot work within its limits."""

    def trial(rate: float, num_requests: int = effort.num_requests) -> Trial:
        return run_trial(
            setup.make_pipeline,
            wanted.lengths,
            rate,
            num_requests,
            config.seed,
            effort.num_lifetimes,
            priorities=wanted.priorities,
        )

    try:
        setup = simulated_run(replace(config, **asdict(candidate)), shape)
        if not effort.finds_capacity:
            return _found(trial(wanted.rate or wanted.ceiling), wanted.slo_tbt_s)
        lone = trial(wanted.ceiling * _LONE_SHARE, _LONE_REQUESTS)
        capacity = find_capacity(trial, wanted.slo_tbt_s, wanted.ceiling, lone)
    except (ConfigError, CapacityError):
        return None
    best = capacity.best(wanted.slo_tbt_s) or lone
    return replace(_found(best, wanted.slo_tbt_s), capacity_rps=capacity.rate)


def _found(trial: Trial, slo_tbt_s: float) -> Found:
    return Found(
        rate=trial.rate,
        output_tokens_per_s=float(trial.output_tokens_per_s),
        ttft_p50_s=trial.ttft_p50_s,
        tbt_p99_s=trial.tbt_p99_s,
        is_within=trial.within(slo_tbt_s),
    )


def bars(console: Console) -> Progress:
    """A bar for each round; nothing where no one looks."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )


# ---- telling ------------------------------------------------------------------------------------


def make_report(
    config: RunConfig, num_gpus: int, wanted: Wanted, ranked: Sequence[Tried]
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


def recipe(config: RunConfig, num_gpus: int, wanted: Wanted, ranked: Sequence[Tried]) -> str:
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
    return write_recipe(best_config(config, ranked), _SEARCHED, textwrap.fill(comment, 96))


def print_ranked(wanted: Wanted, ranked: Sequence[Tried], console: Console) -> None:
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
