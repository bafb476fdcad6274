"""Modules that hold one weight and know where the checkpoint keeps it.

A stage is a tree of modules; its leaves are what `weights.py` reads. A leaf without a weight takes
no memory, so the shapes of a model of any size can be had from its configuration alone.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pipeserve.stages.layers.part import Part


class Columns(NamedTuple):
    """Numbers [start, stop) of each row, which has `of`."""

    of: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows [start, stop) of a checkpoint tensor that has `of` rows."""

    name: str
    """Hugging Face's, without ".weight" and ".bias"."""
    of: int
    start: int
    stop: int
    instead: str = field(default="", compare=False)
    """The tensor that is read where the checkpoint has none of the name."""
    columns: Columns | None = None
    """What is read of each row, where that is not all. (A bias has one number a row.)"""


def whole(name: str, num_rows: int, instead: str = "") -> Rows:
    """All rows of a tensor."""
    return Rows(name, num_rows, 0, num_rows, instead)


class Leaf(Part):
    """One weight, perhaps with a bias of its first axis; inference only.

    `source`: the rows that make up the weight, joined along its first axis; a name stands for the
    tensor of that name as it is.
    """

    is_float32 = False
    """Kept in float32 whatever the run's dtype: small, or what the likeliest token hangs on."""

    def __init__(
        self, shape: tuple[int, ...], source: str | Sequence[Rows], has_bias: bool = False
    ) -> None:
        super().__init__()
        self.shape = shape
        self.source = (whole(source, shape[0]),) if isinstance(source, str) else tuple(source)
        self.has_bias = has_bias
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.described: object = None
        """Both, as the backend's kernels are told of them; theirs, made once."""

    def keep_rows(self, kept: Sequence[range]) -> None:
        """Of the weight, joined, and its bias; the others are another rank's. Before it is set."""
        self.source = tuple(part for each in kept for part in _within(self.source, each))
        self.shape = (sum(map(len, kept)), *self.shape[1:])

    def keep_columns(self, kept: range) -> None:
        """Of a matrix: the others are another rank's. Before it is set."""
        num_rows, of = self.shape
        columns = Columns(of, kept.start, kept.stop)
        self.source = tuple(replace(rows, columns=columns) for rows in self.source)
        self.shape = (num_rows, len(kept))

    @property
    def num_parameters(self) -> int:
        return math.prod(self.shape) + self.has_bias * self.shape[0]

    def dtype_in(self, dtype: torch.dtype) -> torch.dtype:
        """What it is kept as in a run of `dtype`."""
        return torch.float32 if self.is_float32 else dtype

    def bytes_in(self, dtype: torch.dtype) -> int:
        """What it takes in a run of `dtype`, or more: the backend may find that 16 bits do."""
        return self.num_parameters * self.dtype_in(dtype).itemsize

    @property
    def num_bytes(self) -> int:
        """Of what is set."""
        return sum(part.nbytes for part in (self.weight, self.bias) if part is not None)

    def set(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Takes `weight`, of `shape`, and `bias` over, to the stage's device."""
        self.weight = self._placed(weight)
        self.bias = None if bias is None else self._placed_bias(bias)
        self.described = None
        self.backend.num_set += 1

    def _placed(self, weight: Tensor) -> Tensor:
        return self.backend.place(weight)

    def _placed_bias(self, bias: Tensor) -> Tensor:
        return self.backend.place(bias)


def _within(source: Sequence[Rows], kept: range) -> Iterator[Rows]:
    """What `source`, joined, has in these rows."""
    begin = 0
    for rows in source:
        first, stop = (rows.start + at - begin for at in (kept.start, kept.stop))
        first, stop = max(first, rows.start), min(stop, rows.stop)
        if first < stop:
            yield replace(rows, start=first, stop=stop)
        begin += rows.stop - rows.start


class Embedding(Leaf):
    """A table of rows, looked up as float32; `scale` multiplies them, rounded to the table's dtype
    as transformers does it."""

    def __init__(
        self, num_rows: int, size: int, source: str | Sequence[Rows], scale: float = 1.0
    ) -> None:
        super().__init__((num_rows, size), source)
        self.scale = scale

    def forward(self, ids_T: Tensor) -> Tensor:
        return self.scaled(self.weight.index_select(0, ids_T))

    def scaled(self, rows_TD: Tensor) -> Tensor:
        """Rows of the table as they are looked up."""
        rows_TD = rows_TD.float()
        if self.scale == 1.0:
            return rows_TD
        return rows_TD * torch.tensor(self.scale, dtype=self.weight.dtype).item()
