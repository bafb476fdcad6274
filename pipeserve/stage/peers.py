"""The ranks that share a stage, as one of them sees the others, whom it meets anew in each epoch.

A stage of one rank meets nobody, and megatron-core is not imported.
"""

import hashlib
import math
import os
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeserve.addresses import join_address, split_address
from pipeserve.core.work import PartSeconds, Work
from pipeserve.stages.stage import Stage
from pipeserve.stages.tensor_parallel.shard import Shard
from pipeserve.wire.interfaces import interface_of
from pipeserve.wire.stage_job import StartStage

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup

    from pipeserve.stages.tensor_parallel.sums import Sums

_LOOK_UPS = "timeout:1 attempts:1"
"""Of names, which torch does for its log alone: where nobody answers, all ranks would wait for 10 s
(pytorch#159007)."""
_OTHERS_FIRST_S = 3.0
"""If one of them has died, that is told meanwhile, and this one is ended."""


class Peers:
    """Of one rank."""

    def __init__(self, job: StartStage) -> None:
        self.shard = Shard(job.shard, job.num_shards)
        self._host = job.host
        self._listener: socket.socket | None = None
        self._group: ProcessGroup | None = None
        self._sharing: list[nn.Module] = []
        """What exchanges something by that group."""
        self._sums: Sums | None = None

    def meets_at(self) -> str:
        """Where the first of them waits for the others next; empty of the others."""
        if self.shard.of == 1 or self.shard.number > 0:
            return ""
        if self._listener is None:
            family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
            self._listener = socket.create_server((self._host, 0), family=family)
        return join_address(*self._listener.getsockname()[:2])

    def meet(self, address: str, stage: Stage) -> None:
        """At that address, all of them. Raises ConnectionError where one does not come, and
        ConfigError where one computes in another way, whose parts would not fit this one's."""
        from pipeserve.stages.tensor_parallel import group

        self._choose_interface()
        os.environ.setdefault("RES_OPTIONS", _LOOK_UPS)
        listener, self._listener = self._listener, None
        host, port = split_address(address)
        ways = _ways_of(stage)
        try:
            met = group.meet(self.shard, host, port, stage.backend.device, listener, ways)
        except RuntimeError as error:
            group.part()
            time.sleep(_OTHERS_FIRST_S)
            reason = str(error).partition("\n")[0]
            raise ConnectionError(
                f"the ranks that share its stage, at {address}: {reason}"
            ) from None
        self._exchange_by(met)

    def _exchange_by(self, met: "ProcessGroup | None") -> None:
        """All that exchanges something does so by that group, and holds no other: gloo ends its
        connections when nobody holds a group any more, and not before (pytorch#96017)."""
        from pipeserve.stages.tensor_parallel import layers

        self._group = met
        layers.regroup(self._sharing, met)
        if self._sums is not None:
            self._sums.meet(met)

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
            from pipeserve.stages.tensor_parallel.sums import Sums

            sums = Sums(self._group)
            self._sharing = layers.wrap(stage, self.shard, self._group, sums)
            if stage.backend.device.type == "cpu":
                self._sums = sums

    def sums_of(self, num_tokens: int) -> tuple[float, float]:
        """Seconds of the sums of a microbatch of so many, through whose layers this rank came last;
        and those that it waited for others there. 0 where that is not known."""
        return (0.0, 0.0) if self._sums is None else self._sums.of_microbatch(num_tokens)

    def with_sums(
        self, timed: Sequence[PartSeconds], works: Sequence[Work], stage: Stage
    ) -> tuple[PartSeconds, ...]:
        """What each part of a model takes this rank for these microbatches, and the sums over all
        ranks with it, where it has met them, who ask the same now. Waiting for each other is left
        out."""
        if self._group is None:
            return tuple(timed)
        num_in_layer = 1 if stage.config.parallel_attention else 2
        found = []
        for parts, work in zip(timed, works, strict=True):
            sum_s = self._time_sum((work.num_tokens, stage.config.hidden_size), stage)
            in_layer_s = sum_s * num_in_layer
            found.append(
                parts._replace(
                    layers=tuple(layer_s + in_layer_s for layer_s in parts.layers),
                    embedding=parts.embedding and parts.embedding + sum_s,
                    all_reduce=in_layer_s,
                )
            )
        return tuple(found)

    def _time_sum(self, shape: tuple[int, int], stage: Stage) -> float:
        from pipeserve.stages.tensor_parallel.sums import time_sum

        try:
            return time_sum(shape, stage.backend.device, self._group)
        except RuntimeError as error:
            if self.are_lost(error):
                time.sleep(_OTHERS_FIRST_S)
            raise

    def part_of(self, hidden_TD: "Tensor") -> "Tensor":
        """What this one sends of it, where each sends a part."""
        from pipeserve.stages.tensor_parallel import parts

        if self.size_of_part(hidden_TD.shape, hidden_TD.dtype) is None:
            return hidden_TD
        return parts.part_of(hidden_TD, self.shard)

    def size_of_part(self, shape: tuple[int, ...], dtype: "torch.dtype") -> int | None:
        """Numbers in it; None where all of a tensor of that shape is sent, which is known to both
        ends."""
        from pipeserve.stages.tensor_parallel import parts

        num_numbers = math.prod(shape)
        is_worth_it = num_numbers * dtype.itemsize >= parts.WORTH_BYTES
        return parts.size_of_part(num_numbers, self.shard) if is_worth_it else None

    def joined(self, part: "Tensor", shape: tuple[int, ...]) -> "Tensor":
        """The whole, of what each has got."""
        from pipeserve.stages.tensor_parallel import parts

        return parts.joined(part, shape, self.shard, self._group)

    def part(self) -> None:
        """From them: who waits for this one, waits no more."""
        if self._group is not None:
            from pipeserve.stages.tensor_parallel import group

            self._exchange_by(None)
            group.part()

    def are_lost(self, error: RuntimeError) -> bool:
        """Whether that is why this was raised."""
        if self._group is None:
            return False
        from pipeserve.stages.tensor_parallel import group

        return group.is_of_peers(error)


def _ways_of(stage: Stage) -> dict[str, str]:
    """What has to be the same on all ranks that share it, by what it is called."""
    digest = hashlib.sha256(repr(stage.config).encode()).hexdigest()[:12]
    return {"computes by": type(stage.backend).__name__, "has a model of the digest": digest}
