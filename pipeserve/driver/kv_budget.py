"""How many KV blocks the pool gets: one number for all stages, so the scarcest stage decides."""

from pipeserve.configs import RunConfig
from pipeserve.core.nouns import PipelinePlan
from pipeserve.errors import ConfigError
from pipeserve.machine import available_memory_bytes

_DEFAULT_BYTES = 1 << 30  # a stage, where the user says nothing
_SHARE_OF_AVAILABLE = 0.5  # of this machine's free memory, for all stages together


def num_kv_blocks(
    config: RunConfig, plan: PipelinePlan, kv_bytes_per_token_per_layer: int, max_model_len: int
) -> int:
    """Blocks of `config.block_size` tokens. Raises ConfigError when not even one fits,
    and when all stages of this machine together ask for more memory than it has.

    `num_gpu_blocks_override` is taken as it is. Otherwise a stage's `kv_cache_memory_bytes` over
    what one block of its layers takes, and no more than `max_num_seqs` requests of full length use.
    """
    layer_block_bytes = config.block_size * kv_bytes_per_token_per_layer
    num_blocks = _wanted_blocks(config, plan, layer_block_bytes, max_model_len)
    if config.launcher == "spawn":
        _check_memory(num_blocks * layer_block_bytes * sum(s.num_layers for s in plan.stages))
    return num_blocks


def _wanted_blocks(
    config: RunConfig, plan: PipelinePlan, layer_block_bytes: int, max_model_len: int
) -> int:
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    budget = config.kv_cache_memory_bytes or _default_bytes(len(plan.stages))
    blocks_of_longest = -(-max_model_len // config.block_size)
    most = config.max_num_seqs * blocks_of_longest
    return min(blocks_within(budget, config, plan, layer_block_bytes), most)


def blocks_within(
    num_bytes: int, config: RunConfig, plan: PipelinePlan, layer_block_bytes: int
) -> int:
    """Blocks that fit `num_bytes` of the stage with the most layers, each of which takes
    `layer_block_bytes` for one. Raises ConfigError when that is none."""
    most_layers = max(stage.num_layers for stage in plan.stages)
    block_bytes = most_layers * layer_block_bytes
    if num_bytes < block_bytes:
        raise ConfigError(
            f"--kv-cache-memory-bytes {num_bytes} holds no block of {config.block_size} tokens on "
            f"a stage of {most_layers} layers; give at least {block_bytes}"
        )
    return num_bytes // block_bytes


def _default_bytes(num_stages: int) -> int:
    return min(_DEFAULT_BYTES, int(available_memory_bytes() * _SHARE_OF_AVAILABLE) // num_stages)


def _check_memory(wanted_bytes: int) -> None:
    """The stages fill their pools at once; the kernel would end whatever it likes to make room."""
    available = available_memory_bytes()
    if wanted_bytes > available:
        raise ConfigError(
            f"the KV pools of all stages take {wanted_bytes} bytes, this machine has {available} "
            "free; give a smaller --kv-cache-memory-bytes or --num-gpu-blocks-override"
        )
