"""`pipeserve serve`: its flags."""

from typing import Any

from pipeserve.launch.commands.in_job import in_job
from pipeserve.launch.inputs.flags import (
    given,
    job_flags,
    run_config_of,
    run_flags,
    server_flags,
    with_flags,
)
from pipeserve.launch.inputs.options import Model, Recipe
from pipeserve.server.options import ServerOptions


@with_flags(*server_flags(), *run_flags(), *job_flags())
@in_job
def serve(model: Model = None, config: Recipe = None, **flags: Any) -> int:
    """Serve a model over HTTP, by OpenAI's API, until a signal ends it."""
    from pipeserve.launch.verbs import serve as verb

    options = ServerOptions(**given(ServerOptions, flags))
    return verb.serve(run_config_of(model, config, flags), options)
