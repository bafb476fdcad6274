"""What `tune` tries: the candidates, how long each round's trials are, and what they gave.

`profiling/search/tuning.py` says how candidates are made and dropped.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from math import inf
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pipeserve.configs import RunConfig
from pipeserve.configs.device_profiles import load_profile
from pipeserve.core.cost.shape import ModelShape
from pipeserve.errors import CapacityError, ConfigError
from pipeserve.launch.inputs.workload import Workload
from pipeserve.launch.run.processes import ParallelMap
from pipeserve.launch.run.simulated import SimulatedRun, simulated_run
from pipeserve.profiling.search.capacity import (
    Lengths,
    Trial,
    check_has_gaps,
    find_capacity,
    run_trial,
)
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
SEARCHED = tuple(item.name for item in fields(Candidate))
"""Fields of the run."""


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
class TuningGoal:
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
        found.insert(0, Candidate(*(getattr(config, name) for name in SEARCHED)))
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
) -> TuningGoal:
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
    check_has_gaps(workload.name, lengths)
    highest = max(_ceiling(each, lengths, config.slo_tbt) for each in setups)
    if not highest:
        raise ConfigError(
            f"--slo-tbt is {config.slo_tbt:g} s, and on no layout is a turn of even the smallest "
            "microbatches as short; give a longer one"
        )
    return TuningGoal(
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
    wanted: TuningGoal,
    tried: Sequence[Candidate],
    run: ParallelMap,
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
    config: RunConfig, shape: ModelShape, wanted: TuningGoal, effort: Effort, candidate: Candidate
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
