"""A microbatch as a stage's forward sees it: tensors, and nothing of requests. Made on the host.

Suffixes: T tokens of the microbatch, S chunks, R rows whose logits are wanted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

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
    begun_blocks: Tensor
    """int64 blocks that this microbatch begins and leaves partly filled."""
    wanted_lens: tuple[int, ...]
    """Of each chunk's tokens how many have their logits wanted: its last ones."""
    logit_rows_R: Tensor
    """int64 rows along T whose logits are wanted."""

    @property
    def num_tokens(self) -> int:
        return len(self.positions_T)

    @property
    def num_wanted(self) -> int:
        return len(self.logit_rows_R)

    def of_wanted(self) -> "StageInputs":
        """The microbatch as if each chunk began where its logits are wanted. It computes the same
        for these rows, once the keys and values of all are written."""
        chunks = [chunk for chunk, wanted in enumerate(self.wanted_lens) if wanted]
        return StageInputs(
            token_ids_T=None,
            positions_T=self.positions_T[self.logit_rows_R],
            slots_T=self.slots_T[self.logit_rows_R],
            query_lens=tuple(self.wanted_lens[chunk] for chunk in chunks),
            context_lens=tuple(self.context_lens[chunk] for chunk in chunks),
            block_tables=tuple(self.block_tables[chunk] for chunk in chunks),
            begun_blocks=self.begun_blocks,
            wanted_lens=tuple(self.wanted_lens[chunk] for chunk in chunks),
            logit_rows_R=torch.arange(self.num_wanted).to(self.logit_rows_R.device),
        )

    def to(self, device: torch.device) -> "StageInputs":
        """With what layers read on `device`; block tables stay, for attention plans by them."""
        return (
            self
            if device.type == "cpu"
            else replace(
                self,
                positions_T=self.positions_T.to(device),
                slots_T=self.slots_T.to(device),
                begun_blocks=self.begun_blocks.to(device),
                logit_rows_R=self.logit_rows_R.to(device),
            )
        )


def build_inputs(
    spans: Sequence[ChunkSpan], block_size: int, token_ids: Sequence[list[int]] | None
) -> StageInputs:
    """Lay the chunks one after the other.

    `token_ids`: all known ids of each chunk's request (first stage), or None. Does not modify its
    arguments and keeps none of their lists.
    """
    starts, stops, tables, wanted_lens = zip(*spans, strict=True)
    num_blocks = [-(-stop // block_size) for stop in stops]
    blocks = [table[:number] for table, number in zip(tables, num_blocks, strict=True)]
    lens_S, num_blocks_S = np.subtract(stops, starts), np.array(num_blocks)
    ends_S, block_ends_S = lens_S.cumsum(), num_blocks_S.cumsum()
    num_tokens = int(ends_S[-1])
    positions_T = np.arange(num_tokens) + (starts - ends_S + lens_S).repeat(lens_S)
    # All tables behind one another, and where in them each token's block stands.
    joined = np.array(list(chain.from_iterable(blocks)), dtype=np.int64)
    places_T = positions_T // block_size + (block_ends_S - num_blocks_S).repeat(lens_S)
    begun, rows = [], []
    for (start, stop, _, num_logits), table, end in zip(
        spans, blocks, ends_S.tolist(), strict=True
    ):
        if 0 < stop % block_size <= stop - start:
            begun.append(table[-1])
        rows.extend(range(end - num_logits, end))
    return StageInputs(
        token_ids_T=None if token_ids is None else _take_ids(spans, token_ids),
        positions_T=torch.from_numpy(positions_T),
        slots_T=torch.from_numpy(joined[places_T] * block_size + positions_T % block_size),
        query_lens=tuple(lens_S.tolist()),
        context_lens=stops,
        block_tables=torch.from_numpy(joined).split(num_blocks),
        begun_blocks=torch.tensor(begun, dtype=torch.int64),
        wanted_lens=wanted_lens,
        logit_rows_R=torch.tensor(rows, dtype=torch.int64),
    )


def _take_ids(spans: Sequence[ChunkSpan], token_ids: Sequence[list[int]]) -> Tensor:
    flat: list[int] = []
    for (start, stop, _, _), ids in zip(spans, token_ids, strict=True):
        flat.extend(ids[start:stop])
    return torch.tensor(flat, dtype=torch.int64)
