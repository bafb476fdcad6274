"""The fast attention on CPU: matrix products over gathered blocks of few distinct shapes.

Suffixes: T rows (the microbatch's tokens, then rows of padding), N query heads, K kv heads,
G = N / K, H head size, C context positions, D single-query chunks in a group, B blocks,
P positions in a block.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeserve.stages.attention.inputs import StageInputs
from pipeserve.stages.attention.kv import KVCache, PoolLayer
from pipeserve.stages.attention.scoring import Scoring, alibi_bias, products

_QUERY_BLOCK = 64  # few enough to skip what causality hides, enough to multiply well
_CONTEXT_UNIT = 64
_DECODE_GROUP = 8  # a third less time than 24 at once over 450 positions; 4 or 12 do no better
_LATER = torch.ones(_QUERY_BLOCK, _QUERY_BLOCK + _CONTEXT_UNIT, dtype=torch.bool).triu_(1)
"""Whether position j after a query block's first query comes after its query i: [i, j]."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A chunk and the part of its context that a window leaves it: whole blocks."""

    start_row: int
    query_len: int
    context_len: int
    """Positions of `blocks`, up to and with the last query's."""
    blocks: Tensor


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Chunks of one query whose contexts are of like length, padded to the longest."""

    rows_D: Tensor
    pool_rows: Tensor
    """Of the block tables one after the other, each padded to the longest (`_pad_blocks`)."""
    bias_D1C: Tensor
    """0 where the query sees the position, -inf elsewhere."""


@dataclass(frozen=True, slots=True)
class _Prefill:
    """One chunk of several queries."""

    start_row: int
    query_len: int
    context_len: int
    pool_rows: Tensor


@dataclass(frozen=True, slots=True)
class _View:
    """The microbatch as layers of one window see it."""

    decodes: tuple[_Decodes, ...]
    prefills: tuple[_Prefill, ...]


class BlockedAttention:
    """Matrix products over gathered blocks: scores and softmax in float32, weighted values in the
    pool's dtype. A stage of SmolLM2 takes 10 to 20 % longer so than with scores in bf16, which lose
    what the softmax needs where keys have much in common (`products`). Beside the pool, 2,048
    queries of 32 heads over 30,000 positions take 1.0 GiB and 11.5 s of two threads, where they
    took 0.64 and 8.1 with scores in bf16.

    A first version, without the padding below, on one core against scaled_dot_product_attention,
    9 heads of 64 over 3 kv heads, in warm caches: a 480-token prompt 3.5 ms (bf16) and 4.4 (fp32)
    against 7.3 and 6.6; 16 decodes over 304 positions 0.4 and 0.7 against 0.9 and 0.9.

    Every product has one of few shapes, because oneDNN compiles a kernel for each: about 1 ms and
    0.7 MB a shape. So queries are padded to blocks of 64, contexts to multiples of 64 positions and
    single queries to powers of two.
    """

    def prepare(
        self, inputs: StageInputs, kv: KVCache, windows: Collection[int | None]
    ) -> Mapping[int | None, _View]:
        """By window."""
        return {window: _view(inputs, kv, window) for window in windows}

    def __call__(
        self,
        q_TNH: Tensor,
        pool: PoolLayer,
        plan: Mapping[int | None, _View],
        scoring: Scoring,
    ) -> Tensor:
        num_tokens, num_heads, head_dim = q_TNH.shape
        num_kv_heads = len(pool[0])
        q_TNH = q_TNH.float() * scoring.scale
        q_TKGH = q_TNH.unflatten(1, (num_kv_heads, -1))
        out_TKGH = torch.zeros_like(q_TKGH, dtype=pool[0].dtype)
        view = plan[scoring.window]
        for decodes in view.decodes:
            out_TKGH[decodes.rows_D] = _decode(q_TKGH[decodes.rows_D], pool, decodes, scoring)
        for prefill in view.prefills:
            rows = slice(prefill.start_row, prefill.start_row + prefill.query_len)
            out_TKGH[rows] = _prefill(q_TKGH[rows], pool, prefill, scoring)
        return out_TKGH.view(num_tokens, num_heads, head_dim)


def _view(inputs: StageInputs, kv: KVCache, window: int | None) -> _View:
    singles, prefills = [], []
    row = 0
    for start, stop, blocks, _ in inputs.chunks:
        query_len = stop - start
        first_seen = 0 if window is None else max(0, start + 1 - window)
        unseen_blocks = first_seen // kv.block_size
        seen_blocks = torch.tensor(blocks[unseen_blocks:])
        chunk = _Chunk(row, query_len, stop - unseen_blocks * kv.block_size, seen_blocks)
        if query_len == 1:
            singles.append(chunk)
        else:
            pool_rows = kv.rows_of(_pad_blocks([chunk.blocks], kv.block_size)[0])
            prefills.append(_Prefill(row, query_len, chunk.context_len, pool_rows))
        row += query_len
    groups = tuple(_group(group, kv, window) for group in _of_like_length(singles))
    return _View(groups, tuple(prefills))


def _prefill(q_TKGH: Tensor, pool: PoolLayer, prefill: _Prefill, scoring: Scoring) -> Tensor:
    """Queries a block at a time, each block over the keys that its queries see."""
    num_queries, num_kv_heads, group, head_dim = q_TKGH.shape
    num_padded = _round_up(num_queries, _QUERY_BLOCK)
    q_KGTH = F.pad(q_TKGH.permute(1, 2, 0, 3), (0, 0, 0, num_padded - num_queries))
    k_KCH, v_KCH = _gather(pool, prefill.pool_rows, (num_kv_heads, -1, head_dim))
    out_KGTH = torch.empty_like(q_KGTH, dtype=v_KCH.dtype)
    prefix = prefill.context_len - num_queries
    _let_keys_tell(k_KCH[:, prefix:], v_KCH[:, prefix:])
    k_KCH = k_KCH.float()  # once, and not for each block of queries
    for start in range(0, num_padded, _QUERY_BLOCK):
        rows = slice(start, start + _QUERY_BLOCK)
        seen = _seen(prefix + start, k_KCH.shape[1], scoring.window)
        q = q_KGTH[:, :, rows].reshape(num_kv_heads, -1, head_dim)
        scores = products(q, k_KCH[:, seen])
        scores_KGTC = scores.view(num_kv_heads, group, _QUERY_BLOCK, -1)
        scores_KGTC = _adjusted(scores_KGTC, scoring, seen)
        _hide(scores_KGTC, prefix + start - seen.start, scoring.window)
        weights = torch.softmax(scores_KGTC.view(scores.shape), -1).to(v_KCH.dtype)
        out = torch.bmm(weights, v_KCH[:, seen])
        out_KGTH[:, :, rows] = out.view(num_kv_heads, group, _QUERY_BLOCK, head_dim)
    return out_KGTH[:, :, :num_queries].permute(2, 0, 1, 3)


def _let_keys_tell(k_KCH: Tensor, v_KCH: Tensor) -> None:
    """Of positions whose values are not finite. To the queries ahead of them they are hidden by a
    weight of 0, which does not silence a value, while the score of a key is masked: values of 0 and
    keys of NaN reach those alone that see them. So all that comes before such a token is as if it
    had not come, and its blocks may be shared."""
    if v_KCH.sum(dtype=torch.float32).isfinite():  # mostly, and cheaper than to look at each
        return
    is_wrong_C1 = ~v_KCH.isfinite().all(-1).all(0)[:, None]
    k_KCH.masked_fill_(is_wrong_C1, torch.nan)
    v_KCH.masked_fill_(is_wrong_C1, 0)


def _seen(first_query: int, num_positions: int, window: int | None) -> slice:
    """Positions that a block of queries sees at most, in whole units."""
    start = 0 if window is None else max(0, first_query + 1 - window)
    stop = min(_round_up(first_query + _QUERY_BLOCK, _CONTEXT_UNIT), num_positions)
    return slice(start // _CONTEXT_UNIT * _CONTEXT_UNIT, stop)


def _hide(scores_KGTC: Tensor, first_query: int, window: int | None) -> None:
    """From each query of a block what comes after it, and what its window has left behind.

    `first_query`: where the block's first query lies along C.
    """
    own = scores_KGTC.shape[-1] - first_query
    scores_KGTC[..., -own:].masked_fill_(_LATER[:, :own], -torch.inf)
    if window is not None:
        oldest = first_query - window + 1 + torch.arange(_QUERY_BLOCK)[:, None]
        num_edge = max(0, min(int(oldest[-1]), scores_KGTC.shape[-1]))
        scores_KGTC[..., :num_edge].masked_fill_(torch.arange(num_edge) < oldest, -torch.inf)


def _adjusted(scores: Tensor, scoring: Scoring, seen: slice) -> Tensor:
    """`scores` [K, G, any, C] over the positions `seen`, with soft cap and ALiBi: where there is
    one, a copy."""
    if scoring.softcap is not None:
        scores = (scores / scoring.softcap).tanh_().mul_(scoring.softcap)
    if scoring.slopes_N is not None:
        bias_NC = alibi_bias(scoring, seen.stop, scores.device)[:, seen]
        scores = scores + bias_NC.view(*scores.shape[:2], 1, -1)
    return scores


def _decode(q_DKGH: Tensor, pool: PoolLayer, decodes: _Decodes, scoring: Scoring) -> Tensor:
    """All decodes of a group in two batched products. Returns [D, K, G, H]."""
    num_decodes, num_kv_heads, group, head_dim = q_DKGH.shape
    flat = (num_kv_heads * num_decodes, -1, head_dim)
    k, v = _gather(pool, decodes.pool_rows, flat)
    q = q_DKGH.transpose(0, 1).reshape(flat)
    scores = products(q, k)
    scores_KDGC = scores.view(num_kv_heads, num_decodes, group, -1)
    by_head = scores_KDGC.transpose(1, 2)  # [K, G, D, C]
    scores_KDGC = _adjusted(by_head, scoring, slice(0, scores.shape[-1])).transpose(1, 2)
    scores_KDGC.add_(decodes.bias_D1C)
    weights = torch.softmax(scores_KDGC.reshape(scores.shape), -1).to(v.dtype)
    out = torch.bmm(weights, v)
    return out.view(num_kv_heads, num_decodes, group, head_dim).transpose(0, 1)


def _gather(pool: PoolLayer, rows: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """K and V of the blocks behind `rows`, as `shape`. Along dim 0 this copies whole blocks."""
    keys, values = (side.flatten(2).flatten(0, 1).index_select(0, rows) for side in pool)
    return keys.view(shape), values.view(shape)


def _of_like_length(singles: list[_Chunk]) -> list[list[_Chunk]]:
    """Groups of like contexts, to pad little; of few, for their gathered keys to stay in cache."""
    by_length = sorted(singles, key=lambda s: -len(s.blocks))
    return [by_length[i : i + _DECODE_GROUP] for i in range(0, len(by_length), _DECODE_GROUP)]


def _group(singles: list[_Chunk], kv: KVCache, window: int | None) -> _Decodes:
    """The last stands in for what is missing to a power of two: the same result, written again."""
    missing = (1 << (len(singles) - 1).bit_length()) - len(singles)
    singles = singles + singles[-1:] * missing
    blocks_DB = _pad_blocks([single.blocks for single in singles], kv.block_size)
    positions_C = torch.arange(blocks_DB.shape[1] * kv.block_size)
    contexts_D1 = torch.tensor([single.context_len for single in singles])[:, None]
    is_hidden_DC = positions_C >= contexts_D1
    if window is not None:
        is_hidden_DC |= positions_C < contexts_D1 - window
    bias_DC = torch.zeros(is_hidden_DC.shape)
    bias_DC.masked_fill_(is_hidden_DC, -torch.inf)
    return _Decodes(
        rows_D=torch.tensor([single.start_row for single in singles]),
        pool_rows=kv.rows_of(blocks_DB.flatten()),
        bias_D1C=bias_DC[:, None],
    )


def _pad_blocks(tables: list[Tensor], block_size: int) -> Tensor:
    """[len(tables), B], each filled up with its own first block.

    So no other request's numbers are ever read: the mask gives them a weight of 0, which would not
    silence a NaN.
    """
    width = _round_up(max(map(len, tables)), max(1, _CONTEXT_UNIT // block_size))
    return torch.stack([torch.cat((t, t[:1].expand(width - len(t)))) for t in tables])


def _round_up(number: int, unit: int) -> int:
    return math.ceil(number / unit) * unit
