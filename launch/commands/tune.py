"""`pipeserve tune`: its flags."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeserve.configs import RunConfig
from pipeserve.errors import ConfigError
from pipeserve.launch.inputs.flags import given, run_config_of, run_flags, with_flags
from pipeserve.launch.inputs.options import (
    JsonTo,
    LengthsWorkload,
    Model,
    NumLengths,
    OverwriteOutput,
    Recipe,
    Scale,
)


@with_flags(*run_flags())
def tune(
    model: Model = None,
    workload: LengthsWorkload = "sharegpt",
    num_prompts: NumLengths = None,
    scale: Scale = 1.0,
    rate: Annotated[
        float | None, typer.Option(help="Requests a second to serve; by default as many as can be.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs to use; by default as many as the run has.", min=1)
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="YAML file to write the best recipe to; else it is printed.")
    ] = None,
    overwrite: OverwriteOutput = False,
    num_processes: Annotated[
        int | None,
        typer.Option("--processes", help="To search with; by default one a CPU.", min=1),
    ] = None,
    json_file: JsonTo = None,
    config: Recipe = None,
    **flags: Any,
) -> int:
    """Search the layout, layer split, window and policy that serve a workload best within
    --slo-tbt, on virtual time. What is given as a flag is not searched."""
    from pipeserve.driver.shapes import find_shape
    from pipeserve.launch.inputs.jsonl import check_writable, write_json
    from pipeserve.launch.inputs.workload import read_workload
    from pipeserve.launch.verbs import tune as verb

    run_config = run_config_of(model, config, flags)
    work = read_workload(
        workload, num_prompts, scale, rate, run_config.seed, default_num=1000, timed=False
    )
    if output is not None and output.exists() and not overwrite:
        raise ConfigError(f"{output} exists; give --overwrite, or another --output")
    for path in filter(None, (output, json_file)):
        check_writable(path)
    shape = find_shape(run_config.model, run_config.dtype)
    fixed = given(RunConfig, flags)
    report = verb.tune(run_config, shape, work, rate, gpus, fixed, num_processes, output)
    write_json(json_file, report)
    return 0
