"""`pipeserve calibrate`: its flags."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeserve.errors import ConfigError
from pipeserve.launch.inputs.flags import run_config_of, run_flags, with_flags
from pipeserve.launch.inputs.options import Model, OverwriteOutput, Recipe
from pipeserve.launch.run import starting


@with_flags(*run_flags())
def calibrate(
    model: Model = None,
    output: Annotated[Path, typer.Option(help="YAML file to write the profile to.")] = Path(
        "device-profile.yaml"
    ),
    overwrite: OverwriteOutput = False,
    config: Recipe = None,
    **flags: Any,
) -> int:
    """Measure this machine's stages, and write the cost profile that simulate takes."""
    from pipeserve.configs.device_profiles import save_profile
    from pipeserve.launch.inputs.jsonl import check_writable
    from pipeserve.launch.verbs import calibrate as verb
    from pipeserve.machine import device_name, total_memory_bytes
    from pipeserve.profiling.calibration.samples import Samples
    from pipeserve.profiling.recording.recording import Ring
    from pipeserve.stages.checkpoint.sources import resolve
    from pipeserve.stages.config.families import read_config

    run_config = run_config_of(model, config, flags)
    if output.exists() and not overwrite:
        raise ConfigError(f"{output} exists; give --overwrite, or another --output")
    check_writable(output)
    with starting.status("looking for the model") as say:
        num_layers = read_config(resolve(run_config.model, say)).num_layers
    samples = Samples(run_config.pipeline_parallel_size)
    measured, ring = verb.measured_run(run_config, num_layers), Ring()
    with starting.open_driver(measured, samples, ring.record) as driver:
        profile, fit = verb.calibrate(driver, ring, samples, device_name(), total_memory_bytes())
    save_profile(profile, output)
    print(
        f"{output}: {profile.name}, {profile.provenance['observations']} observations, error "
        f"{fit.median_error:.1%} in the median of those held out"
    )
    return 0
