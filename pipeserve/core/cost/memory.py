"""How many KV blocks fit beside the weights. One number for all stages: the scarcest decides.

Of the ranks of a stage the one that holds most counts: `ModelShape.shard` is its part.
"""

from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.nouns import PipelinePlan, StagePlan
from pipeserve.errors import ConfigError


def kv_blocks_beside_weights(
    shape: ModelShape,
    plan: PipelinePlan,
    *,
    tensor_parallel_size: int,
    device_bytes: float,
    block_size: int,
) -> int:
    """Blocks of `block_size` tokens that the stage with least room holds, when `device_bytes` of
    each device are for weights and KV. Raises ConfigError when the weights alone do not fit.

    Checked against SARATHI (2308.16369, section 5.3): GPT-3 on A100-80GB at 90 %, requests of 4,096
    tokens: 11 at TP8, and 27 for each of the 8 microbatches of TP8 x PP8.
    """
    shard = shape.shard(tensor_parallel_size)
    where = f" on each of {tensor_parallel_size} devices" if tensor_parallel_size > 1 else ""
    fewest: int | None = None
    for stage in plan.stages:
        free = device_bytes - weight_bytes(shard, stage)
        block_bytes = stage.num_layers * block_size * shard.kv_bytes_per_token_per_layer
        if free < max(block_bytes, 1):
            raise ConfigError(
                f"stage {stage.stage} of {shape.name} has {weight_bytes(shard, stage) / 1e9:.1f} "
                f"GB of weights{where}, and a device has {device_bytes / 1e9:.1f} usable GB: no "
                "room for KV; use more stages or more tensor parallelism"
            )
        if block_bytes:
            blocks = int(free // block_bytes)
            fewest = blocks if fewest is None else min(fewest, blocks)
    assert fewest is not None, "a plan without layers"
    return fewest


def weight_bytes(shape: ModelShape, stage: StagePlan) -> int:
    """Of one stage; of one of its ranks, where the shape is a shard. All of one type, as GPUs hold
    them; what our own CPU stages hold, head in float32 and its copy, they say themselves."""
    tables = stage.has_embedding + stage.has_head
    if stage.has_embedding and stage.has_head and shape.tie_word_embeddings:
        tables = 1
    parameters = stage.num_layers * shape.num_layer_parameters + tables * shape.num_head_parameters
    return parameters * shape.bytes_per_value
