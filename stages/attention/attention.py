"""Causal attention of a microbatch over the paged KV pool: the signature, and the definition.

`prepare` does once what all layers share. In each layer the pool has the microbatch's own K and V
before the object is called, so a chunk may read blocks that an earlier chunk of the same microbatch
fills. How a layer scores its keys is its `Scoring`.

Suffixes: T rows (the microbatch's tokens, then rows of padding), N query heads, K kv heads, H head
size, C context positions.
"""

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor

from pipeserve.stages.attention.inputs import StageInputs
from pipeserve.stages.attention.kv import KVCache, PoolLayer
from pipeserve.stages.attention.scoring import Scoring, alibi_bias


class Attention(Protocol):
    def prepare(self, inputs: StageInputs, kv: KVCache, windows: Collection[int | None]) -> object:
        """What the layers of this microbatch share; `windows` are those of the layers' scoring."""
        ...

    def __call__(self, q_TNH: Tensor, pool: PoolLayer, plan: object, scoring: Scoring) -> Tensor:
        """[T, N, H]; what is returned for rows of padding is of no use."""
        ...


class ReferenceAttention:
    """Position by position as the definition reads, in float32. For tests."""

    def prepare(
        self, inputs: StageInputs, kv: KVCache, windows: Collection[int | None]
    ) -> StageInputs:
        return inputs

    def __call__(
        self, q_TNH: Tensor, pool: PoolLayer, plan: StageInputs, scoring: Scoring
    ) -> Tensor:
        out_TNH = torch.zeros_like(q_TNH)
        group = q_TNH.shape[1] // len(pool[0])
        row = 0
        for chunk in plan.chunks:
            k_CKH, v_CKH = (
                side[:, chunk.blocks].flatten(1, 2).transpose(0, 1).float() for side in pool
            )
            for stop in range(chunk.start + 1, chunk.stop + 1):
                seen = slice(0 if scoring.window is None else max(0, stop - scoring.window), stop)
                for head in range(q_TNH.shape[1]):
                    keys, values = k_CKH[seen, head // group], v_CKH[seen, head // group]
                    scores = keys @ q_TNH[row, head].float() * scoring.scale
                    if scoring.softcap is not None:
                        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
                    if scoring.slopes_N is not None:
                        scores = scores + alibi_bias(scoring, stop, scores.device)[head, seen]
                    out_TNH[row, head] = (torch.softmax(scores, 0) @ values).to(q_TNH.dtype)
                row += 1
        return out_TNH
