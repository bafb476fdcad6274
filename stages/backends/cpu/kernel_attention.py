"""Attention by the C kernels (kernels/attention.c), which read the pool where it lies.

Suffixes: T rows (the microbatch's tokens, then rows of padding), N query heads, K kv heads, H head
size, P positions in a block, I items' queries.
"""

import ctypes
from collections.abc import Collection
from ctypes import byref, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pipeserve.stages.attention.inputs import StageInputs
from pipeserve.stages.attention.kv import KVCache, PoolLayer
from pipeserve.stages.attention.scoring import Scoring
from pipeserve.stages.backends.cpu.library import kernels
from pipeserve.stages.backends.cpu.scratch import scratch_of
from pipeserve.stages.backends.cpu.types import KERNEL_TYPES

_ROWS = 384
"""Queries times heads that go over the keys together: a multiple of the 6 that are multiplied at
once, so many that copying keys for them costs little, few enough to stay in the second-level
cache."""
_ALL = 1 << 60
"""The window of layers that have none."""
_NO_BLOCKS = torch.empty(0, dtype=torch.int64)
"""Those of no chunk at all."""


class _Pool(ctypes.Structure):
    """As in pool.h."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("head_step", c_int64),
        ("block_step", c_int64),
        ("key_position_step", c_int64),
        ("key_dimension_step", c_int64),
        ("block_size", c_int64),
        ("num_kv_heads", c_int32),
        ("head_size", c_int32),
        ("dtype", c_int32),
    )


class _Scoring(ctypes.Structure):
    """As in calls.h."""

    _fields_ = (
        ("scale", c_float),
        ("softcap", c_float),
        ("window", c_int64),
        ("slopes", c_void_p),
    )


class _Batch(ctypes.Structure):
    """As in halves.c."""

    _fields_ = (
        ("num_rows", c_int64),
        ("slots", c_void_p),
        ("queries", c_void_p),
        ("tables", c_void_p),
        ("num_queries", c_int64),
        ("num_together", c_int64),
    )


@dataclass(frozen=True, slots=True)
class Plan:
    num_tokens: int
    queries_I4: np.ndarray
    """int32: row, number of queries, position, where the block table begins."""
    tables: np.ndarray
    """int32: the block tables one after the other."""
    num_together: int
    """Rows that are worked on together, at most."""
    batch: object
    """All of it, and where keys and values go, as halves of layers are told of it."""
    slots_T: Tensor
    """That is why it is kept."""


class KernelAttention:
    """In float32, whatever the pool's dtype is. A row's result is a matter of its own context: bit
    for bit the same in any batch, and however its prompt was cut into chunks.

    The pool should be `turned`, in blocks of a multiple of 16 positions: others are copied a tile
    at a time, number by number. What lies in a block behind a request's last position is never
    multiplied, so blocks need not be cleared before they are used again.
    """

    def prepare(self, inputs: StageInputs, kv: KVCache, windows: Collection[int | None]) -> Plan:
        most = max(1, _ROWS // kv.heads_per_kv_head)
        queries, row, table = [], 0, 0
        for query_len, context_len, blocks in zip(
            inputs.query_lens, inputs.context_lens, inputs.block_tables, strict=True
        ):
            position = context_len - query_len
            for start in range(0, query_len, most):
                count = min(most, query_len - start)
                queries.append((row + start, count, position + start, table))
            row += query_len
            table += len(blocks)
        queries_I4 = np.array(queries, np.int32)
        tables = torch.cat((*inputs.block_tables, _NO_BLOCKS)).to(torch.int32).numpy()
        num_together = max(most, kv.keys_LKBPH.shape[1]) * kv.heads_per_kv_head
        batch = _Batch(
            inputs.num_tokens,
            inputs.slots_T.data_ptr(),
            queries_I4.ctypes.data,
            tables.ctypes.data,
            len(queries_I4),
            num_together,
        )
        return Plan(
            inputs.num_tokens,
            queries_I4,
            tables,
            num_together,
            byref(batch),
            inputs.slots_T,
        )

    def __call__(self, q_TNH: Tensor, pool: PoolLayer, plan: Plan, scoring: Scoring) -> Tensor:
        """Returns float32."""
        q_TNH = _with_whole_rows(q_TNH)
        out_TNH = torch.empty(q_TNH.shape)
        out_TNH[plan.num_tokens :] = 0
        kernels().attend(
            byref(pool_of(pool)),
            byref(scoring_of(scoring)),
            q_TNH.data_ptr(),
            q_TNH.stride(0),
            out_TNH.data_ptr(),
            q_TNH.shape[1],
            plan.queries_I4.ctypes.data,
            plan.tables.ctypes.data,
            0,
            len(plan.queries_I4),
            plan.num_together,
            scratch_of(kernels().attention_scratch(plan.num_together, q_TNH.shape[2])),
        )
        return out_TNH


def write(k_TKH: Tensor, v_TKH: Tensor, pool: PoolLayer, slots_T: Tensor) -> None:
    """Into the pool, in its type. Rows behind those of `slots_T` are padding."""
    k_TKH, v_TKH = _with_whole_rows(k_TKH), _with_whole_rows(v_TKH)
    kernels().write_heads(
        k_TKH.data_ptr(),
        k_TKH.stride(0),
        v_TKH.data_ptr(),
        v_TKH.stride(0),
        len(slots_T),
        slots_T.data_ptr(),
        byref(pool_of(pool)),
    )


def _with_whole_rows(x_TAH: Tensor) -> Tensor:
    """In float32, each row's heads one behind the other; rows may lie apart."""
    x_TAH = x_TAH.float()
    _, _, head_size = x_TAH.shape
    return x_TAH if x_TAH.stride()[1:] == (head_size, 1) else x_TAH.contiguous()


def pool_of(pool: PoolLayer) -> ctypes.Structure:
    """As the kernels are told of it."""
    if pool.described is None:
        keys_KBPH, values_KBPH = pool
        num_kv_heads, _, block_size, head_size = keys_KBPH.shape
        described = _Pool(
            keys_KBPH.data_ptr(),
            values_KBPH.data_ptr(),
            *keys_KBPH.stride(),
            block_size,
            num_kv_heads,
            head_size,
            KERNEL_TYPES[keys_KBPH.dtype],
        )
        pool.described = described
    return pool.described


@lru_cache(maxsize=1024)
def scoring_of(scoring: Scoring) -> ctypes.Structure:
    """As the kernels are told of it; there is one for each layer."""
    slopes_N = scoring.slopes_N
    return _Scoring(
        scoring.scale,
        scoring.softcap or 0.0,
        scoring.window or _ALL,
        None if slopes_N is None else slopes_N.data_ptr(),
    )
