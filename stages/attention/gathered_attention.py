"""Attention in plain PyTorch on any device: keys are gathered, then multiplied whole.

Suffixes: T rows (the microbatch's tokens, then rows of padding), N query heads, K kv heads,
G = N / K, H head size, S chunks of a batch, Q queries of each, C context positions, B blocks.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeserve.stages.attention.inputs import StageInputs
from pipeserve.stages.attention.kv import KVCache, PoolLayer
from pipeserve.stages.attention.scoring import Scoring, alibi_bias, products

_MOST_QUERIES = 256  # of a chunk at a time: bounds the scores, float32 [N, Q, C]
_MOST_SINGLES = 32  # at a time, and of like contexts: bounds the keys that are gathered


@dataclass(frozen=True, slots=True)
class _Batch:
    """What is computed at once: several chunks of one query, or a piece of one that has more."""

    rows_SQ: Tensor
    """Of the queries along T."""
    last_SQ: Tensor
    """The last position that each query sees, which is its own."""
    blocks_SB: Tensor
    """Of each chunk's context, padded to the longest with its own first: no other request's numbers
    are ever read."""


class GatheredAttention:
    """Scores and softmax in float32, weighted values in the pool's dtype."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def prepare(
        self, inputs: StageInputs, kv: KVCache, windows: Collection[int | None]
    ) -> list[_Batch]:
        return [
            _Batch(*(torch.tensor(each, dtype=torch.int64).to(self.device) for each in batch))
            for batch in _batches(inputs, kv.block_size)
        ]

    def __call__(
        self, q_TNH: Tensor, pool: PoolLayer, plan: list[_Batch], scoring: Scoring
    ) -> Tensor:
        q_TNH = q_TNH.float() * scoring.scale
        out_TNH = torch.zeros_like(q_TNH, dtype=pool[0].dtype)
        for batch in plan:
            out_TNH[batch.rows_SQ] = _attend(q_TNH[batch.rows_SQ], pool, batch, scoring)
        return out_TNH


def _batches(
    inputs: StageInputs, block_size: int
) -> Iterator[tuple[Sequence[Sequence[int]], Sequence[Sequence[int]], Sequence[Sequence[int]]]]:
    """Fields of a `_Batch` each, in plain numbers: they are made on the host."""
    singles: list[tuple[int, int, list[int]]] = []
    row = 0
    for first, end, table, _ in inputs.chunks:
        if end - first == 1:
            singles.append((first, row, table))
        else:
            for start in range(first, end, _MOST_QUERIES):
                stop = min(start + _MOST_QUERIES, end)
                rows = range(row + start - first, row + stop - first)
                yield [rows], [range(start, stop)], [table[: -(-stop // block_size)]]
        row += end - first
    singles.sort()
    for start in range(0, len(singles), _MOST_SINGLES):
        lasts, rows, tables = zip(*singles[start : start + _MOST_SINGLES], strict=True)
        longest = len(tables[-1])
        padded = [table + table[:1] * (longest - len(table)) for table in tables]
        yield [(row,) for row in rows], [(last,) for last in lasts], padded


def _attend(q_SQNH: Tensor, pool: PoolLayer, batch: _Batch, scoring: Scoring) -> Tensor:
    """[S, Q, N, H]; the queries are scaled already."""
    k_KSCH, v_KSCH = (side_KBPH[:, batch.blocks_SB].flatten(2, 3) for side_KBPH in pool)
    num_kv_heads, _, num_positions, _ = k_KSCH.shape
    q_KSGQH = q_SQNH.unflatten(2, (num_kv_heads, -1)).permute(2, 0, 3, 1, 4)
    scores_KSGQC = _scores(q_KSGQH, k_KSCH, scoring)
    # A weight of 0 does not silence a value, while the score of a key is masked: so values that are
    # not finite become 0, and reach by their scores those alone that see them.
    is_wrong_SC = ~v_KSCH.isfinite().all(-1).all(0)
    v_KSCH.masked_fill_(is_wrong_SC[..., None], 0)
    scores_KSGQC.masked_fill_(is_wrong_SC[:, None, None], torch.nan)
    hidden_SQC = _hidden(batch.last_SQ[..., None], num_positions, scoring.window)
    scores_KSGQC.masked_fill_(hidden_SQC[:, None], -torch.inf)
    weights_KSGQC = torch.softmax(scores_KSGQC, -1).to(v_KSCH.dtype)
    out_KSGQH = torch.matmul(weights_KSGQC.flatten(2, 3), v_KSCH).view(q_KSGQH.shape)
    return out_KSGQH.permute(1, 3, 0, 2, 4).flatten(2, 3)


def _scores(q_KSGQH: Tensor, k_KSCH: Tensor, scoring: Scoring) -> Tensor:
    """Float32 [K, S, G, Q, C]."""
    scores = products(q_KSGQH.flatten(2, 3), k_KSCH)
    scores_KSGQC = scores.view(*q_KSGQH.shape[:-1], k_KSCH.shape[2])
    if scoring.softcap is not None:
        scores_KSGQC = (scores_KSGQC / scoring.softcap).tanh_().mul_(scoring.softcap)
    if scoring.slopes_N is not None:
        bias_NC = alibi_bias(scoring, k_KSCH.shape[2], k_KSCH.device)
        bias_KGC = bias_NC.unflatten(0, (len(k_KSCH), -1))
        scores_KSGQC = scores_KSGQC + bias_KGC[:, None, :, None]
    return scores_KSGQC


def _hidden(last_SQ1: Tensor, num_positions: int, window: int | None) -> Tensor:
    """Whether a query does not see a position: [S, Q, C]."""
    positions_C = torch.arange(num_positions, device=last_SQ1.device)
    hidden_SQC = positions_C > last_SQ1
    if window is not None:
        hidden_SQC |= positions_C <= last_SQ1 - window
    return hidden_SQC
