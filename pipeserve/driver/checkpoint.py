"""A checkpoint as a driver runs it: found, checked, and cut into stages that compute for real."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeserve.configs import RunConfig
from pipeserve.configs.device_profiles import load_profile
from pipeserve.core.cost.device import check_profile
from pipeserve.core.cost.pipeline_cost import PipelineCost
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.nouns import PipelinePlan
from pipeserve.core.view import CostModel, Limits
from pipeserve.driver.dtypes import choose_dtype
from pipeserve.driver.kv_budget import num_kv_blocks
from pipeserve.driver.layout import lay_out
from pipeserve.driver.setup import Setup
from pipeserve.driver.shapes import shape_of
from pipeserve.errors import ConfigError
from pipeserve.machine import device_name, native_dtypes
from pipeserve.stages.checkpoint.sources import resolve
from pipeserve.stages.config.attentions import check_attention
from pipeserve.stages.config.families import read_config
from pipeserve.stages.config.model_config import ModelConfig
from pipeserve.wire.control import KeeperHello, ModelShare, StageSized, encode_job


def checkpoint_setup(
    config: RunConfig,
    on_progress: Callable[[str], None] = lambda text: None,
    cost: CostModel | None = None,
    check: Callable[[ModelConfig], None] = lambda model_config: None,
) -> Setup:
    """Finds the model, and says in words how far that is; `check` may raise for it. `cost` is what
    the policy predicts with, by default that of the run's device profile.

    Raises ConfigError: no such model, one that does not fit the run, a profile of something else.
    """
    _check_runs_here(config)
    folder = resolve(config.model, on_progress)
    model_config = read_config(folder)
    check(model_config)
    here = (native_dtypes(),) * config.pipeline_parallel_size
    return _setup(_Found(config, folder, model_config, cost), here)


@dataclass(frozen=True, slots=True)
class _Found:
    """What a setup is made of, whatever its dtype."""

    config: RunConfig
    folder: Path
    model_config: ModelConfig
    cost: CostModel | None


def _setup_for(found: _Found, keepers: Sequence[KeeperHello]) -> Setup:
    native = tuple(keeper.native_dtypes for keeper in keepers)
    return _setup(found, native, [keeper.host for keeper in keepers])


def _setup(found: _Found, native: tuple[tuple[str, ...], ...], hosts: Sequence[str] = ()) -> Setup:
    """`native`: of each rank, as `machine.native_dtypes`."""
    config, model_config = found.config, found.model_config
    device = _device_of(config)
    chosen = choose_dtype(config.dtype, model_config.dtype, native, hosts, device)
    dtype = chosen.name
    max_model_len = _max_model_len(config, model_config)
    shape = shape_of(model_config, config.model, dtype)
    plan, limits_with = lay_out(
        config,
        shape,
        max_model_len=max_model_len,
        enable_prefix_caching=config.enable_prefix_caching,
    )

    def limits_for(sizes: Sequence[StageSized]) -> Limits:
        return limits_with(num_kv_blocks(config, plan, max_model_len, sizes))

    return Setup(
        kind="real",
        config=config,
        shape=shape,
        dtype=dtype,
        plan=plan,
        limits_for=limits_for,
        cost=found.cost or _profiled_cost(config, shape, plan, dtype),
        module="pipeserve.stage.worker",
        works=_works(config, device, str(found.folder), plan, dtype),
        model_folder=found.folder,
        model_config=model_config,
        dtype_why=chosen.why,
        dtype_warning=chosen.warning,
        native_dtypes=native,
        for_ranks=partial(_setup_for, found),
    )


def _check_runs_here(config: RunConfig) -> None:
    if config.device == "emulated":
        raise ConfigError(
            "device is emulated: its stages compute nothing, so there are no tokens to give; use "
            "pipeserve bench, or leave --device out"
        )
    if config.tensor_parallel_size > 1:
        raise ConfigError(
            f"tensor_parallel_size is {config.tensor_parallel_size}, on real stages only 1 works "
            "so far; split the model with pipeline_parallel_size, or use pipeserve simulate"
        )
    check_attention(_device_of(config), config.attention)


def _device_of(config: RunConfig) -> str:
    """Of every stage: "cpu" or "cuda"."""
    return "cpu" if config.device == "auto" else config.device


def _max_model_len(config: RunConfig, model_config: ModelConfig) -> int:
    longest = model_config.max_position_embeddings
    if config.max_model_len is None:
        return longest
    if config.max_model_len > longest:
        raise ConfigError(
            f"--max-model-len {config.max_model_len} is over the {longest} positions that "
            f"{config.model} was trained to; give at most {longest}"
        )
    return config.max_model_len


def _profiled_cost(
    config: RunConfig, shape: ModelShape, plan: PipelinePlan, dtype: str
) -> CostModel | None:
    """Of the device profile, if the run has one. Raises ConfigError when it is not of this machine,
    model and type."""
    if config.device_profile is None:
        return None
    profile = load_profile(config.device_profile)
    check_profile(profile, model=config.model, device=device_name(), dtype=dtype, threads=1)
    return PipelineCost(profile, shape, plan)


def _works(
    config: RunConfig, device: str, folder: str, plan: PipelinePlan, dtype: str
) -> tuple[bytes, ...]:
    return tuple(
        encode_job(
            ModelShare(
                model_folder=folder,
                first_layer=stage.first_layer,
                stop_layer=stage.stop_layer,
                has_embedding=stage.has_embedding,
                has_head=stage.has_head,
                dtype=dtype,
                kv_dtype=dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
                device=device,
                attention=config.attention,
                block_size=config.block_size,
            )
        )
        for stage in plan.stages
    )
