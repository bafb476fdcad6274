"""Attention by the C kernels (kernels/attention.c), which read the pool where it lies.

Suffixes: T rows (the microbatch's tokens, then rows of padding), N query heads, K kv heads, H head
size, P positions in a block.
"""

import ctypes
from array import array
from collections.abc import Collection
from ctypes import byref, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import lru_cache

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
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("queries", c_void_p),
        ("tables", c_void_p),
        ("num_queries", c_int64),
        ("num_together", c_int64),
    )


@dataclass(frozen=True, slots=True)
class Plan:
    inputs: StageInputs
    """Of which it is; their numbers are read where they lie."""
    queries: array
    """int32, of each piece of a chunk: row, number of queries, position, where the block table
    begins."""
    tables: array
    """int32: the block tables one after the other."""
    num_together: int
    """Rows that are worked on together, at most."""
    batch: object
    """All of it, as halves of layers are told of it."""


class KernelAttention:
    """In float32, whatever the pool's dtype is. A row's result is a matter of its own context: bit
    for bit the same in any batch, and however its prompt was cut into chunks.

    The pool should be `turned`, in blocks of a multiple of 16 positions: others are copied a tile
    at a time, number by number. What lies in a block behind a request's last position is never
    multiplied, so blocks need not be cleared before they are used again.
    """

    def prepare(self, inputs: StageInputs, kv: KVCache, windows: Collection[int | None]) -> Plan:
        most = max(1, _ROWS // kv.heads_per_kv_head)
        num_together = max(most, kv.num_kv_heads) * kv.heads_per_kv_head
        queries, tables, row = array("i"), array("i"), 0
        for start, stop, blocks, _ in inputs.chunks:
            for first in range(start, stop, most):
                of_piece = row + first - start, min(most, stop - first), first, len(tables)
                queries.extend(of_piece)
            row += stop - start
            tables.extend(blocks)
        batch = _Batch(
            row,
            _address(inputs.positions),
            _address(inputs.slots),
            _address(queries),
            _address(tables),
            len(queries) // 4,
            num_together,
        )
        return Plan(inputs, queries, tables, num_together, byref(batch))

    def __call__(self, q_TNH: Tensor, pool: PoolLayer, plan: Plan, scoring: Scoring) -> Tensor:
        """Returns float32."""
        q_TNH = _with_whole_rows(q_TNH)
        out_TNH = torch.empty(q_TNH.shape)
        out_TNH[plan.inputs.num_tokens :] = 0
        kernels().attend(
            byref(pool_of(pool)),
            byref(scoring_of(scoring)),
            q_TNH.data_ptr(),
            q_TNH.stride(0),
            out_TNH.data_ptr(),
            q_TNH.shape[1],
            _address(plan.queries),
            _address(plan.tables),
            0,
            len(plan.queries) // 4,
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


def _address(numbers: array) -> int:
    return numbers.buffer_info()[0]


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
