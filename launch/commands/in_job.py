"""A verb in a launched job: the first process runs it, and the others keep their ranks for it."""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

from pipeserve.launch.inputs.flags import given, run_config_of
from pipeserve.launch.job.job import Job, started
from pipeserve.launch.job.options import JobOptions
from pipeserve.launch.run.starting import exit_on_signals
from pipeserve.server.options import ServerOptions

_GRACE_S = 5.0


def in_job(verb: Callable[..., int]) -> Callable[..., int]:
    """The same verb, where the process was started alone."""

    @functools.wraps(verb)
    def run(**arguments: Any) -> int:
        if arguments.get("url") is not None:  # it runs no pipeline
            return verb(**arguments)
        run_config = run_config_of(arguments["model"], arguments["config"], arguments)
        exit_on_signals()  # before the first keeper is there, or it would be nobody's
        with started(run_config, JobOptions(**given(JobOptions, arguments))) as job:
            if not job.leads:
                return job.wait(_grace_s(arguments))
            if job.place is not None:
                _say_where(job)
                arguments |= {name: getattr(job.config, name) for name in _DECIDED}
            return verb(**arguments)

    return run


_DECIDED = ("launcher", "control", "nnodes")
"""By the job, and not by the user."""


def _grace_s(arguments: Mapping[str, Any]) -> float:
    """For the leader to end what runs there: a server lets its requests finish."""
    if "shutdown_timeout" not in arguments:
        return _GRACE_S
    return _GRACE_S + ServerOptions(**given(ServerOptions, arguments)).shutdown_timeout


def _say_where(job: Job) -> None:
    place, config = job.place, job.config
    job_id = f" {place.job_id}" if place.job_id else ""
    machines = f" on {config.nnodes} machines" if config.nnodes > 1 else ""
    print(
        f"{place.launcher}{job_id}: {place.size} processes{machines}; keepers join "
        f"{config.control}",
        file=sys.stderr,
    )
