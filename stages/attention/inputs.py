"""A microbatch as a stage's forward sees it: its chunks, and nothing of requests. Made on the host.

What operations read of it is made when one asks: each that is not made is one thing less between
two microbatches, when nothing of it is in a cache (20 to 100 us for an operation of PyTorch on
eight numbers, 1 to 10 when they are repeated).

Suffixes: T tokens of the microbatch, R rows whose logits are wanted.
"""

from array import array
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

CPU = torch.device("cpu")


class Chunk(NamedTuple):
    """Tokens of one request: positions [start, stop) of it."""

    start: int
    stop: int
    """Keys that its last token sees, that token's own included."""
    blocks: list[int]
    """That hold positions [0, stop), in order; the last may be partly filled."""
    num_wanted: int
    """Of its tokens those whose logits are wanted: its last ones."""

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


class StageInputs:
    """Everything that depends on the microbatch but not on the layer. Chunks lie one after the
    other along T. Tensors are int64, and lie on `device`."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        block_size: int,
        token_ids: array | None = None,
        device: torch.device = CPU,
    ) -> None:
        """`token_ids`: int64 of all tokens; on the first stage only."""
        self.chunks, self.block_size = chunks, block_size
        self.device = device
        self._token_ids = token_ids
        self.num_tokens = sum([stop - start for start, stop, _, _ in chunks])
        self.num_wanted = sum([chunk.num_wanted for chunk in chunks])

    @cached_property
    def num_positions(self) -> int:
        """Those that a token of it may have are [0, num_positions)."""
        return max([chunk.stop for chunk in self.chunks])

    @property
    def token_ids_T(self) -> Tensor | None:
        return None if self._token_ids is None else self._placed(self._token_ids)

    @cached_property
    def positions(self) -> array:
        """int64, of each token in its own request."""
        spans = [range(start, stop) for start, stop, _, _ in self.chunks]
        return array("q", chain.from_iterable(spans))

    @cached_property
    def positions_T(self) -> Tensor:
        return self._placed(self.positions)

    @cached_property
    def slots(self) -> array:
        """int64: where in the KV pool each token's K and V go, block * block_size + offset. Raises
        IndexError where a token has no block: kernels take it that there are as many slots."""
        size, slots = self.block_size, array("q")
        for start, stop, blocks, _ in self.chunks:
            for number in range(start // size, -(-stop // size)):
                first = blocks[number] * size - number * size
                begin, end = max(start, number * size), min(stop, (number + 1) * size)
                slots.extend(range(first + begin, first + end))
        return slots

    @cached_property
    def slots_T(self) -> Tensor:
        return self._placed(self.slots)

    @cached_property
    def begun_blocks(self) -> Tensor:
        """That this microbatch begins and leaves partly filled."""
        size = self.block_size
        return self._placed(
            array("q", [c.blocks[-1] for c in self.chunks if 0 < c.stop % size <= c.num_tokens])
        )

    @cached_property
    def logit_rows_R(self) -> Tensor:
        """Rows along T whose logits are wanted."""
        rows, end = array("q"), 0
        for chunk in self.chunks:
            end += chunk.num_tokens
            rows.extend(range(end - chunk.num_wanted, end))
        return self._placed(rows)

    def of_wanted(self) -> "StageInputs":
        """The microbatch as if each chunk began where its logits are wanted. It computes the same
        for these rows, once the keys and values of all are written."""
        wanted = [c._replace(start=c.stop - c.num_wanted) for c in self.chunks if c.num_wanted]
        return StageInputs(wanted, self.block_size, device=self.device)

    def to(self, device: torch.device) -> "StageInputs":
        """With its tensors on `device`."""
        if device == self.device:
            return self
        return StageInputs(self.chunks, self.block_size, self._token_ids, device)

    def _placed(self, numbers: array) -> Tensor:
        if not numbers:
            return torch.empty(0, dtype=torch.int64, device=self.device)
        return torch.frombuffer(numbers, dtype=torch.int64).to(self.device)


ChunkSpan = tuple[int, int, list[int], int]
"""(start, stop, block table of the request up to `stop` at least, trailing logits wanted)."""


def build_inputs(
    spans: Iterable[ChunkSpan], block_size: int, token_ids: Sequence[Sequence[int]] | None
) -> StageInputs:
    """Lay the chunks one after the other.

    `token_ids`: all known ids of each chunk's request (first stage), or None. Does not modify its
    arguments and keeps none of their lists.
    """
    chunks = [
        Chunk(start, stop, table[: -(-stop // block_size)], num_wanted)
        for start, stop, table, num_wanted in spans
    ]
    if token_ids is None:
        return StageInputs(chunks, block_size)
    own = [ids[c.start : c.stop] for c, ids in zip(chunks, token_ids, strict=True)]
    return StageInputs(chunks, block_size, array("q", chain.from_iterable(own)))
