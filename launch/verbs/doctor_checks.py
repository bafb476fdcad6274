"""What `pipeserve doctor` makes of what it found: what fails, what is worth a word, and whether
stages would work at the same time. Pure."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

from pipeserve.configs import RunConfig
from pipeserve.core.nouns import PipelinePlan
from pipeserve.wire.control import Examined, Facts

_OPEN_FILES = 1024
"""Of a server's process: a stream each, strangers, keepers, stages and what libraries open."""
_OFF_BELOW = 1.2
"""Times as fast as one stage alone: with less, the others hardly count."""
_ROBBED = 0.9
"""Share of its core that a stage should get."""


class Seat(NamedTuple):
    """Where a rank is."""

    name: str
    """Of its stage."""
    host: str
    facts: Facts
    cpu_share: float


def seats_of(
    examined: Sequence[Examined], names: Sequence[str], hosts: Sequence[str]
) -> list[Seat]:
    """Of all ranks, in order."""
    return [
        Seat(name, host, found.facts, found.cpu_share)
        for found, name, host in zip(examined, names, hosts, strict=True)
    ]


def failures(seats: Sequence[Seat], own_open_files: int) -> Iterator[str]:
    """One line each: what, limit, remedy."""
    for what in ("python", "torch", "pipeserve"):
        differing = _by_value(seats, attrgetter(what))
        if len(differing) > 1:
            yield (
                f"{what} is not the same everywhere: {_where(differing)}; install one version on "
                "all, or what a stage computes changes with the machine that it is started on"
            )
    for who, number in [
        ("this process", own_open_files),
        *[(f"{seat.name} on {seat.host}", seat.facts.open_files) for seat in seats],
    ]:
        if number < _OPEN_FILES:
            yield (
                f"{who} may have {number} files open, {_OPEN_FILES} are needed; raise it with "
                f"ulimit -n {_OPEN_FILES * 64} before the start"
            )


def notes(seats: Sequence[Seat], config: RunConfig, plan: PipelinePlan) -> Iterator[str]:
    """What is no failure, and not as it could be."""
    kernels = _by_value(seats, attrgetter("kernels"))
    if len(kernels) > 1:
        yield (
            f"layers are computed by {_where(kernels)}: where a stage moves to another machine, "
            "last bits may differ"
        )
    for seat in seats:
        if seat.cpu_share < _ROBBED:
            yield (
                f"{seat.name} on {seat.host} got {seat.cpu_share:.0%} of its core: something else "
                "runs there, or several stages do; end it, or let --pipeline-layers auto count it"
            )
    for host, ranks in _by_host(seats).items():
        limit = min(seat.facts.cpu_limit for seat in ranks)
        if limit < len(ranks):
            yield (
                f"a quota lets {limit:g} CPUs run on {host}, where {_counted(ranks, config)} are; "
                "raise it (docker --cpus, systemd CPUQuota) or use fewer stages"
            )
    for stage in plan.stages:
        hosts = dict.fromkeys(seats[rank].host for rank in stage.ranks)
        if len(hosts) > 1:
            yield (
                f"the ranks of stage {stage.stage} are on {', '.join(hosts)}: every layer adds up "
                "what they computed, over the network; give each machine whole stages"
            )
    if config.max_num_seqs < 2 * config.pipeline_parallel_size > 2:
        yield (
            f"--max-num-seqs {config.max_num_seqs} gives each of "
            f"{config.pipeline_parallel_size} microbatches few decodes; raise it"
        )


def why_off(
    config: RunConfig,
    plan: PipelinePlan,
    seats: Sequence[Seat],
    work_s: Mapping[str, Sequence[float]],
) -> Iterator[str]:
    """Why stages would not work at the same time, or that would give next to nothing. `work_s`:
    what each stage takes for kinds of microbatches."""
    num_stages = len(plan.stages)
    if num_stages == 1:
        yield "there is one stage; give -pp 2 or more"
        return
    if config.max_num_seqs < num_stages:
        yield (
            f"--max-num-seqs {config.max_num_seqs} is fewer requests than the {num_stages} stages; "
            f"give at least {num_stages}"
        )
    if plan.window < 2:
        yield f"--pipeline-window 1 is one microbatch at a time; give {num_stages} or leave it out"
    for host, ranks in _by_host(seats).items():
        cores = {cpu for seat in ranks for cpu in seat.facts.cpus}
        limit = min(len(cores), *(seat.facts.cpu_limit for seat in ranks))
        if config.device != "cuda" and len(ranks) > 1 and limit <= 1:
            yield (
                f"the {_counted(ranks, config)} on {host} share one core, and take turns; give it "
                "more, or use fewer stages"
            )
    for what, seconds in work_s.items():
        gain = sum(seconds) / max(max(seconds), 1e-12)
        if gain < _OFF_BELOW:
            slowest = max(range(num_stages), key=seconds.__getitem__)
            share = max(seconds) / sum(seconds)
            yield (
                f"stage {slowest} takes {share:.0%} of the time of {what}, so the others mostly "
                "wait; give it fewer layers (--pipeline-layers auto)"
            )


def _counted(ranks: Sequence[Seat], config: RunConfig) -> str:
    return f"{len(ranks)} {'ranks' if config.tensor_parallel_size > 1 else 'stages'}"


def _by_value(seats: Sequence[Seat], value: Callable[[Facts], str]) -> dict[str, list[Seat]]:
    found: dict[str, list[Seat]] = {}
    for seat in seats:
        if value(seat.facts):
            found.setdefault(value(seat.facts), []).append(seat)
    return found


def _by_host(seats: Sequence[Seat]) -> dict[str, list[Seat]]:
    found: dict[str, list[Seat]] = {}
    for seat in seats:
        found.setdefault(seat.host, []).append(seat)
    return found


def _where(differing: Mapping[str, Sequence[Seat]]) -> str:
    """ "2.10 on a, 2.9 on b" """
    return ", ".join(
        f"{value} on {', '.join(Counter(seat.host for seat in there))}"
        for value, there in differing.items()
    )
