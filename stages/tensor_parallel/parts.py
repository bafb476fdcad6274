"""Activations that cross to another machine once, and not once for each rank of a stage: each sends
its part of them, and the ranks of the next stage, which are near to each other, put them together.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from pipeserve.stages.tensor_parallel.shard import Shard

WORTH_BYTES = 1 << 20
"""Of activations: less goes whole. Two ranks, 1 Gbit/s, two busy cores (bench/activation_parts.py,
November 2026): 4 MiB take 71 ms whole and 46 in parts, 128 KiB take 3 and 12, for putting them
together is one more wait for all ranks."""


def part_of(whole: Tensor, shard: Shard) -> Tensor:
    """Numbers side by side, as many on each rank: the last is filled up with zeros."""
    size = size_of_part(whole.numel(), shard)
    own = whole.flatten()[shard.number * size : (shard.number + 1) * size]
    return F.pad(own, (0, size - len(own)))


def size_of_part(num_numbers: int, shard: Shard) -> int:
    return shard.padded(num_numbers) // shard.of


def joined(part: Tensor, shape: tuple[int, ...], shard: Shard, group: ProcessGroup) -> Tensor:
    """Of all ranks' parts the whole, of that shape, on each of them."""
    parts_S = part.new_empty((shard.of, len(part)))
    own, others_S = part.view(torch.uint8), parts_S.view(torch.uint8)
    dist.all_gather(list(others_S), own, group=group)
    num_numbers = torch.Size(shape).numel()
    return parts_S.flatten()[:num_numbers].view(shape)
