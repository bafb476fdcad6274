"""The CPU's backend: oneDNN's products over packed weights, attention of few distinct shapes."""

import torch
from torch import Tensor

from pipeserve.stages.attention.attention import Attention
from pipeserve.stages.backends.backend import Backend
from pipeserve.stages.backends.cpu.blocked_attention import BlockedAttention

_PACKED_FOR = 512
"""Rows that the packed layout is asked to suit; measured as good as any from 1 to 512."""


class CpuBackend(Backend):
    """oneDNN compiles a kernel for each shape that it meets: about 0.5 ms and 0.7 MB each, four
    shapes a layer (bench/linears.py). So rows are padded to few numbers of them.
    """

    def __init__(self, attention: Attention | None = None) -> None:
        super().__init__("cpu", attention or BlockedAttention())

    def place_matrix(self, weight_OI: Tensor) -> Tensor:
        """In oneDNN's layout where it has one, which saves it from reordering the weight in every
        call.

        One core, 16 rows through a 49152 x 576 head: 5.4 ms packed and 9.7 plain in bf16, 14.4 and
        31.4 in float32, and never longer (bench/linears.py); layers in float32 take 5 to 35 % less
        time, with AVX2 alone too. A row of a packed product does not depend on the rows beside it.
        """
        if not _can_pack(weight_OI.dtype):
            return weight_OI
        return torch.ops.mkldnn._reorder_linear_weight(weight_OI, _PACKED_FOR)

    def pad_rows(self, x: Tensor) -> Tensor:
        """With rows of zeros, up to a multiple of 8, and of 16 over 64."""
        num_rows = len(x)
        missing = -num_rows % (8 if num_rows <= 64 else 16)
        return x if missing == 0 else torch.cat((x, x.new_zeros(missing, *x.shape[1:])))

    def linear(
        self,
        x_XI: Tensor,
        weight: Tensor,
        bias_O: Tensor | None = None,
        onto_XO: Tensor | None = None,
    ) -> Tensor:
        if not weight.is_mkldnn:
            return super().linear(x_XI, weight, bias_O, onto_XO)
        x_XI = x_XI.to(weight.dtype)
        product_XO = torch.ops.mkldnn._linear_pointwise(x_XI, weight, bias_O, "none", [], "")
        return product_XO if onto_XO is None else onto_XO + product_XO

    def some_outputs(
        self, x_XI: Tensor, weight: Tensor, bias_O: Tensor | None, outputs: range
    ) -> Tensor:
        """Of a packed weight all are computed: oneDNN does not tell where they lie."""
        if not weight.is_mkldnn:
            return super().some_outputs(x_XI, weight, bias_O, outputs)
        return self.linear(x_XI, weight, bias_O)[..., outputs.start : outputs.stop]


def _can_pack(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32
