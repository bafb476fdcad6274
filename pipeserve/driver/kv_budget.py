"""How many KV blocks the pools get: one number for all stages, so the scarcest memory decides."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeserve.configs import RunConfig
from pipeserve.core.nouns import PipelinePlan
from pipeserve.core.topology import Topology
from pipeserve.errors import ConfigError
from pipeserve.machine import MemoryLimit
from pipeserve.wire.control import StageSized

_DEFAULT_BYTES = 1 << 30  # a stage, where the user says nothing
_DEFAULT_SHARE = 0.5  # of what a machine has free beside the weights, for all stages on it


def num_kv_blocks(
    config: RunConfig, plan: PipelinePlan, max_model_len: int, sizes: Sequence[StageSized]
) -> int:
    """Blocks of `config.block_size` tokens. `sizes`: what each rank says of itself.

    `num_gpu_blocks_override` is taken as it is. Otherwise a rank's `kv_cache_memory_bytes` over
    what one of its blocks takes, and no more than `max_num_seqs` requests of full length use.

    Raises ConfigError when not even one fits, and when weights and pools together take more memory
    than is free somewhere: the kernel would end whatever it likes to make room.
    """
    demands = _demands(sizes)
    num_blocks = _wanted_blocks(config, max_model_len, sizes, demands)
    for demand in demands:
        demand.check(num_blocks, Topology.of(plan))
    return num_blocks


def blocks_within(num_bytes: int, block_bytes: Sequence[int], block_size: int) -> int:
    """Blocks that fit `num_bytes` of each rank, on which one takes `block_bytes`. Raises
    ConfigError when that is none."""
    most = max(block_bytes)
    if num_bytes < most:
        raise ConfigError(
            f"--kv-cache-memory-bytes {num_bytes} holds no block of {block_size} tokens, which "
            f"takes up to {most} bytes on a rank; give at least {most}"
        )
    return num_bytes // most


def _wanted_blocks(
    config: RunConfig, max_model_len: int, sizes: Sequence[StageSized], demands: "list[_Demand]"
) -> int:
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    block_bytes = [size.block_bytes for size in sizes]
    most = config.max_num_seqs * -(-max_model_len // config.block_size)
    if config.kv_cache_memory_bytes is not None:
        given = config.kv_cache_memory_bytes
        return min(blocks_within(given, block_bytes, config.block_size), most)
    is_gpu = config.device == "cuda"
    fitting = [
        demand.default_bytes(config.gpu_memory_utilization if is_gpu else None)
        // demand.block_bytes
        for demand in demands
        if demand.block_bytes
    ]
    if not is_gpu:
        fitting.append(_DEFAULT_BYTES // max(block_bytes))
    # At least one, of which the check says whether it fits.
    return max(min(most, *fitting), 1)


@dataclass(slots=True)
class _Demand:
    """What all ranks that take from the same memory want of it."""

    memory: MemoryLimit
    ranks: list[int]
    weight_bytes: int = 0
    block_bytes: int = 0

    @property
    def beside_weights(self) -> int:
        return self.memory.free_bytes - self.weight_bytes

    def default_bytes(self, utilization: float | None) -> int:
        """For KV, where the user says nothing; `utilization`: the share of a GPU that is ours."""
        if utilization is None:
            return int(self.beside_weights * _DEFAULT_SHARE)
        return self.beside_weights - int((1 - utilization) * self.memory.num_bytes)

    def check(self, num_blocks: int, topology: Topology) -> None:
        kv_bytes = num_blocks * self.block_bytes
        if kv_bytes <= self.beside_weights:
            return
        stages = ", ".join(topology.name(rank) for rank in self.ranks)
        remedy = "give a smaller --kv-cache-memory-bytes or --num-gpu-blocks-override"
        if self.beside_weights < self.block_bytes:
            remedy = "end what else uses it, or spread the stages over more machines"
        raise ConfigError(
            f"{stages}: weights take {self.weight_bytes} bytes and {num_blocks} KV blocks "
            f"{kv_bytes}, and {self.memory.name} has {self.memory.free_bytes} free; {remedy}"
        )


def _demands(sizes: Sequence[StageSized]) -> list[_Demand]:
    """On each memory that a rank takes from."""
    demands: dict[str, _Demand] = {}
    for rank, size in enumerate(sizes):
        for memory in size.memory:
            demand = demands.setdefault(memory.key, _Demand(memory, []))
            demand.memory = min(demand.memory, memory, key=lambda each: each.free_bytes)
            demand.ranks.append(rank)
            demand.weight_bytes += size.weight_bytes
            demand.block_bytes += size.block_bytes
    return list(demands.values())
