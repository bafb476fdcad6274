"""Attention by the C kernels (kernels/attention.c), which read the pool where it lies.

Suffixes: T rows (the microbatch's tokens, then rows of padding), N query heads, K kv heads, H head
size, P positions in a block, I items' queries.
"""

import ctypes
from collections.abc import Collection
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeserve.stages.attention.inputs import StageInputs
from pipeserve.stages.attention.kv import KVCache, PoolLayer
from pipeserve.stages.attention.scoring import Scoring
from pipeserve.stages.backends.cpu.library import kernels
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
    """As in attention_tile.h."""

    _fields_ = (
        ("scale", c_float),
        ("softcap", c_float),
        ("window", c_int64),
        ("slopes", c_void_p),
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    num_tokens: int
    queries_I4: np.ndarray
    """int32: row, number of queries, position, where the block table begins."""
    tables: np.ndarray
    """int32: the block tables one after the other."""
    num_rows: int
    """That are worked on together, at most."""
    scratch: Tensor


class KernelAttention:
    """In float32, whatever the pool's dtype is. A row's result is a matter of its own context: bit
    for bit the same in any batch, and however its prompt was cut into chunks.

    The pool should be `turned`, in blocks of a multiple of 16 positions: others are copied a tile
    at a time, number by number. What lies in a block behind a request's last position is never
    multiplied, so blocks need not be cleared before they are used again.
    """

    def prepare(self, inputs: StageInputs, kv: KVCache, windows: Collection[int | None]) -> _Plan:
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
        _, num_kv_heads, _, _, head_size = kv.keys_LKBPH.shape
        num_rows = max(most, num_kv_heads) * kv.heads_per_kv_head
        return _Plan(
            num_tokens=inputs.num_tokens,
            queries_I4=np.array(queries, np.int32),
            tables=torch.cat((*inputs.block_tables, _NO_BLOCKS)).to(torch.int32).numpy(),
            num_rows=num_rows,
            scratch=torch.empty(kernels().attention_scratch(num_rows, head_size)),
        )

    def __call__(self, q_TNH: Tensor, pool: PoolLayer, plan: _Plan, scoring: Scoring) -> Tensor:
        """Returns float32."""
        q_TNH = _with_whole_rows(q_TNH)
        out_TNH = torch.empty(q_TNH.shape)
        out_TNH[plan.num_tokens :] = 0
        slopes_N = scoring.slopes_N
        c_scoring = _Scoring(
            scoring.scale,
            scoring.softcap or 0.0,
            scoring.window or _ALL,
            None if slopes_N is None else slopes_N.data_ptr(),
        )
        kernels().attend(
            ctypes.byref(_pool(pool)),
            ctypes.byref(c_scoring),
            q_TNH.data_ptr(),
            q_TNH.stride(0),
            out_TNH.data_ptr(),
            q_TNH.shape[1],
            plan.queries_I4.ctypes.data,
            plan.tables.ctypes.data,
            0,
            len(plan.queries_I4),
            plan.num_rows,
            plan.scratch.data_ptr(),
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
        ctypes.byref(_pool(pool)),
    )


def _with_whole_rows(x_TAH: Tensor) -> Tensor:
    """In float32, each row's heads one behind the other; rows may lie apart."""
    x_TAH = x_TAH.float()
    _, _, head_size = x_TAH.shape
    return x_TAH if x_TAH.stride()[1:] == (head_size, 1) else x_TAH.contiguous()


def _pool(pool: PoolLayer) -> _Pool:
    keys_KBPH, values_KBPH = pool
    num_kv_heads, _, block_size, head_size = keys_KBPH.shape
    return _Pool(
        keys_KBPH.data_ptr(),
        values_KBPH.data_ptr(),
        *keys_KBPH.stride(),
        block_size,
        num_kv_heads,
        head_size,
        KERNEL_TYPES[keys_KBPH.dtype],
    )
