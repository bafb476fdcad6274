"""The ranks of a stage as one process group: how they meet, part, and meet anew.

Each stage is a world of its own to torch.distributed and to megatron-core's `parallel_state`, so
that what befalls one stage is no other's business. gloo on CPU, NCCL on GPUs. Importing this takes
seconds of CPU time.

A process inside a gloo operation is freed by nothing but the end of a connection of its peer's. So
a rank that has lost one of the others, or is told that the epoch is over, closes its own (`part`),
which frees those that wait for it, who do the same.
"""

import socket
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from pipeserve.errors import ConfigError
from pipeserve.stages.tensor_parallel.megatron import parallel_state
from pipeserve.stages.tensor_parallel.shard import Shard

_TIMEOUT = timedelta(seconds=60)
"""For the others to come. They import the same, and are there about as soon."""


def meet(
    shard: Shard,
    host: str,
    port: int,
    device: torch.device,
    listener: socket.socket | None,
    ways: Mapping[str, str],
) -> ProcessGroup:
    """With the others, at that address, where the first rank listens by `listener`, which is closed
    when they part. `ways`: what has to be the same on all of them, by what it is called.

    Raises RuntimeError where one does not come, and ConfigError where one has other ways.
    """
    store = dist.TCPStore(
        host,
        port,
        shard.of,
        is_master=listener is not None,
        timeout=_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=None if listener is None else listener.detach(),
    )
    _compare(ways, shard, store)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=_TIMEOUT,  # else half an hour; sums are of another group
        store=store,
        rank=shard.number,
        world_size=shard.of,
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=shard.of, create_gloo_process_groups=False
    )
    return parallel_state.get_tensor_model_parallel_group()


def _compare(ways: Mapping[str, str], shard: Shard, store: dist.Store) -> None:
    """With the first rank's: parts of other shapes would be added up to nonsense, or not at all."""
    for name, own in ways.items():
        if shard.number == 0:
            store.set(name, own)
            continue
        first = store.get(name).decode()
        if first != own:
            raise ConfigError(
                f"it {name} {own}, and the first rank of its stage {name} {first}; give all ranks "
                "of a stage the same threads, kernels and model (--attention cpu does without "
                "kernels)"
            )


def part() -> None:
    """From the others, who wait for nothing any more."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def is_of_peers(error: RuntimeError) -> bool:
    """Whether that is what comes of the loss of another rank."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
