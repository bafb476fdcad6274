"""Which stage holds which layers. Layers count as equal; costs are in units of a layer."""

from collections.abc import Sequence
from dataclasses import replace

from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.nouns import PipelinePlan, StagePlan
from pipeserve.errors import ConfigError


def plan_pipeline(
    shape: ModelShape,
    num_stages: int,
    counts: Sequence[int] | None,
    num_tokens: int,
    window: int | None = None,
) -> PipelinePlan:
    """The split that the user listed, or the one that evens out predicted work in microbatches of
    `num_tokens` tokens; `window` microbatches may be outstanding, by default as many as there are
    stages, and more where the links are slow. Raises ConfigError for a split that does not fit the
    model."""
    if counts is not None:
        plan = split_explicitly(shape.num_layers, num_stages, counts)
    else:
        plan = split_layers(shape.num_layers, num_stages, head_cost=_head_cost(shape, num_tokens))
    return replace(plan, window=window or plan.window, window_follows=window is None)


def _head_cost(shape: ModelShape, num_tokens: int) -> float:
    """The head's work, in layers, in a microbatch whose every sixth token samples.

    That is ShareGPT's share: prompts of 2340 tokens and outputs of 439 on average.

    Both are matrix products: about (rows + 8) x parameters, where 8 rows cost as much as reading
    the weights does (measured with bf16 on one core; bench/linears.py).
    """
    head = (num_tokens / 6 + 8) * shape.num_head_parameters
    attention = (num_tokens + 8) * shape.num_attention_parameters
    rows = shape.experts_per_token * num_tokens + 8 * shape.experts_touched(num_tokens)
    return head / (attention + rows * shape.num_mlp_parameters)


def split_layers(
    num_layers: int, num_stages: int, embedding_cost: float = 0.0, head_cost: float = 0.0
) -> PipelinePlan:
    """The contiguous split whose slowest stage is fastest; every stage gets a layer at least.

    Each layer goes to the stage that is cheapest with it, which is exact for equal layers. Among
    equals the earlier stage takes it, so the last stage, which also samples, has the fewest.
    Raises ConfigError when there are more stages than layers.
    """
    _check_stages(num_stages)
    if num_stages > num_layers:
        raise ConfigError(
            f"{num_stages} pipeline stages are more than the model's {num_layers} layers: use at "
            f"most {num_layers}, or list the layers of each stage (0 is allowed only there)"
        )
    extra = [0.0] * num_stages
    extra[0] += embedding_cost
    extra[-1] += head_cost
    counts = [1] * num_stages
    for _ in range(num_layers - num_stages):
        cheapest = min(range(num_stages), key=lambda stage: counts[stage] + 1 + extra[stage])
        counts[cheapest] += 1
    return _pipeline(counts)


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
    return _pipeline(counts)


def _check_stages(num_stages: int) -> None:
    if num_stages < 1:
        raise ConfigError(f"{num_stages} pipeline stages: use at least 1")


def _pipeline(counts: Sequence[int]) -> PipelinePlan:
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
                ranks=(stage,),
            )
        )
        first += count
    return PipelinePlan(tuple(stages), window=len(counts))
