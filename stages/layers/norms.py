"""Norms over the last axis, float32 whatever comes in. Suffixes: X any axes, D the normed one."""

from torch import Tensor

from pipeserve.stages.layers.leaf import Leaf


class RMSNorm(Leaf):
    is_float32 = True

    def __init__(self, size: int, eps: float, source: str) -> None:
        super().__init__((size,), source)
        self.eps = eps

    def forward(self, x_XD: Tensor, onto_XD: Tensor | None = None) -> Tensor:
        return self.backend.rms_norm(x_XD, self.weight, self.eps, onto_XD)


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
        return self.backend.layer_norm(x_XD, self.weight, self.bias, self.eps)
