"""Which stage holds which layers: as the user lists them, or as `cut.best_cut` finds by what they
take."""

from collections.abc import Sequence
from dataclasses import replace

from pipeserve.core.cost.cut import StageParts, best_cut
from pipeserve.core.cost.device import DeviceProfile
from pipeserve.core.cost.pipeline_cost import PipelineCost
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.nouns import PipelinePlan, StagePlan
from pipeserve.core.topology import ranks_of
from pipeserve.core.work import Work
from pipeserve.errors import ConfigError

_CONTEXT = 512
"""Positions of KV that a decode reads in a usual microbatch, where requests may be that long."""
_PER_DECODE = 6
"""Of so many tokens one is a decode: ShareGPT's share, prompts of 2340 tokens and outputs of 439 on
average."""
_ROWS_OF_READING = 8
"""Rows that cost a product as much as reading its weights does (measured with bf16 on one core;
bench/linears.py)."""


def plan_pipeline(
    shape: ModelShape,
    num_stages: int,
    counts: Sequence[int] | None,
    num_tokens: int,
    window: int | None = None,
    parts: Sequence[StageParts] | None = None,
    shares_head: bool = False,
) -> PipelinePlan:
    """The split that the user listed, or the one that evens out what stages take: `parts`, or else
    operations of microbatches of `num_tokens` tokens; `window` microbatches may be outstanding, by
    default as many as there are stages, and more where the links are slow. `shares_head`: both ends
    have it. Raises ConfigError for a split that does not fit the model."""
    if counts is not None:
        plan = split_explicitly(shape.num_layers, num_stages, counts)
    else:
        plan = split_by_time(
            parts or parts_by_operations(shape, num_stages, num_tokens, shares_head)
        )
    if shares_head:
        first, *others = plan.stages
        plan = replace(plan, stages=(replace(first, has_head=True), *others))
    return replace(plan, window=window or plan.window, window_follows=window is None)


def usual_work(num_tokens: int, max_model_len: int) -> Work:
    """A microbatch that stands for what serving does: chunks of prompts, and decodes."""
    num_prompt = num_tokens - max(num_tokens // _PER_DECODE, 1)
    sizes = [min(num_prompt - at, max_model_len) for at in range(0, num_prompt, max_model_len)]
    prefills = tuple((0, size) for size in sizes if size > 1)  # what has one position is a decode
    beside = decodes(num_tokens - sum(size for _, size in prefills), max_model_len)
    return beside._replace(num_tokens=num_tokens, prefills=prefills)


def decodes(num: int, max_model_len: int) -> Work:
    """A microbatch of so many, alone."""
    context = max(min(_CONTEXT, max_model_len // 2), 1)
    return Work(num, num, (), num, num * context)


def parts_by_operations(
    shape: ModelShape, num_stages: int, num_tokens: int, shares_head: bool = False
) -> tuple[StageParts, ...]:
    """In units of a layer: layers are equal but for the last one, and so are stages."""
    head = _head_cost(shape, num_tokens)
    layers = (shape.num_layers - 1) * (1.0,) + (_last_layer_cost(shape, num_tokens),)
    return end_parts(layers, num_stages, 0.0, head, shares_head=shares_head)


def parts_by_profile(
    profile: DeviceProfile,
    shape: ModelShape,
    num_stages: int,
    work: Work,
    size: int,
    shares_head: bool = False,
) -> tuple[StageParts, ...]:
    """In seconds, of stages of `size` such devices each."""
    one_layer = split_explicitly(1, 1, [1])
    (took,) = PipelineCost(profile, shape, one_layer, size).breakdown(work)
    layer_s = took.linear + took.attention_prefill + took.attention_decode + took.all_reduce
    layers = shape.num_layers * (layer_s,)
    return end_parts(layers, num_stages, took.embedding, took.head, took.host, shares_head)


def end_parts(
    layer_s: tuple[float, ...],
    num_stages: int,
    embedding_s: float,
    head_s: float,
    host_s: float = 0.0,
    shares_head: bool = False,
) -> tuple[StageParts, ...]:
    """Of equal stages, the first of which embeds, and the last has the head, or both ends half of
    them."""
    return tuple(
        StageParts(layer_s, host_s + embedding_s * (stage == 0) + head_s * share)
        for stage, share in enumerate(head_shares(num_stages, shares_head))
    )


def head_shares(num_stages: int, is_shared: bool) -> list[float]:
    """What share of the heads each stage has."""
    shares = [float(stage == num_stages - 1) for stage in range(num_stages)]
    if is_shared and num_stages > 1:
        shares[0] = shares[-1] = 0.5
    return shares


def _head_cost(shape: ModelShape, num_tokens: int) -> float:
    """The head's work, in layers, in a microbatch whose decodes sample, as in `usual_work`."""
    head = (num_tokens / _PER_DECODE + _ROWS_OF_READING) * shape.num_head_parameters
    return head / _layer_work(shape, num_tokens)


def _last_layer_cost(shape: ModelShape, num_tokens: int) -> float:
    """The same of the layer before the head, where keys and values alone are made of all tokens."""
    num_sampling = num_tokens // _PER_DECODE
    keys_and_values = 2 * shape.num_kv_heads * shape.head_dim * shape.hidden_size
    work = _layer_work(shape, num_sampling) + (num_tokens - num_sampling) * keys_and_values
    return work / _layer_work(shape, num_tokens)


def _layer_work(shape: ModelShape, num_tokens: int) -> float:
    """Of matrix products, as the head is: (rows, and those that reading counts as) x parameters."""
    attention = (num_tokens + _ROWS_OF_READING) * shape.num_attention_parameters
    read = _ROWS_OF_READING * shape.experts_touched(num_tokens)
    rows = shape.experts_per_token * num_tokens + read
    return attention + rows * shape.num_mlp_parameters


def split_layers(num_layers: int, num_stages: int) -> PipelinePlan:
    """As evenly as can be: equal layers, equal stages, and ends that cost nothing. Raises
    ConfigError as `split_by_time` does."""
    return split_by_time([StageParts(num_layers * (1.0,))] * num_stages)


def split_by_time(parts: Sequence[StageParts]) -> PipelinePlan:
    """The contiguous split whose slowest stage is fastest, by what each stage would take; every
    stage gets a layer at least.

    Raises ConfigError for no stage, and when there are more stages than layers.
    """
    _check_stages(len(parts))
    num_layers = len(parts[0].layer_s)
    if len(parts) > num_layers:
        raise ConfigError(
            f"{len(parts)} pipeline stages are more than the model's {num_layers} layers: use at "
            f"most {num_layers}, or list the layers of each stage (0 is allowed only there)"
        )
    counts = best_cut(parts)
    assert counts is not None, "there is a cut, and no room that it could not fit"
    return plan_of(counts)


def split_explicitly(num_layers: int, num_stages: int, counts: Sequence[int]) -> PipelinePlan:
    """The split that the user listed, layers per stage; 0 is allowed.

    Raises ConfigError when the list does not fit the model or the number of stages.
    """
    _check_stages(num_stages)
    listed = ",".join(map(str, counts))
    if len(counts) != num_stages:
        raise ConfigError(
            f"the layer list {listed} is for {len(counts)} stages, not {num_stages}: "
            "give one number for each stage"
        )
    if min(counts) < 0:
        raise ConfigError(f"the layer list {listed} has a negative number: use 0 or more")
    if sum(counts) != num_layers:
        raise ConfigError(
            f"the layer list {listed} adds up to {sum(counts)} layers, the model has {num_layers}: "
            f"make it add up to {num_layers}"
        )
    return plan_of(counts)


def _check_stages(num_stages: int) -> None:
    if num_stages < 1:
        raise ConfigError(f"{num_stages} pipeline stages: use at least 1")


def with_ranks(plan: PipelinePlan, width: int) -> PipelinePlan:
    """The same, with so many ranks for each stage."""
    stages = [replace(stage, ranks=ranks_of(stage.stage, width)) for stage in plan.stages]
    return replace(plan, stages=tuple(stages))


def plan_of(counts: Sequence[int]) -> PipelinePlan:
    """Stages on ranks 0, 1, ..., and a window of as many microbatches as there are stages."""
    stages = []
    first = 0
    for stage, count in enumerate(counts):
        stages.append(
            StagePlan(
                stage=stage,
                first_layer=first,
                stop_layer=first + count,
                has_embedding=stage == 0,
                has_head=stage == len(counts) - 1,
                ranks=ranks_of(stage, 1),
            )
        )
        first += count
    return PipelinePlan(tuple(stages), window=len(counts))
