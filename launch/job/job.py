"""One process of a job that was launched, and what it is to do."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any

from pipeserve.configs import RunConfig, make_config
from pipeserve.driver.gathering import tell_failure
from pipeserve.errors import ConfigError, PipeserveError
from pipeserve.launch.job.addresses import address_of
from pipeserve.launch.job.keepers import RankKeepers
from pipeserve.launch.job.meeting import Meeting, find_meeting
from pipeserve.launch.job.options import JobOptions
from pipeserve.launch.job.place import Place, find_place
from pipeserve.launch.job.ranks import ranks_of
from pipeserve.wire.secret import VARIABLE

_LOOKS_FOR_S = 60.0
"""A keeper for its driver, at least: from a cold disk that takes a while until it listens."""
_ENDS_IN_S = 1.0
"""A keeper whose driver has told it to."""


class Job:
    """While it is entered, the keepers of this process's ranks are there."""

    def __init__(self, config: RunConfig, place: Place | None, keepers: RankKeepers | None) -> None:
        self.config = config
        """Of the run, as the driver is to have it."""
        self.place = place
        """None: no launcher has started this process, and the driver starts the keepers."""
        self._keepers = keepers

    @property
    def leads(self) -> bool:
        """Whether the driver is to run here."""
        return self.place is None or self.place.index == 0

    @property
    def keywords(self) -> dict[str, Any]:
        """For `LLM`, where this process leads."""
        return asdict(self.config)

    def wait(self, grace_s: float = 0.0) -> int:
        """Where another process leads: until that one has ended the run. Returns the exit code.

        A launcher that ends its job tells all its processes at once, and the leader ends the run in
        order, for which it has `grace_s`.
        """
        try:
            return self._keepers.wait()
        except (KeyboardInterrupt, SystemExit):
            self._keepers.wait(grace_s)
            raise


def place_of(config: RunConfig, options: JobOptions) -> Place | None:
    """By hand, or by the launcher. Raises ConfigError."""
    place = options.place_by_hand(config.nnodes)
    if place is not None or config.launcher != "auto":
        return place
    try:
        return find_place(os.environ)
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"the environment looks like a launcher's, and one of its variables does not: {error}; "
            "give --launcher spawn to do without it"
        ) from None


@contextmanager
def started(config: RunConfig, options: JobOptions) -> Iterator[Job]:
    """Raises ConfigError: ranks that do not come out even, no secret, no address."""
    place = place_of(config, options)
    if place is None:
        yield Job(config, None, None)
        return
    own = ranks_of(place, config.pipeline_parallel_size * config.tensor_parallel_size)
    meeting = find_meeting(place, config, options.interface)
    more = ["--join-timeout", str(max(config.join_timeout, _LOOKS_FOR_S))]
    if options.interface is not None:
        more += ["--host", address_of(options.interface)]
    _say_how_bound(place)
    with _known_secret(meeting):
        keepers = RankKeepers(own, meeting.control, meeting.secret, more, options.log_dir)
        job = Job(_config_in(place, meeting, config), place, keepers)
        try:
            yield job
        except Exception as error:
            if job.leads and not keepers.have_ended(_ENDS_IN_S):
                _tell_others(job, error)
            raise
        finally:
            keepers.end()


def _say_how_bound(place: Place) -> None:
    """mpirun binds each process to one core where nothing else was said, and stages with it."""
    own = os.sched_getaffinity(0)
    with suppress(OSError):
        of_launcher = os.sched_getaffinity(os.getppid())
        if place.launcher == "MPI" and place.local_index == 0 and own < of_launcher:
            print(
                f"note: {place.launcher} has bound this process, and so its stages, to {len(own)} "
                f"of {len(of_launcher)} CPUs; --bind-to none shares all of them out",
                file=sys.stderr,
            )


def _tell_others(job: Job, error: Exception) -> None:
    """The run has failed before it had a driver: the other machines would look for one for long."""
    why = str(error) if isinstance(error, PipeserveError) else type(error).__name__
    with suppress(PipeserveError):  # nobody can listen there, and that may be what was wrong
        tell_failure(job.config, why)


@contextmanager
def launched(model: str, *, interface: str | None = None, **keywords: Any) -> Iterator[Job]:
    """The ranks of a pipeline inside of a job of one's own, such as one that trains: every process
    enters it, with the same arguments, which are those of `LLM`.

        with pipeserve.launched("smollm2-135m", pipeline_parallel_size=4) as job:
            if job.leads:
                with pipeserve.LLM(**job.keywords) as llm:
                    ...
            else:
                job.wait()  # or goes on with something else

    Where no launcher has started the process, it leads, and `LLM` starts all.
    """
    config = make_config({}, {"model": model, **keywords})
    with started(config, JobOptions(interface=interface)) as job:
        yield job


def _config_in(place: Place, meeting: Meeting, config: RunConfig) -> RunConfig:
    return replace(
        config, launcher="external", control=meeting.control, nnodes=place.num_machines or 1
    )


@contextmanager
def _known_secret(meeting: Meeting) -> Iterator[None]:
    """To the driver, which may be another process."""
    before = os.environ.get(VARIABLE)
    if meeting.secret:
        os.environ[VARIABLE] = meeting.secret.decode("utf-8", "surrogateescape")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before
