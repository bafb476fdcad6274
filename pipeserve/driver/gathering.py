"""A fleet that gathers before it is known what it will run.

A model may have to be fetched and converted first, for minutes. Keepers join meanwhile: so those on
other machines know that their driver is there, and hear of it when it fails; and those that the
driver starts itself do so while it reads the model's configuration.
"""

import threading
import time
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
_LATECOMERS_S = 5.0
"""Keepers of other machines are started at the same time, more or less: when a driver fails at
once, they would find nobody, and could not tell that from a driver that comes later."""


@contextmanager
def gathering(config: RunConfig) -> Iterator[Callable[[Topology, RunConfig], Fleet]]:
    """What it gives makes the fleet of the driver (its `fleet`), which is to be opened after. Where
    an error ends it, the fleet has ended, and its keepers have heard why.

    Raises ConfigError as `Fleet` does.
    """
    fleet = _fleet(config)
    is_known = threading.Event()
    attending = threading.Thread(target=_attend, args=(fleet, is_known))

    def settle() -> None:
        is_known.set()
        if attending.is_alive():  # not where a signal came as it was started
            attending.join()

    try:
        attending.start()
        yield lambda topology, config: fleet
        settle()
    except PipeserveError as error:
        settle()
        _tell(fleet, str(error))
        raise
    except BaseException:
        settle()
        fleet.close()
        raise


def tell_failure(config: RunConfig, failure: str) -> None:
    """In place of a driver that is not to come: all keepers that look for it hear why. Raises
    ConfigError as `Fleet` does."""
    _tell(_fleet(config), failure)


def _fleet(config: RunConfig) -> Fleet:
    return Fleet(
        Topology.in_order(config.pipeline_parallel_size, config.tensor_parallel_size), config
    )


def _attend(fleet: Fleet, is_known: threading.Event) -> None:
    """Nobody else calls it meanwhile."""
    is_over = is_known.wait(_PATIENCE_S)
    while not is_over:
        lost = [each for each in fleet.receive(_LOOK_S) if isinstance(each.message, Lost)]
        fleet.keep(lost)  # whoever waits for keepers next is told
        is_over = is_known.is_set() or bool(lost)


def _tell(fleet: Fleet, failure: str) -> None:
    """All who have joined, or do so within a moment; where the driver started them, it is for the
    user alone."""
    until_s = time.monotonic() + (_LATECOMERS_S if fleet.config.launcher == "external" else 0.0)
    while len(fleet.keepers) < fleet.topology.num_ranks and time.monotonic() < until_s:
        fleet.receive(_LOOK_S)
    fleet.close(failure)
