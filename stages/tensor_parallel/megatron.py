"""What stages use of megatron-core, without the rest of it.

`import megatron.core` brings in optimizers, checkpoints, every kind of attention and TorchDynamo:
seconds of CPU time of each rank, whenever it is started, for four files that need none of them.
"""

from pipeserve.stages.tensor_parallel.unopened import leave_unopened

leave_unopened(
    "megatron.core",
    "megatron.core.dist_checkpointing",
    "megatron.core.tensor_parallel",
    "megatron.core.transformer",
)

# ruff: noqa: E402
from megatron.core import parallel_state  # first: the others and it refer to each other
from megatron.core.jit import disable_jit_fuser

disable_jit_fuser()  # decorates functions that no stage calls, and brings in TorchDynamo

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region

__all__ = [
    "ColumnParallelLinear",
    "ModelParallelConfig",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "parallel_state",
    "reduce_from_tensor_model_parallel_region",
]
