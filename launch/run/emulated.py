"""A recipe as a driver runs it on emulated stages: the simulator's setup, in real processes."""

from dataclasses import replace
from typing import TYPE_CHECKING

from pipeserve.configs import RunConfig
from pipeserve.driver.setup import Setup
from pipeserve.driver.shapes import find_shape
from pipeserve.errors import ConfigError
from pipeserve.launch.emulated.stage import MODULE, EmulatedWork
from pipeserve.launch.run.simulated import simulated_run
from pipeserve.wire.control import encode_job

if TYPE_CHECKING:
    from pipeserve.driver.driver import Driver


def emulated_setup(config: RunConfig) -> Setup:
    """Plan, limits and cost model are those of `pipeserve simulate` for the same flags.

    Raises ConfigError as `launch.run.simulated.simulated_run`.
    """
    simulated = simulated_run(config, find_shape(config.model, config.dtype))
    plan = simulated.plan
    work = EmulatedWork(
        profile=replace(simulated.profile, provenance={}),  # long, and no stage needs it
        shape=simulated.shape,
        plan=plan,
        tensor_parallel_size=config.tensor_parallel_size,
        seed=config.seed,
    )
    return Setup(
        kind="emulated",
        config=config,
        shape=simulated.shape,
        dtype=simulated.dtype,
        plan=plan,
        limits_for=lambda sizes: simulated.limits,  # its devices are those of the profile
        cost=simulated.make_cost(),
        module=MODULE,
        works=(encode_job(work),) * len(plan.stages),
    )


def emulated(driver: "Driver") -> str:
    """One line on what is emulated."""
    config, stages = driver.config, driver.stages
    layers = "+".join(str(stage.num_layers) for stage in stages)
    width = config.tensor_parallel_size
    return (
        f"{driver.shape.name} emulated on {config.device_profile}: "
        f"{len(stages)} stage{'s' * (len(stages) > 1)} of {layers} layers"
        f"{f', each of {width} devices' if width > 1 else ''}; no weights, nothing computed"
    )


def check_one_clock(driver: "Driver") -> None:
    """Raises ConfigError for stages on several machines: a hop begins when it was sent, by the
    sender's clock."""
    keepers = driver.fleet.keepers.values()
    if len({keeper.boot_id for keeper in keepers}) > 1:
        hosts = ", ".join(sorted({keeper.host for keeper in keepers}))
        driver.close()
        raise ConfigError(
            f"emulated stages were started on {hosts}: they wait by one clock; start all of them "
            "on one machine"
        )
