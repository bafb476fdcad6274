"""What layers do between their products, by the C kernels (kernels/elementwise.c, kernels/heads.c).

All compute in float32. A row's result does not depend on the rows beside it. Tensors are contiguous
unless said otherwise. Suffixes: X any axes, D the normed axis, F intermediate size, T tokens, A any
heads, H head size, R rotated part of it.
"""

import torch
from torch import Tensor

from pipeserve.stages.backends.cpu.library import kernels
from pipeserve.stages.backends.cpu.types import KERNEL_ACTIVATIONS, KERNEL_TYPES


def rms_norm(
    x_XD: Tensor,
    weight_D: Tensor,
    eps: float,
    *,
    added_XD: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Of float32 `x_XD`, to which `added_XD` of any type is added first, in place: [X, D] of
    `dtype`."""
    out_XD = torch.empty(x_XD.shape, dtype=dtype)
    size = x_XD.shape[-1]
    kernels().rms_norm(
        x_XD.data_ptr(),
        None if added_XD is None else added_XD.data_ptr(),
        0 if added_XD is None else KERNEL_TYPES[added_XD.dtype],
        weight_D.data_ptr(),
        eps,
        x_XD.numel() // size,
        size,
        out_XD.data_ptr(),
        KERNEL_TYPES[dtype],
    )
    return out_XD


def layer_norm(
    x_XD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Of float32 `x_XD`: [X, D] of `dtype`."""
    out_XD = torch.empty(x_XD.shape, dtype=dtype)
    size = x_XD.shape[-1]
    kernels().layer_norm(
        x_XD.data_ptr(),
        weight_D.data_ptr(),
        bias_D.data_ptr(),
        eps,
        x_XD.numel() // size,
        size,
        out_XD.data_ptr(),
        KERNEL_TYPES[dtype],
    )
    return out_XD


def activate(x_X: Tensor, activation: str, *, dtype: torch.dtype = torch.float32) -> Tensor:
    out_X = torch.empty(x_X.shape, dtype=dtype)
    kernels().activate(
        x_X.data_ptr(),
        KERNEL_TYPES[x_X.dtype],
        KERNEL_ACTIVATIONS[activation],
        x_X.numel(),
        out_X.data_ptr(),
        KERNEL_TYPES[dtype],
    )
    return out_X


def add_to(x_X: Tensor, added_X: Tensor) -> None:
    """Adds to float32 `x_X` in place."""
    kernels().add_to(x_X.data_ptr(), added_X.data_ptr(), KERNEL_TYPES[added_X.dtype], x_X.numel())


def rotate(heads_TAH: Tensor, cos_T1R: Tensor, signed_sin_T1R: Tensor) -> None:
    """In place, float32; rows may lie apart, so a part of a fused product's heads will do.
    Dimensions behind R stay as they are."""
    num_rows, num_heads, head_size = heads_TAH.shape
    kernels().rotate_heads(
        heads_TAH.data_ptr(),
        heads_TAH.stride(0),
        num_rows,
        num_heads,
        head_size,
        cos_T1R.data_ptr(),
        signed_sin_T1R.data_ptr(),
        cos_T1R.shape[-1],
    )
