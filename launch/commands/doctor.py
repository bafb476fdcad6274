"""`pipeserve doctor`: its flags."""

from typing import Annotated, Any

import typer

from pipeserve.launch.commands.in_job import in_job
from pipeserve.launch.inputs.flags import job_flags, run_config_of, run_flags, with_flags
from pipeserve.launch.inputs.options import Model, Recipe
from pipeserve.server.options import ServerOptions


@with_flags(*run_flags(), *job_flags())
@in_job
def doctor(
    model: Model = None,
    config: Recipe = None,
    host: Annotated[str, typer.Option(help="Where serve is to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where serve is to listen.")] = 8000,
    **flags: Any,
) -> int:
    """Form a run without its weights; say what runs where, how fast, and what is wrong."""
    from pipeserve.launch.verbs import doctor as verb

    options = ServerOptions(host=host, port=port)
    return verb.doctor(run_config_of(model, config, flags), options)
