"""The head of a model whose vocabulary several ranks share: each makes the logits of its tokens.

All ranks ask for the same at the same time, and get the same. Where all logits are needed, they are
gathered; for the likeliest token, and for a draw among the `top_k` highest, each rank's best are
enough. (Megatron's own gather is for GPUs alone.)

Suffixes: R rows, D hidden size, V vocabulary, S ranks, O own tokens of a rank, K highest.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from pipeserve.stages.layers.ends import Head
from pipeserve.stages.tensor_parallel.shard import Shard

_NONE = -1
"""Stands for no token, among tokens."""


class VocabParallelHead(nn.Module):
    """What `Head` is, of all ranks' heads together."""

    def __init__(self, own: Head, shard: Shard, group: ProcessGroup) -> None:
        super().__init__()
        self.own, self._shard, self.tp_group = own, shard, group
        self._vocab_size = own.vocabulary.source[0].of
        self._tokens = shard.part_of_vocabulary(self._vocab_size)
        self.decides = shard.number == 0

    def forward(self, x_RD: Tensor) -> Tensor:
        """[R, D] -> [R, V] float32, on every rank."""
        logits_RO = self.own(x_RD)
        missing = self._shard.padded(self._vocab_size) // self._shard.of - len(self._tokens)
        gathered_SRO = self._gathered(F.pad(logits_RO, (0, missing), value=-torch.inf))
        return gathered_SRO.transpose(0, 1).flatten(1)[:, : self._vocab_size].contiguous()

    def likeliest(self, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        """As of `Head`: of equals the first, which is the rank's of the lowest number."""
        highest_R, token_R = self.own.likeliest(x_RD)
        highest_SR = self._gathered(highest_R)
        token_SR = self._gathered(token_R + self._tokens.start)
        highest_R, rank_R = highest_SR.max(0)
        return highest_R, token_SR.gather(0, rank_R[None])[0]

    def highest(self, x_RD: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """As of `Head`: every rank's `num` highest."""
        logits_RO = self.own(x_RD)
        most = min(num, len(self._shard_part(0)))
        own_RK, places_RK = logits_RO.topk(min(most, logits_RO.shape[1]))
        missing = most - own_RK.shape[1]
        own_RK = F.pad(own_RK, (0, missing), value=-torch.inf)
        tokens_RK = F.pad(places_RK + self._tokens.start, (0, missing), value=self._vocab_size)
        logits_RK = self._gathered(own_RK).transpose(0, 1).flatten(1)
        tokens_RK, order_RK = self._gathered(tokens_RK).transpose(0, 1).flatten(1).sort(-1)
        num_found = sum(min(most, len(self._shard_part(n))) for n in range(self._shard.of))
        logits_RK = logits_RK.gather(1, order_RK)
        return logits_RK[:, :num_found], tokens_RK[:, :num_found]

    def agreed(self, tokens: list[int | None]) -> list[int | None]:
        """Those of the first rank."""
        told = [_NONE if token is None else token for token in tokens]
        told_R = self.own.backend.place(torch.tensor(told, dtype=torch.int64))
        dist.broadcast(told_R, group=self.tp_group, group_src=0)
        return [None if token == _NONE else token for token in told_R.tolist()]

    def _shard_part(self, number: int) -> range:
        return self._shard._replace(number=number).part_of_vocabulary(self._vocab_size)

    def _gathered(self, x: Tensor) -> Tensor:
        """Of all ranks, [S, ...]."""
        x_S = x.new_empty((self._shard.of, *x.shape))
        dist.all_gather(list(x_S), x.contiguous(), group=self.tp_group)
        return x_S
