"""Norms over the last axis. Suffixes: X any axes, D the normed one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeserve.stages.leaf import Leaf


class RMSNorm(Leaf):
    """Mean square in float32, scaled in x's dtype: as transformers' LlamaRMSNorm does."""

    def __init__(self, size: int, eps: float, source: str) -> None:
        super().__init__((size,), source)
        self.eps = eps

    def forward(self, x_XD: Tensor) -> Tensor:
        return self.weight * self._normed(x_XD).to(x_XD.dtype)

    def _normed(self, x_XD: Tensor) -> Tensor:
        wide_XD = x_XD.float()
        return wide_XD * torch.rsqrt(wide_XD.pow(2).mean(-1, keepdim=True) + self.eps)


class OffsetRMSNorm(RMSNorm):
    """Gemma's: the checkpoint holds weight - 1, and all of it is float32."""

    def set(self, weight: Tensor, bias: None = None) -> None:
        super().set(1.0 + weight.float())

    def forward(self, x_XD: Tensor) -> Tensor:
        return (self._normed(x_XD) * self.weight).to(x_XD.dtype)


class LayerNorm(Leaf):
    """With a bias."""

    def __init__(self, size: int, eps: float, source: str) -> None:
        super().__init__((size,), source, has_bias=True)
        self.eps = eps

    def forward(self, x_XD: Tensor) -> Tensor:
        return F.layer_norm(x_XD, self.shape, self.weight, self.bias, self.eps)
