"""`pipeserve doctor`: what would run where, what lies between it, and what is wrong with that,
before a weight is read. docs/doctor.md says how to read it.
"""

import resource
from collections.abc import Iterable, Iterator

from rich.console import Console

from pipeserve.configs import RunConfig
from pipeserve.driver.driver import Driver
from pipeserve.errors import ConfigError
from pipeserve.launch.run.starting import open_unloaded
from pipeserve.launch.show.checkup import (
    clock_lines,
    name_of,
    ranks_table,
    seams_table,
    software_lines,
    times_table,
)
from pipeserve.launch.verbs.checkup import Checkup, check_up
from pipeserve.launch.verbs.doctor_checks import Seat, failures, notes, seats_of, why_off
from pipeserve.profiling.recording.recording import Ring
from pipeserve.server.listening import bound_sockets
from pipeserve.server.options import ServerOptions


def doctor(config: RunConfig, options: ServerOptions) -> int:
    """Prints what it finds. Returns the exit code: 1 where something fails. Raises ConfigError for
    a run that cannot be asked for, and StageError for one that cannot be formed."""
    if config.device == "emulated":
        raise ConfigError(
            "device is emulated: there is nothing to look at; use pipeserve simulate, or leave "
            "--device out"
        )
    lacks: list[str] = []
    ring, console = Ring(), Console()
    with open_unloaded(config, lacks, ring.record) as driver:
        found = check_up(driver, ring, lacks)
        _print_found(console, driver, found)
        return _print_verdict(console, driver, found, options)


def _seats(driver: Driver, found: Checkup) -> list[Seat]:
    ranks = range(driver.topology.num_ranks)
    names = [driver.topology.name(rank) for rank in ranks]
    return seats_of(found.examined, names, [driver.fleet.keepers[rank].host for rank in ranks])


def _print_found(console: Console, driver: Driver, found: Checkup) -> None:
    usual, forecast = found.works[-1], found.forecast
    console.print(ranks_table(driver, found.examined))
    _print_lines(console, software_lines(found.examined))
    if found.seams:
        console.print(
            seams_table(driver, found.seams, found.clocks, found.feedback_s, usual.num_tokens)
        )
    _print_lines(console, clock_lines(found.clocks))
    console.print(times_table(found.works, found.work_s, found.shared_s, forecast.busy))
    idle = 1 - sum(forecast.busy) / len(forecast.busy)
    line = (
        f"predicted: {forecast.output_tokens_per_s:,.0f} output tokens/s, stages idle {idle:.0%} "
        f"of the time; {forecast.load}, simulated on what was measured"
    )
    _print_lines(console, [line])


def _print_lines(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_verdict(console: Console, driver: Driver, found: Checkup, options: ServerOptions) -> int:
    config, plan, seats = driver.config, driver.plan, _seats(driver, found)
    named = {
        name_of(work): seconds for work, seconds in zip(found.works, found.work_s, strict=True)
    }
    off = list(why_off(config, plan, seats, named))
    failed = [*found.lacks, *failures(seats, _open_files()), *_ports(options)]
    lines = [f"note: {line}" for line in notes(seats, config, plan)]
    lines += [f"pipelining is off because {line}" for line in off]
    if not off:
        lines.append(
            f"pipelining is on: {len(plan.stages)} stages, {plan.window} microbatches in flight"
        )
    lines += [f"fails: {line}" for line in failed]
    lines += [] if failed else ["all checks pass"]
    _print_lines(console, lines)
    return 1 if failed else 0


def _open_files() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _ports(options: ServerOptions) -> Iterator[str]:
    """Where `pipeserve serve` would listen."""
    try:
        for each in bound_sockets(options):
            each.close()
    except ConfigError as error:
        yield str(error)
