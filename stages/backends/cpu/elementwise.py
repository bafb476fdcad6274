"""What layers do between their products, by the C kernels (kernels/elementwise.c, kernels/heads.c).

All is float32. A row's result does not depend on the rows beside it. Tensors are contiguous unless
said otherwise. Suffixes: X any axes, D the normed axis, T tokens, A any heads, H head size.
"""

import torch
from torch import Tensor

from pipeserve.stages.attention.rotation import Rotation
from pipeserve.stages.backends.cpu.library import kernels
from pipeserve.stages.backends.cpu.types import KERNEL_ACTIVATIONS


def rms_norm(x_XD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    out_XD = torch.empty(x_XD.shape)
    size = x_XD.shape[-1]
    rows = (x_XD.numel() // size, size)
    kernels().rms_norm(x_XD.data_ptr(), weight_D.data_ptr(), eps, *rows, out_XD.data_ptr())
    return out_XD


def layer_norm(x_XD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    out_XD = torch.empty(x_XD.shape)
    size = x_XD.shape[-1]
    kernels().layer_norm(
        x_XD.data_ptr(),
        weight_D.data_ptr(),
        bias_D.data_ptr(),
        eps,
        x_XD.numel() // size,
        size,
        out_XD.data_ptr(),
    )
    return out_XD


def activate(x_X: Tensor, activation: str) -> Tensor:
    out_X = torch.empty(x_X.shape)
    kernels().activate(
        x_X.data_ptr(), KERNEL_ACTIVATIONS[activation], x_X.numel(), out_X.data_ptr()
    )
    return out_X


def rotate(heads_TAH: Tensor, rotation: Rotation) -> None:
    """In place; rows may lie apart, so a part of a fused product's heads will do."""
    num_rows, num_heads, head_size = heads_TAH.shape
    kernels().rotate_heads(
        heads_TAH.data_ptr(),
        heads_TAH.stride(0),
        num_rows,
        num_heads,
        head_size,
        rotation.turns_PD.data_ptr(),
        rotation.positions_T.data_ptr(),
        rotation.turns_PD.shape[1],
    )
