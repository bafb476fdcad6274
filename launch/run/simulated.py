"""A recipe as it is simulated: the model cut into stages on devices known by their profile. What
emulated stages run, too, in real processes (`emulated.py`).
"""

from dataclasses import dataclass
from typing import Any

from pipeserve.configs import RunConfig
from pipeserve.configs.device_profiles import load_profile
from pipeserve.configs.layer_lists import AUTO
from pipeserve.configs.model_shapes import load_shape
from pipeserve.core.cost.cut import StageParts
from pipeserve.core.cost.device import DeviceProfile, check_profile
from pipeserve.core.cost.memory import kv_blocks_beside_weights
from pipeserve.core.cost.partition import parts_by_profile, split_layers
from pipeserve.core.cost.pipeline_cost import PipelineCost
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.engine import Engine, Limits
from pipeserve.core.nouns import PipelinePlan
from pipeserve.core.policies import get_policy
from pipeserve.core.records import Recorder, ignore
from pipeserve.driver.kv_budget import blocks_within
from pipeserve.driver.layer_choice import parts_of_times
from pipeserve.driver.layout import lay_out, usual_of
from pipeserve.errors import ConfigError
from pipeserve.launch.run.record import run_meta
from pipeserve.profiling.simulation.simulator import SimulatedPipeline
from pipeserve.profiling.simulation.stage_times import ProfiledTimes
from pipeserve.stages.config.model_config import DTYPE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRun:
    """What is simulated: a model on devices, cut into stages, under a policy."""

    config: RunConfig
    shape: ModelShape
    profile: DeviceProfile
    plan: PipelinePlan
    limits: Limits
    times: ProfiledTimes

    def make_engine(self) -> Engine:
        """An engine without requests. What its policy may predict with is made from the profile,
        the stages' own times differ."""
        policy = get_policy(self.config.policy)
        return Engine(self.plan, policy, self.limits, self.make_cost())

    def make_cost(self) -> PipelineCost | None:
        """What the policy predicts with; None for one that does not."""
        if not get_policy(self.config.policy).traits.reads_cost:
            return None
        size = self.config.tensor_parallel_size
        return PipelineCost(self.profile, self.shape, self.plan, size)

    @property
    def layers_by(self) -> str:
        """How the layers were placed, in words."""
        how = {None: "by the device profile", AUTO: "by the time that each stage takes"}
        return how.get(self.config.pipeline_layers, "as listed")

    @property
    def dtype(self) -> str:
        """Of the weights."""
        tables = self.profile.tables
        return self.config.dtype if tables is None else tables.dtype

    def make_pipeline(self, record: Recorder = ignore) -> SimulatedPipeline:
        return SimulatedPipeline(self.make_engine(), self.times, record)

    def meta(self) -> dict[str, Any]:
        """What a recording says of the run."""
        return run_meta("simulated", self.config, self.shape, self.plan, self.limits, self.dtype)


def simulated_run(config: RunConfig, shape: ModelShape | None = None) -> SimulatedRun:
    """`shape` is the model's; by default that of the catalogue.

    Raises ConfigError: no such model or profile, a profile of another model, a model that does not
    fit the devices, limits that the policy cannot work within.
    """
    if config.device_profile is None:
        raise ConfigError(
            "no device profile: give --device-profile NAME or FILE, or a recipe that names one"
        )
    shape = shape or load_shape(config.model)
    profile = load_profile(config.device_profile)
    size = config.tensor_parallel_size
    shape.check_divides(size)
    check_made_for(profile, shape, config)
    check_profile(profile, tensor_parallel_size=size)
    max_model_len = config.max_model_len or shape.max_position_embeddings
    plan, limits_with = lay_out(
        config,
        shape,
        max_model_len=max_model_len,
        enable_prefix_caching=False,  # lengths have no content that could be shared
        parts=_stage_parts(config, shape, profile, max_model_len),
        ranks_per_stage=size,
        shares_head=_shares_head(config),
    )
    limits = limits_with(_num_blocks(config, shape, profile, plan))
    times = ProfiledTimes(profile, shape, plan, size, config.seed, config.stage_slowdown)
    return SimulatedRun(
        config=config, shape=shape, profile=profile, plan=plan, limits=limits, times=times
    )


def _stage_parts(
    config: RunConfig, shape: ModelShape, profile: DeviceProfile, max_model_len: int
) -> tuple[StageParts, ...]:
    """By the profile; with --pipeline-layers auto, as each stage would be found to take."""
    num_stages, size = config.pipeline_parallel_size, config.tensor_parallel_size
    work = usual_of(config, max_model_len)
    if config.pipeline_layers != AUTO:
        return parts_by_profile(profile, shape, num_stages, work, size, _shares_head(config))
    even = split_layers(shape.num_layers, num_stages)
    times = ProfiledTimes(profile, shape, even, size, config.seed, config.stage_slowdown)
    found = [times.parts(work, stage) for stage in range(num_stages)]
    whole = [each._replace(layers=each.layers * shape.num_layers) for each in found]
    return parts_of_times(whole, _shares_head(config))


def _shares_head(config: RunConfig) -> bool:
    """Only where it is asked for: what the devices are is not known."""
    return config.head_stages == "both" and config.pipeline_parallel_size > 1


def check_made_for(profile: DeviceProfile, shape: ModelShape, config: RunConfig) -> None:
    """Raises ConfigError for a profile of another model or type of weights."""
    dtype = None if config.dtype == "auto" else config.dtype
    check_profile(profile, model=shape.name, dtype=dtype)
    tables = profile.tables
    if tables is not None and DTYPE_BYTES[tables.dtype] != shape.bytes_per_value:
        raise ConfigError(
            f"the device profile is for dtype {tables.dtype}; give --dtype {tables.dtype}"
        )


def _num_blocks(
    config: RunConfig, shape: ModelShape, profile: DeviceProfile, plan: PipelinePlan
) -> int:
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    if config.kv_cache_memory_bytes is not None:
        shard = shape.shard(config.tensor_parallel_size)
        layer_block_bytes = config.block_size * shard.kv_bytes_per_token_per_layer
        block_bytes = [stage.num_layers * layer_block_bytes for stage in plan.stages]
        return blocks_within(config.kv_cache_memory_bytes, block_bytes, config.block_size)
    return kv_blocks_beside_weights(
        shape,
        plan,
        tensor_parallel_size=config.tensor_parallel_size,
        device_bytes=profile.memory_bytes * config.gpu_memory_utilization,
        block_size=config.block_size,
    )
