"""One line on what was loaded, and from where."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from pipeserve.stages.checkpoint.sources import origin

if TYPE_CHECKING:
    from pipeserve.driver.driver import Driver


def loaded(driver: "Driver") -> str:
    """Of a driver that has started: model, source, architecture, parameters of its matrices, dtype,
    what each stage holds of it, and how many threads compute it on which cores: where several ranks
    share it, those of the first."""
    model, stages = driver.config.model, driver.stages
    layers = "+".join(str(stage.num_layers) for stage in stages)
    gigabytes = "+".join(f"{stage.weight_bytes / 1e9:.2f}" for stage in stages)
    threads = "+".join(str(stage.num_threads) for stage in stages)
    cpus = "+".join(listed(stage.cpus) for stage in stages)
    return (
        f"{model} ({origin(model, driver.model_folder)}): {driver.model_config.architecture}, "
        f"{_count(driver.shape.num_parameters)} parameters in {driver.dtype}"
        f"{f' ({why})' if (why := driver.setup.dtype_why) else ''}; "
        f"{len(stages)} stage{'s' * (len(stages) > 1)} of {layers} layers"
        f"{f' on {width} ranks each' if (width := driver.topology.width) > 1 else ''}, "
        f"{gigabytes} GB, "
        f"{threads} thread{'s' * (threads != '1')} on CPU {cpus}"
    )


def listed(cpus: Sequence[int]) -> str:
    """As the kernel writes it: 0-3,8. `cpus` rise."""
    places = enumerate(cpus)
    runs = [list(run) for _, run in groupby(places, lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else f"{run[0][1]}" for run in runs)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"
