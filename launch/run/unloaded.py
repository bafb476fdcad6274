"""A run whose stages load nothing, for `pipeserve doctor`: keepers, stages, ports and links are
those of the run that is asked about.
"""

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from pipeserve.core.view import Limits
from pipeserve.driver.setup import Setup
from pipeserve.errors import ConfigError
from pipeserve.stage.checkup import MODULE
from pipeserve.wire.control import StageSized


def without_weights(setup: Setup, lacks: list[str]) -> Setup:
    """Stages load nothing; that they would not fit is noted in `lacks`, and no error."""

    def limits_for(sizes: Sequence[StageSized]) -> Limits:
        try:
            return setup.limits_for(sizes)
        except ConfigError as error:
            lacks[:] = [str(error)]  # the last one asked about is the one that is run
            unlimited = [msgspec.structs.replace(size, memory=()) for size in sizes]
            limits = setup.limits_for(unlimited)
            usable = limits.max_num_seqs * -(-limits.max_model_len // limits.block_size)
            return replace(limits, num_blocks=min(limits.num_blocks, usable))

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
