"""Norms over the last axis, float32 whatever comes in. Suffixes: X any axes, D the normed one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeserve.stages.layers.leaf import Leaf


class RMSNorm(Leaf):
    is_float32 = True

    def __init__(self, size: int, eps: float, source: str) -> None:
        super().__init__((size,), source)
        self.eps = eps

    def forward(self, x_XD: Tensor) -> Tensor:
        x_XD = x_XD.float()
        squares_X = torch.linalg.vecdot(x_XD, x_XD)[..., None]
        return (x_XD * (squares_X / x_XD.shape[-1] + self.eps).rsqrt_()).mul_(self.weight)


class OffsetRMSNorm(RMSNorm):
    """Gemma's: the checkpoint holds weight - 1."""

    def set(self, weight: Tensor, bias: None = None) -> None:
        super().set(1.0 + weight)


class LayerNorm(Leaf):
    """With a bias."""

    is_float32 = True

    def __init__(self, size: int, eps: float, source: str) -> None:
        super().__init__((size,), source, has_bias=True)
        self.eps = eps

    def forward(self, x_XD: Tensor) -> Tensor:
        return F.layer_norm(x_XD.float(), self.shape, self.weight, self.bias, self.eps)
