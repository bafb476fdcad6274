"""The paged KV pool of one stage, in the layout that attention in PyTorch reads.

A backend makes it (`Backend.make_kv`) and its attention reads it; nobody else knows the layout.

Suffixes: L layers of the stage, K kv heads, B blocks, P positions in a block, H head size.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pipeserve.stages.config.model_config import ModelConfig


class PoolLayer(tuple[Tensor, Tensor]):
    """Keys and values of one layer, each [K, B, P, H]."""

    described: object = None
    """As a backend's kernels are told of it: theirs, made once."""


class KVCache:
    """K and V of every block, for each layer of this stage. Block ids are the engine's.

    Heads come before blocks, so that gathering a request's blocks gives each head one contiguous
    [positions, H] matrix, which is what matrix products want.

    `turned`: in memory each head's keys of a block are [H, P], which the C kernels multiply where
    they are, and all heads of a block lie side by side: the longer what is read lies in one piece,
    the less is fetched from memory for nothing (attention of 16 decodes takes 5 to 20 % less).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        turned: bool = False,
        zeros: Callable[..., Tensor] = torch.zeros,
    ) -> None:
        """`turned`: in memory keys are [L, B, K, H, P], values [L, B, K, P, H]. `zeros`: called as
        torch.zeros is, for the memory of either."""
        self.block_size = block_size
        self.num_kv_heads = config.num_kv_heads
        self.heads_per_kv_head = config.num_heads // config.num_kv_heads
        if turned:
            order = (num_layers, num_blocks, config.num_kv_heads)
            keys_LBKHP = zeros((*order, config.head_dim, block_size), dtype=dtype, device=device)
            values_LBKPH = zeros((*order, block_size, config.head_dim), dtype=dtype, device=device)
            self.keys_LKBPH = keys_LBKHP.transpose(1, 2).transpose(-1, -2)
            self.values_LKBPH = values_LBKPH.transpose(1, 2)
        else:
            shape = _shape(config, num_layers, num_blocks, block_size)
            self.keys_LKBPH = zeros(shape, dtype=dtype, device=device)
            self.values_LKBPH = zeros(shape, dtype=dtype, device=device)
        layers = zip(self.keys_LKBPH, self.values_LKBPH, strict=True)
        self._layers = tuple(PoolLayer(sides) for sides in layers)

    @staticmethod
    def block_bytes(
        config: ModelConfig, *, num_layers: int, block_size: int, dtype: torch.dtype
    ) -> int:
        """What each block adds to a pool."""
        return 2 * math.prod(_shape(config, num_layers, 1, block_size)) * dtype.itemsize

    def layer(self, layer: int) -> PoolLayer:
        """(keys, values) of the stage's own layer number `layer`."""
        return self._layers[layer]

    def rows_of(self, blocks: Tensor) -> Tensor:
        """Where `blocks` [N] of each head lie when K and B are one axis: int64 [K * N], by head."""
        _, num_kv_heads, num_blocks, _, _ = self.keys_LKBPH.shape
        return (
            torch.arange(num_kv_heads, device=blocks.device)[:, None] * num_blocks + blocks
        ).flatten()

    @property
    def num_bytes(self) -> int:
        return self.keys_LKBPH.nbytes + self.values_LKBPH.nbytes


def _shape(
    config: ModelConfig, num_layers: int, num_blocks: int, block_size: int
) -> tuple[int, ...]:
    """[L, K, B, P, H], of keys and of values."""
    return (num_layers, config.num_kv_heads, num_blocks, block_size, config.head_dim)


def write(k_TKH: Tensor, v_TKH: Tensor, pool: PoolLayer, slots_T: Tensor) -> None:
    for new_TKH, pool_KBPH in zip((k_TKH, v_TKH), pool, strict=True):
        new_KTH = new_TKH[: len(slots_T)].transpose(0, 1).to(pool_KBPH.dtype)
        pool_KBPH.flatten(1, 2).index_copy_(1, slots_T, new_KTH)


def clear(pool: PoolLayer, blocks: Tensor) -> None:
    """What an earlier owner left behind: a weight of 0 does not silence its NaN or infinity."""
    if len(blocks):
        for side_KBPH in pool:
            side_KBPH.index_fill_(1, blocks, 0)
