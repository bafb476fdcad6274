"""A recipe as a driver runs it on emulated stages: the simulator's setup, in real processes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeserve.configs import RunConfig
from pipeserve.configs.layer_lists import AUTO
from pipeserve.core.cost.cut import StageParts
from pipeserve.core.cost.memory import weight_bytes
from pipeserve.driver.layer_choice import parts_of_times
from pipeserve.driver.layout import usual_of
from pipeserve.driver.setup import LayerChoice, Setup
from pipeserve.driver.shapes import find_shape
from pipeserve.errors import ConfigError
from pipeserve.launch.emulated.stage import MODULE, EmulatedWork
from pipeserve.launch.run.simulated import SimulatedRun, simulated_run
from pipeserve.machine import MemoryLimit
from pipeserve.wire.control import Examined, StageSized
from pipeserve.wire.stage_job import encode_job

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
        slowdown=config.stage_slowdown,
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
        layers_by=simulated.layers_by,
        choice=_choice(config, simulated) if config.pipeline_layers == AUTO else None,
    )


def _choice(config: RunConfig, simulated: SimulatedRun) -> LayerChoice:
    """By what the stages say that they take; each has a device, and memory, of its own."""

    def of_times(examined: Sequence[Examined]) -> tuple[str, tuple[StageParts, ...]]:
        return "by times measured now", parts_of_times([each.parts[0] for each in examined])

    return LayerChoice(
        by=simulated.layers_by,
        parts=(),
        max_model_len=simulated.limits.max_model_len,
        with_layers=lambda counts: emulated_setup(replace(config, pipeline_layers=counts)),
        works=(usual_of(config, simulated.limits.max_model_len),),
        of_times=of_times,
        sizes=_sizes(config, simulated),
    )


def _sizes(config: RunConfig, simulated: SimulatedRun) -> tuple[StageSized, ...]:
    """What a device of each stage has, and would hold."""
    profile, shard = simulated.profile, simulated.shape.shard(config.tensor_parallel_size)
    usable = int(profile.memory_bytes * config.gpu_memory_utilization)
    layer_bytes = (shard.num_layer_parameters * shard.bytes_per_value,) * shard.num_layers
    table = shard.num_head_parameters * shard.bytes_per_value
    block_bytes = config.block_size * shard.kv_bytes_per_token_per_layer
    return tuple(
        StageSized(
            weight_bytes=weight_bytes(shard, stage),
            block_bytes=stage.num_layers * block_bytes,
            memory=(MemoryLimit(f"stage {stage.stage}", profile.name, usable, usable),),
            layer_bytes=layer_bytes,
            end_bytes=(table, table),
        )
        for stage in simulated.plan.stages
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
