"""The other half of a decoder layer: plain, gated, or experts of which each token takes a few.

`norm`: what is done to x first, or nothing. `onto`: what the result is added to, or nothing.

Suffixes: T tokens, D hidden size, E experts, A experts that a token takes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeserve.stages.backends.backend import Norm
from pipeserve.stages.layers.linear import GatedLinear, Linear
from pipeserve.stages.layers.part import Part


class Mlp(Part):
    def __init__(self, activation: str, up: Linear, down: Linear) -> None:
        super().__init__()
        self.activation = activation
        self.up, self.down = up, down

    def forward(
        self, x_TD: Tensor, norm: Norm | None = None, onto_TD: Tensor | None = None
    ) -> Tensor:
        parts = (norm, self.up, self.activation, self.down, onto_TD)
        return self.backend.mlp_half(x_TD, *parts, is_gated=False)


class GatedMlp(Part):
    def __init__(self, gate_up: GatedLinear, down: Linear) -> None:
        super().__init__()
        self.activation = gate_up.activation
        self.gate_up, self.down = gate_up, down

    def forward(
        self, x_TD: Tensor, norm: Norm | None = None, onto_TD: Tensor | None = None
    ) -> Tensor:
        parts = (norm, self.gate_up, self.activation, self.down, onto_TD)
        return self.backend.mlp_half(x_TD, *parts, is_gated=True)


class Experts(Part):
    """Each token takes the `num_taken` experts that the router likes best, weighted by its liking.

    `normalize`: those weights sum to 1. All experts of a layer lie on its stage.
    """

    def __init__(
        self, router: Linear, experts: Sequence[nn.Module], num_taken: int, normalize: bool
    ) -> None:
        super().__init__()
        self.router = router
        router.is_float32 = True
        self.experts = nn.ModuleList(experts)
        self.num_taken = num_taken
        self.normalize = normalize

    def forward(
        self, x_TD: Tensor, norm: Norm | None = None, onto_TD: Tensor | None = None
    ) -> Tensor:
        x_TD = x_TD if norm is None else norm(x_TD)
        likings_TE = torch.softmax(self.router(x_TD), -1, dtype=torch.float32)
        weights_TA, taken_TA = likings_TE.topk(self.num_taken, -1)
        if self.normalize:
            weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True)
        out_TD = torch.zeros_like(x_TD)
        for number in taken_TA.unique().tolist():
            rows, place = torch.where(taken_TA == number)
            own = self.experts[number](self.backend.pad_rows(x_TD[rows]))[: len(rows)]
            out_TD.index_add_(0, rows, own * weights_TA[rows, place, None])
        return out_TD if onto_TD is None else onto_TD + out_TD
