"""A run whose stages load nothing, for `pipeserve doctor`: keepers, stages, ports and links are
those of the run that is asked about.
"""

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from pipeserve.configs import RunConfig
from pipeserve.core.view import Limits
from pipeserve.driver.setup import Setup
from pipeserve.errors import ConfigError
from pipeserve.stage.checkup import MODULE
from pipeserve.wire.control import StageSized

_HEARTBEAT_S = 0.5


def without_weights(setup: Setup, lacks: list[str]) -> Setup:
    """Stages load nothing; that they would not fit is noted in `lacks`, and no error."""

    def limits_for(sizes: Sequence[StageSized]) -> Limits:
        try:
            return setup.limits_for(sizes)
        except ConfigError as error:
            lacks.append(str(error))
            return setup.limits_for([msgspec.structs.replace(size, memory=()) for size in sizes])

    choice, for_ranks = setup.choice, setup.for_ranks
    if choice is not None:
        with_layers = choice.with_layers
        choice = replace(
            choice, with_layers=lambda counts: without_weights(with_layers(counts), lacks)
        )
    return replace(
        setup,
        module=MODULE,
        limits_for=limits_for,
        choice=choice,
        for_ranks=for_ranks and (lambda keepers: without_weights(for_ranks(keepers), lacks)),
    )


def asking_often(config: RunConfig) -> RunConfig:
    """The run with the clocks of other machines asked for several times while it is looked at."""
    if config.launcher != "external":
        return config
    return replace(config, heartbeat_interval=min(config.heartbeat_interval, _HEARTBEAT_S))
