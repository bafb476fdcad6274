"""A checkpoint as a driver runs it: found, checked, and cut into stages that compute for real."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pipeserve.configs import RunConfig
from pipeserve.configs.device_profiles import load_profile
from pipeserve.configs.layer_lists import AUTO
from pipeserve.core.cost.cut import StageParts
from pipeserve.core.cost.device import DeviceProfile, check_profile
from pipeserve.core.cost.partition import parts_by_operations, parts_by_profile
from pipeserve.core.cost.pipeline_cost import PipelineCost
from pipeserve.core.cost.rough import rough_profile
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.nouns import PipelinePlan
from pipeserve.core.policies import get_policy
from pipeserve.core.view import CostModel, Limits
from pipeserve.driver.dtypes import choose_dtype
from pipeserve.driver.kept_times import Measured, find_kept, keep
from pipeserve.driver.kv_budget import num_kv_blocks
from pipeserve.driver.layer_choice import parts_of_times
from pipeserve.driver.layout import lay_out, most_tokens, usual_of
from pipeserve.driver.setup import LayerChoice, Setup
from pipeserve.driver.shapes import shape_of
from pipeserve.errors import ConfigError
from pipeserve.machine import device_name, fingerprint, native_dtypes
from pipeserve.stages.checkpoint.sources import resolve
from pipeserve.stages.config.attentions import check_attention
from pipeserve.stages.config.families import read_config
from pipeserve.stages.config.model_config import ModelConfig
from pipeserve.wire.control import Examined, KeeperHello, StageSized
from pipeserve.wire.stage_job import ModelShare, encode_job


def checkpoint_setup(
    config: RunConfig,
    on_progress: Callable[[str], None] = lambda text: None,
    cost: CostModel | None = None,
    check: Callable[[ModelConfig], None] = lambda model_config: None,
) -> Setup:
    """Finds the model, and says in words how far that is; `check` may raise for it. `cost` is what
    the policy predicts with, by default that of the run's device profile; without one it is learnt.

    Raises ConfigError: no such model, one that does not fit the run, a profile of something else.
    """
    _check_runs_here(config)
    folder = resolve(config.model, on_progress)
    model_config = read_config(folder)
    check(model_config)
    num_ranks = config.pipeline_parallel_size * config.tensor_parallel_size
    native = (native_dtypes(),) * num_ranks
    devices = tuple(fingerprint(rank, num_ranks) for rank in range(num_ranks))
    if config.launcher == "external":
        devices = ()
    return _setup(_Found(config, folder, model_config, cost), native, devices)


@dataclass(frozen=True, slots=True)
class _Found:
    """What a setup is made of, whatever its dtype."""

    config: RunConfig
    folder: Path
    model_config: ModelConfig
    cost: CostModel | None


def _setup_for(found: _Found, keepers: Sequence[KeeperHello]) -> Setup:
    native = tuple(keeper.native_dtypes for keeper in keepers)
    devices = tuple(keeper.device for keeper in keepers)
    return _setup(found, native, devices, [keeper.host for keeper in keepers])


def _setup(
    found: _Found,
    native: tuple[tuple[str, ...], ...],
    devices: tuple[str, ...],
    hosts: Sequence[str] = (),
) -> Setup:
    """`native`, `devices`: of each rank, as its keeper says."""
    config, model_config = found.config, found.model_config
    device, width = _device_of(config), config.tensor_parallel_size
    chosen = choose_dtype(config.dtype, model_config.dtype, native, hosts, device)
    dtype = chosen.name
    max_model_len = _max_model_len(config, model_config)
    shape = shape_of(model_config, config.model, dtype)
    shape.check_divides(width)
    profile = _profile(config, dtype)
    choice = None
    if config.pipeline_layers in (None, AUTO):
        choice = _choice(found, device, dtype, native, devices, hosts, shape, profile)
    plan, limits_with = lay_out(
        config,
        shape,
        max_model_len=max_model_len,
        enable_prefix_caching=config.enable_prefix_caching,
        parts=None if choice is None else choice.parts,
        ranks_per_stage=width,
        shares_head=_shares_head(config, native),
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
        cost=found.cost or _cost(config, profile, shape, plan),
        module="pipeserve.stage.worker",
        works=_works(config, device, str(found.folder), plan, dtype),
        model_folder=found.folder,
        model_config=model_config,
        dtype_why=chosen.why,
        dtype_warning=chosen.warning,
        native_dtypes=native,
        devices=devices,
        layers_by="as listed" if choice is None else choice.by,
        choice=choice,
        for_ranks=partial(_setup_for, found),
    )


def _cost(
    config: RunConfig, profile: DeviceProfile | None, shape: ModelShape, plan: PipelinePlan
) -> PipelineCost | None:
    """By the profile or, where there is none, as it is learnt; but not for a policy that does not
    ask, for learning takes CPU time."""
    if profile is None and not get_policy(config.policy).traits.reads_cost:
        return None
    return PipelineCost(
        profile or rough_profile(config.device), shape, plan, config.tensor_parallel_size
    )


def _choice(
    found: _Found,
    device: str,
    dtype: str,
    native: tuple[tuple[str, ...], ...],
    devices: tuple[str, ...],
    hosts: Sequence[str],
    shape: ModelShape,
    profile: DeviceProfile | None,
) -> LayerChoice:
    """By times that the ranks are to measure, or were measured before; else by the profile; else by
    operations and bytes."""
    config, model_config = found.config, found.model_config
    num_stages, width = config.pipeline_parallel_size, config.tensor_parallel_size
    shares_head = _shares_head(config, native)
    max_model_len = _max_model_len(config, model_config)
    work = usual_of(config, max_model_len)
    run = (dtype, _kv_dtype(config, dtype), device, config.attention, str(config.block_size))
    run += (f"{width} ranks",) if width > 1 else ()
    measured = Measured(repr(model_config), run, work)
    is_measured_now = config.pipeline_layers == AUTO
    kept = None if is_measured_now else find_kept(measured, devices[::width])

    def of_times(examined: Sequence[Examined]) -> tuple[str, tuple[StageParts, ...]]:
        times = [each.parts[0] for each in examined]
        keep(measured, devices[::width], times, config.model)
        return "by times measured now", parts_of_times(times, shares_head)

    def with_layers(counts: tuple[int, ...]) -> Setup:
        listed = replace(config, pipeline_layers=counts)
        return _setup(replace(found, config=listed), native, devices, hosts)

    if kept is not None:
        by, parts = f"by times measured on {kept.measured}", parts_of_times(kept.parts, shares_head)
    elif profile is not None:
        by = "by the device profile"
        parts = parts_by_profile(profile, shape, num_stages, work, width, shares_head)
    else:
        num_tokens = most_tokens(config, max_model_len)
        by = "by operations and bytes"
        parts = parts_by_operations(shape, num_stages, num_tokens, shares_head)
    return LayerChoice(
        by=by,
        parts=parts,
        max_model_len=max_model_len,
        with_layers=with_layers,
        works=(work,) if is_measured_now else (),
        of_times=of_times,
    )


def _check_runs_here(config: RunConfig) -> None:
    if config.device == "emulated":
        raise ConfigError(
            "device is emulated: its stages compute nothing, so there are no tokens to give; use "
            "pipeserve bench, or leave --device out"
        )
    check_attention(_device_of(config), config.attention)


def _device_of(config: RunConfig) -> str:
    """Of every stage: "cpu" or "cuda"."""
    return "cpu" if config.device == "auto" else config.device


def _shares_head(config: RunConfig, native: Sequence[tuple[str, ...]]) -> bool:
    """Whether both ends of the pipeline have the head. By itself on two CPU stages that compute
    alike, or the last bits of a logit would depend on whose turn it was: more of them can be evened
    out by layers, and on a GPU the second copy would take the place of KV."""
    if config.head_stages != "auto":
        return config.head_stages == "both" and config.pipeline_parallel_size > 1
    is_of_two = config.pipeline_parallel_size == 2 and config.tensor_parallel_size == 1
    return is_of_two and _device_of(config) == "cpu" and len(set(native)) == 1


def _kv_dtype(config: RunConfig, dtype: str) -> str:
    return dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype


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


def _profile(config: RunConfig, dtype: str) -> DeviceProfile | None:
    """That of the run, if it has one. Raises ConfigError when it is not of this machine, model and
    type."""
    if config.device_profile is None:
        return None
    profile = load_profile(config.device_profile)
    check_profile(
        profile,
        model=config.model,
        device=device_name(),
        dtype=dtype,
        threads=1,
        tensor_parallel_size=config.tensor_parallel_size,
    )
    return profile


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
                kv_dtype=_kv_dtype(config, dtype),
                device=device,
                attention=config.attention,
                block_size=config.block_size,
            )
        )
        for stage in plan.stages
    )
