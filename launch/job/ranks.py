"""Which ranks are whose: a job's processes start equally many keepers each, in order."""

from pipeserve.driver.spawned_keepers import OwnRanks
from pipeserve.errors import ConfigError
from pipeserve.launch.job.place import Place


def ranks_of(place: Place, num_ranks: int) -> OwnRanks:
    """Those that the process at `place` starts. Raises ConfigError where they do not come out
    even."""
    if num_ranks % place.size:
        raise ConfigError(
            f"{place.launcher} has {place.size} processes, and the pipeline has {num_ranks} ranks; "
            f"start as many, or a divisor of it (-pp {num_ranks}), or make "
            f"--pipeline-parallel-size times --tensor-parallel-size a multiple of {place.size}"
        )
    each = num_ranks // place.size
    first = place.index * each
    return OwnRanks(
        range(first, first + each), num_ranks, place.local_index * each, place.local_size * each
    )
