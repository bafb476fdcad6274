"""Causal attention of a microbatch over the paged KV pool: one signature, three implementations.

`prepare` does once what all layers share; calling the object writes the microbatch's K and V into
the pool and then attends, so a chunk may read blocks that an earlier chunk of the same microbatch
fills. How a layer scores its keys is its `Scoring`.

Suffixes: T rows (the microbatch's tokens, then rows of padding), N query heads, K kv heads, H head
size, C context positions.
"""

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor

from pipeserve.errors import ConfigError
from pipeserve.stages.attention.blocked_attention import BlockedAttention
from pipeserve.stages.attention.inputs import StageInputs
from pipeserve.stages.attention.kernel_attention import KernelAttention
from pipeserve.stages.attention.kv import KVCache, PoolLayer, write
from pipeserve.stages.attention.scoring import Scoring, alibi_bias


class Attention(Protocol):
    def prepare(self, inputs: StageInputs, kv: KVCache, windows: Collection[int | None]) -> object:
        """What the layers of this microbatch share; `windows` are those of the layers' scoring."""
        ...

    def __call__(
        self,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        pool: PoolLayer,
        plan: object,
        scoring: Scoring,
    ) -> Tensor:
        """Writes k and v into `pool`; returns [T, N, H]. Rows of padding are not written, and what
        is returned for them is of no use."""
        ...


def make_attention(name: str) -> Attention:
    """ "auto" and "cpu": the fast one in PyTorch; "kernels": the C kernels, where there are
    any; "reference": the plain one."""
    if name in ("auto", "cpu"):
        return BlockedAttention()
    if name == "kernels":
        return KernelAttention()
    if name == "reference":
        return ReferenceAttention()
    raise ConfigError(f"attention {name!r} is not one of auto, cpu, kernels, reference")


class ReferenceAttention:
    """Position by position as the definition reads, in float32. For tests."""

    def prepare(
        self, inputs: StageInputs, kv: KVCache, windows: Collection[int | None]
    ) -> StageInputs:
        return inputs

    def __call__(
        self,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        pool: PoolLayer,
        plan: StageInputs,
        scoring: Scoring,
    ) -> Tensor:
        write(k_TKH, v_TKH, pool, plan.slots_T)
        out_TNH = torch.zeros_like(q_TNH)
        group = q_TNH.shape[1] // k_TKH.shape[1]
        row = 0
        for query_len, context_len, blocks in zip(
            plan.query_lens, plan.context_lens, plan.block_tables, strict=True
        ):
            k_CKH, v_CKH = (side[:, blocks].flatten(1, 2).transpose(0, 1).float() for side in pool)
            for stop in range(context_len - query_len + 1, context_len + 1):
                seen = slice(0 if scoring.window is None else max(0, stop - scoring.window), stop)
                for head in range(q_TNH.shape[1]):
                    keys, values = k_CKH[seen, head // group], v_CKH[seen, head // group]
                    scores = keys @ q_TNH[row, head].float() * scoring.scale
                    if scoring.softcap is not None:
                        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
                    if scoring.slopes_N is not None:
                        scores = scores + alibi_bias(scoring, stop)[head, seen]
                    out_TNH[row, head] = (torch.softmax(scores, 0) @ values).to(q_TNH.dtype)
                row += 1
        return out_TNH
