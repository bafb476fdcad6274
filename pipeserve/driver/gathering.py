"""A fleet that gathers before it is known what it will run.

A model may have to be fetched and converted first, for minutes. Keepers join meanwhile: so those on
other machines know that their driver is there, and hear of it when it fails; and those that the
driver starts itself do so while it reads the model's configuration.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeserve.configs import RunConfig
from pipeserve.core.topology import Topology
from pipeserve.driver.events import Lost
from pipeserve.driver.fleet import Fleet
from pipeserve.errors import PipeserveError

_PATIENCE_S = 0.5
"""That keepers can wait for an answer. Most runs are known by then."""
_LOOK_S = 0.05


@contextmanager
def gathering(config: RunConfig) -> Iterator[Callable[[Topology, RunConfig], Fleet]]:
    """What it gives makes the fleet of the driver (its `fleet`), which is to be opened after. Where
    an error ends it, the fleet has ended, and its keepers have heard why.

    Raises ConfigError as `Fleet` does.
    """
    fleet = Fleet(
        Topology.in_order(config.pipeline_parallel_size, config.tensor_parallel_size), config
    )
    is_known = threading.Event()
    attending = threading.Thread(target=_attend, args=(fleet, is_known))
    attending.start()

    def settle() -> None:
        is_known.set()
        attending.join()

    try:
        yield lambda topology, config: fleet
        settle()
    except BaseException as error:
        settle()
        fleet.close(str(error) if isinstance(error, PipeserveError) else "")
        raise


def _attend(fleet: Fleet, is_known: threading.Event) -> None:
    """Nobody else calls it meanwhile."""
    is_over = is_known.wait(_PATIENCE_S)
    while not is_over:
        lost = [each for each in fleet.receive(_LOOK_S) if isinstance(each.message, Lost)]
        fleet.keep(lost)  # whoever waits for keepers next is told
        is_over = is_known.is_set() or bool(lost)
