"""`pipeserve generate`: its flags."""

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeserve.errors import ConfigError
from pipeserve.launch.commands.in_job import in_job
from pipeserve.launch.inputs.flags import (
    check_terminal,
    given_params,
    job_flags,
    run_config_of,
    run_flags,
    sampling_flags,
    with_flags,
)
from pipeserve.launch.inputs.options import Explain, Live, Model, Recipe, RecordTo
from pipeserve.launch.run import starting


@with_flags(*sampling_flags(), *run_flags(), *job_flags())
@in_job
def generate(
    model: Model = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt.", show_default=False)] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSONL of prompts, token ids or messages.", show_default=False),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat template.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="JSONL to write results to.", show_default=False)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace output and recording where they exist.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what the output file holds; run the rest.")
    ] = False,
    print_text: Annotated[
        bool, typer.Option("--print", help="Print prompts and texts instead of JSON.")
    ] = False,
    record: RecordTo = None,
    live: Live = False,
    explain: Explain = False,
    config: Recipe = None,
    **flags: Any,
) -> int:
    """Complete one prompt, or every line of a JSONL file, and write results as they end.

    A line is {"prompt": TEXT}, {"prompt_token_ids": [...]} or {"messages": [...]}, with sampling
    parameters and a priority of its own if wanted. Its result repeats it and has text, token_ids,
    finish_reason, logprobs and prompt_logprobs where asked for, and all samples as outputs where n
    is over 1.
    """
    from pipeserve.launch.inputs import prompts as given_prompts
    from pipeserve.launch.verbs import generate as verb

    run_config = run_config_of(model, config, flags)
    options = given_params(flags)
    given_prompts.check_options(options)
    wants_logprobs = bool({"logprobs", "prompt_logprobs"} & options.keys())
    if (prompt is None) == (prompts is None):
        raise ConfigError("give one of --prompt TEXT and --prompts FILE.jsonl")
    if output is not None and print_text:
        raise ConfigError("--output and --print each take the results; give one")
    if live and output is None and sys.stdout.isatty():
        raise ConfigError("--live takes the terminal, and so do the results; give --output FILE")
    check_terminal(live, explain)
    if print_text and wants_logprobs:
        raise ConfigError("--print shows no logprobs; leave it out to have them in JSON")
    if resume and (prompts is None or output is None):
        raise ConfigError("--resume goes on with an --output file of --prompts; give both")
    if resume and overwrite:
        raise ConfigError("--resume keeps the output file, --overwrite replaces it; give one")
    if prompts is None:
        lines = [given_prompts.one_prompt(prompt, options, chat)]
    else:
        lines = given_prompts.read_prompts(prompts, options, chat)
        given_prompts.check_order(lines, run_config.serving_order)
    start = partial(
        starting.recorded_driver,
        run_config,
        record,
        overwrite=overwrite,
        explained=explain,
        check=partial(given_prompts.check_lines, lines),
    )
    if output is not None:
        if prompts is not None and output.exists() and output.samefile(prompts):
            raise ConfigError(f"{output} holds the prompts; give another --output")
        job = given_prompts.job_of(run_config, lines)
        return verb.write_to(output, job, lines, overwrite, resume, start, live)
    if prompts is not None or wants_logprobs:
        write = verb.print_text if print_text else verb.print_json
        return verb.run(start, lines, write, live)
    with start() as (driver, records), records.shown() if live else nullcontext():
        from pipeserve.frontend.llm import LLM

        records.start_writing()
        return verb.stream_text(LLM.on(driver), lines[0])
