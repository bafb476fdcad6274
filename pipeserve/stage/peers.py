"""The ranks that share a stage, as one of them sees the others, whom it meets anew in each epoch.

A stage of one rank meets nobody, and megatron-core is not imported.
"""

import os
import socket
import warnings
from typing import TYPE_CHECKING

from pipeserve.addresses import join_address, split_address
from pipeserve.stages.stage import Stage
from pipeserve.stages.tensor_parallel.shard import Shard
from pipeserve.wire.control import StartStage
from pipeserve.wire.interfaces import interface_of

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed import ProcessGroup


class Peers:
    """Of one rank."""

    def __init__(self, job: StartStage) -> None:
        self.shard = Shard(job.shard, job.num_shards)
        self._host = job.host
        self._listener: socket.socket | None = None
        self._group: ProcessGroup | None = None
        self._sharing: list[nn.Module] = []
        """What exchanges something by that group."""

    def meets_at(self) -> str:
        """Where the first of them waits for the others next; empty of the others."""
        if self.shard.of == 1 or self.shard.number > 0:
            return ""
        if self._listener is None:
            family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
            self._listener = socket.create_server((self._host, 0), family=family)
        return join_address(*self._listener.getsockname()[:2])

    def meet(self, address: str, stage: Stage) -> bool:
        """At that address, all of them; False where one does not come."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it could use and is not there
            from pipeserve.stages.tensor_parallel import group, layers

        self._choose_interface()
        listener, self._listener = self._listener, None
        device = stage.backend.device
        try:
            self._group = group.meet(self.shard, *split_address(address), device, listener)
        except RuntimeError:
            group.part()
            return False
        layers.regroup(self._sharing, self._group)
        return True

    def _choose_interface(self) -> None:
        """That by which this stage is reached, where the user chose none. gloo would take what the
        machine's name stands for: often 127.0.0.1, which other machines take for themselves
        (aws-do-eks#69, vllm#7074), or an address that the whole network reaches."""
        name = interface_of(self._host)
        if name is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)

    def share(self, stage: Stage) -> None:
        """From now on its layers exchange what they compute with those of the others."""
        if self._group is not None:
            from pipeserve.stages.tensor_parallel import layers

            self._sharing = layers.wrap(stage, self.shard, self._group)

    def part(self) -> None:
        """From them: who waits for this one, waits no more."""
        if self._group is not None:
            from pipeserve.stages.tensor_parallel import group, layers

            self._group = None
            layers.regroup(self._sharing, None)
            group.part()

    def are_lost(self, error: RuntimeError) -> bool:
        """Whether that is why this was raised."""
        if self._group is None:
            return False
        from pipeserve.stages.tensor_parallel import group

        return group.is_of_peers(error)
