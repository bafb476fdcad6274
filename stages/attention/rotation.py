"""How heads are turned by their tokens' positions (rotary embedding), in the half-split layout of
Hugging Face's checkpoints.

Suffixes: P positions, T tokens, R rows that go on, X any heads, H head size, D the part of it that
turns, h half of that.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_FIRST_POSITIONS = 1024
"""Made at once, so that no table grows again and again while it is short."""


class RotationTable:
    """How far heads are turned at every position so far, made once for all microbatches."""

    def __init__(self, frequencies_h: Tensor, factor: float = 1.0) -> None:
        """`frequencies_h`: radians per position of each pair of dimensions. `factor` multiplies
        what is turned."""
        self.frequencies_h, self.factor = frequencies_h, factor
        self._turns_PD = frequencies_h.new_empty(0, 2 * len(frequencies_h))

    def until(self, stop: int) -> Tensor:
        """`Rotation.turns_PD` of positions [0, `stop`) at least. What it gave before stays as it
        is."""
        num_positions = self._turns_PD.shape[0]
        if stop > num_positions:
            num_positions = max(stop, 2 * num_positions, _FIRST_POSITIONS)
            positions_P = torch.arange(num_positions, device=self.frequencies_h.device)
            angles_Ph = positions_P[:, None].float() * self.frequencies_h
            self._turns_PD = torch.cat((angles_Ph.cos(), angles_Ph.sin()), -1).mul_(self.factor)
        return self._turns_PD


@dataclass(frozen=True, eq=False)
class Rotation:
    """Of each token of a microbatch."""

    turns_PD: Tensor
    """Float32: of each position the cosines of its pairs of dimensions, then their sines."""
    positions_T: Tensor
    """int64."""

    @cached_property
    def cos_and_signed_sin(self) -> tuple[Tensor, Tensor]:
        """Of each token, [T, 1, D] both."""
        cos_T1h, sin_T1h = self.turns_PD[self.positions_T][:, None].chunk(2, -1)
        return torch.cat((cos_T1h, cos_T1h), -1), torch.cat((-sin_T1h, sin_T1h), -1)

    def of(self, rows_R: Tensor) -> "Rotation":
        """Of some of the tokens."""
        return Rotation(self.turns_PD, self.positions_T[rows_R])


def rotate(heads_TXH: Tensor, rotation: Rotation) -> Tensor:
    """In float32. Dimensions behind D stay as they are."""
    cos_T1D, signed_sin_T1D = rotation.cos_and_signed_sin
    size = cos_T1D.shape[-1]
    heads_TXD, others = heads_TXH.float().split((size, heads_TXH.shape[-1] - size), -1)
    swapped_TXD = heads_TXD.roll(size // 2, -1)
    turned_TXD = (heads_TXD * cos_T1D).addcmul_(swapped_TXD, signed_sin_T1D)
    return torch.cat((turned_TXD, others), -1) if others.shape[-1] else turned_TXD
