"""A linear layer, whose weight lies as the stage's backend likes it best."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeserve.stages.layers.leaf import Leaf, Rows


class Linear(Leaf):
    """y = x W^T + b; inference only."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        source: str | Sequence[Rows] = (),
        has_bias: bool = False,
    ) -> None:
        super().__init__((out_features, in_features), source, has_bias)

    def _placed(self, weight: Tensor) -> Tensor:
        return self.backend.place_matrix(weight)

    def _placed_bias(self, bias: Tensor) -> Tensor:
        return self.backend.place_bias(bias)

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """[..., in_features] of any dtype -> [..., out_features] of the weight's, or added to
        `onto`."""
        return self.backend.linear(x, self.weight, self.bias, onto)

    def some(self, x: Tensor, outputs: range) -> Tensor:
        """Those outputs alone: [..., len(outputs)], perhaps a part of more."""
        return self.backend.some_outputs(x, self.weight, self.bias, outputs)


class Vocabulary(Linear):
    """Of hidden states to logits, of which often the highest alone is asked for."""

    def _placed(self, weight: Tensor) -> Tensor:
        return self.backend.place_vocabulary(weight)

    def bytes_in(self, dtype: torch.dtype) -> int:
        return super().bytes_in(dtype) + self.backend.bytes_beside_vocabulary(*self.shape)


class GatedLinear(Linear):
    """activation(gate) * up, both in one product: the weight has the gate's rows first."""

    def __init__(
        self,
        activation: str,
        in_features: int,
        out_features: int,
        source: str | Sequence[Rows] = (),
        has_bias: bool = False,
    ) -> None:
        """`out_features`: of what comes out; the weight has twice as many rows."""
        super().__init__(in_features, 2 * out_features, source, has_bias)
        self.activation = activation

    def _placed(self, weight: Tensor) -> Tensor:
        return self.backend.place_gated_matrix(weight)

    def _placed_bias(self, bias: Tensor) -> Tensor:
        return self.backend.place_gated_bias(bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] of any dtype -> [..., out_features]."""
        return self.backend.gated(x, self.weight, self.bias, self.activation)
