"""The other half of a decoder layer: plain, gated, or experts of which each token takes a few.

Suffixes: T tokens, D hidden size, F intermediate size, E experts, A experts that a token takes.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeserve.stages.layers.linear import Linear
from pipeserve.stages.layers.padding import pad_rows

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}
"""By Hugging Face's names."""


class Mlp(nn.Module):
    def __init__(self, activation: str, up: Linear, down: Linear) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.up, self.down = up, down

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x_TD)))


class GatedMlp(nn.Module):
    """Gate and up in one product, gate first."""

    def __init__(self, activation: str, gate_up: Linear, down: Linear) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate_up, self.down = gate_up, down

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TF, up_TF = self.gate_up(x_TD).chunk(2, -1)
        return self.down(self.activation(gate_TF).mul_(up_TF))


class Experts(nn.Module):
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

    def forward(self, x_TD: Tensor) -> Tensor:
        likings_TE = torch.softmax(self.router(x_TD), -1, dtype=torch.float32)
        weights_TA, taken_TA = likings_TE.topk(self.num_taken, -1)
        if self.normalize:
            weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True)
        out_TD = torch.zeros_like(x_TD)
        for number in taken_TA.unique().tolist():
            rows, place = torch.where(taken_TA == number)
            own = self.experts[number](pad_rows(x_TD[rows]))[: len(rows)]
            out_TD.index_add_(0, rows, own * weights_TA[rows, place, None])
        return out_TD
