"""`pipeserve chat`: its flags."""

from dataclasses import replace
from typing import Annotated, Any

import typer

from pipeserve.launch.inputs.flags import (
    given_params,
    run_config_of,
    run_flags,
    sampling_flags,
    with_flags,
)
from pipeserve.launch.inputs.options import Recipe
from pipeserve.launch.run import starting


@with_flags(*sampling_flags(), *run_flags())
def chat(
    model: Annotated[
        str | None, typer.Argument(help="As of generate, or the address of a server.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Of a server.")] = None,
    config: Recipe = None,
    **flags: Any,
) -> int:
    """Talk to a model, or to a server (http://...), in the terminal."""
    from pipeserve.launch.verbs import chat as verb

    options = given_params(flags)
    if model is not None and model.startswith(("http://", "https://")):
        return verb.talk(verb.of_server(model, api_key, options), system)
    from pipeserve.frontend.llm import LLM
    from pipeserve.frontend.params import params_from

    with starting.open_driver(run_config_of(model, config, flags)) as driver:
        llm = LLM.on(driver)
        defaults = replace(llm.get_default_sampling_params(), max_tokens=None)
        return verb.talk(verb.of_pipeline(llm, params_from(options, defaults)), system)
