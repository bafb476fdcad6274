"""A microbatch as a stage's forward sees it: tensors, and nothing of requests.

Suffixes: T tokens of the microbatch, S chunks, R rows whose logits are wanted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ChunkSpan = tuple[int, int, list[int], int]
"""(start, stop, block table of the request up to `stop`, trailing logits wanted)."""


@dataclass(frozen=True, slots=True)
class StageInputs:
    """Everything that depends on the microbatch but not on the layer."""

    token_ids_T: Tensor | None
    """int64; on the first stage only."""
    positions_T: Tensor
    """int64 positions in each token's own request."""
    slots_T: Tensor
    """int64 slot of the KV pool that each token's K and V go to: block * block_size + offset."""
    query_lens: tuple[int, ...]
    """Tokens of each chunk; they lie one chunk after the other along T."""
    context_lens: tuple[int, ...]
    """Keys that the last query of each chunk sees, its own included."""
    block_tables: tuple[Tensor, ...]
    """int64 block ids that hold each chunk's context, in order; the last may be partly filled."""
    logit_rows_R: Tensor
    """int64 rows along T whose logits are wanted."""

    @property
    def num_tokens(self) -> int:
        return len(self.positions_T)


def build_inputs(
    spans: Sequence[ChunkSpan], block_size: int, token_ids: Sequence[list[int]] | None
) -> StageInputs:
    """Lay the chunks one after the other.

    `token_ids`: all known ids of each chunk's request (first stage), or None. Does not modify its
    arguments and keeps none of their lists.
    """
    positions, slots, tables, rows = [], [], [], []
    num_tokens = 0
    for start, stop, block_table, num_logits in spans:
        table = np.array(block_table[: -(-stop // block_size)], dtype=np.int64)
        where = np.arange(start, stop)
        positions.append(where)
        slots.append(table[where // block_size] * block_size + where % block_size)
        tables.append(torch.from_numpy(table))
        num_tokens += stop - start
        rows.extend(range(num_tokens - num_logits, num_tokens))
    return StageInputs(
        token_ids_T=None if token_ids is None else _take_ids(spans, token_ids),
        positions_T=torch.from_numpy(np.concatenate(positions)),
        slots_T=torch.from_numpy(np.concatenate(slots)),
        query_lens=tuple(stop - start for start, stop, _, _ in spans),
        context_lens=tuple(stop for _, stop, _, _ in spans),
        block_tables=tuple(tables),
        logit_rows_R=torch.tensor(rows, dtype=torch.int64),
    )


def _take_ids(spans: Sequence[ChunkSpan], token_ids: Sequence[list[int]]) -> Tensor:
    flat: list[int] = []
    for (start, stop, _, _), ids in zip(spans, token_ids, strict=True):
        flat.extend(ids[start:stop])
    return torch.tensor(flat, dtype=torch.int64)
