"""What stages use of megatron-core, without the rest of it.

`import megatron.core` brings in optimizers, checkpoints, every kind of attention, TorchDynamo and
DTensor: 2.4 s of CPU time and 136 MB in each rank, whenever it is started, for four files that need
none of them and take 0.04 s and 2 MB (November 2026, megatron-core 0.16.1).
"""

from pipeserve.stages.tensor_parallel.lean_imports import leave_unopened, missing

leave_unopened(
    "megatron.core",
    "megatron.core.dist_checkpointing",
    "megatron.core.tensor_parallel",
    "megatron.core.transformer",
)
with missing("torch.distributed._tensor"):
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
