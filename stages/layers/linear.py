"""A linear layer whose weight is set once and, where that is faster, kept in oneDNN's layout."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeserve.stages.layers.leaf import Leaf, Rows

_PACKED_FOR = 512
"""Rows that the packed layout is asked to suit; measured as good as any from 1 to 512."""


class Linear(Leaf):
    """y = x W^T + b; inference only.

    Packing saves oneDNN from reordering the weight in every call. One core, 16 rows through a
    49152 x 576 head: 5.4 ms packed and 9.7 plain in bf16, 14.4 and 31.4 in float32, and never
    longer (bench/linears.py); layers in float32 take 5 to 35 % less time, with AVX2 alone too. A
    row of a packed product does not depend on the rows beside it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        source: str | Sequence[Rows] = (),
        has_bias: bool = False,
    ) -> None:
        super().__init__((out_features, in_features), source, has_bias)
        self.is_packed = False

    def set(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Takes `weight` [out_features, in_features] and `bias` [out_features] over."""
        self.is_packed = _can_pack(weight)
        if self.is_packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR)
        super().set(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] of any dtype -> [..., out_features] of the weight's."""
        x = x.to(self.weight.dtype)
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32
