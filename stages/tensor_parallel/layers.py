"""megatron-core's layers around a stage's own products: its cuts and its sums.

The products themselves are the stage's own. Megatron's multiply a dense parameter by torch.matmul,
whereas a backend packs its weights, has kernels of its own for gates and for what is added to a
residual, and takes parts that do not come out even; so that is what `_forward_impl` does here,
Megatron's own seam for it. Megatron's parameters therefore have no memory (they are "meta").

Sums are float32, as all that layers add up. Importing this takes seconds of CPU time.

Suffixes: T tokens, D hidden size, X any axes.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from pipeserve.stages.layers.ends import TokenEmbedding
from pipeserve.stages.layers.leaf import Embedding
from pipeserve.stages.layers.linear import Linear
from pipeserve.stages.layers.mlp import Experts, GatedMlp, Mlp
from pipeserve.stages.layers.self_attention import SelfAttention
from pipeserve.stages.tensor_parallel.head import VocabParallelHead
from pipeserve.stages.tensor_parallel.megatron import (
    ColumnParallelLinear,
    ModelParallelConfig,
    RowParallelLinear,
    VocabParallelEmbedding,
    reduce_from_tensor_model_parallel_region,
)
from pipeserve.stages.tensor_parallel.shard import Shard
from pipeserve.stages.tensor_parallel.sums import Sums

_CONFIG: dict[str, Any] = {"use_cpu_initialization": True, "perform_initialization": False}


def wrap(stage: nn.Module, shard: Shard, group: ProcessGroup, sums: Sums) -> list[nn.Module]:
    """Puts them around the products of a stage that was cut (`cut.py`); returns them. `sums` is
    told of each sum over what layers computed."""
    wrapped: list[nn.Module] = []

    def put(around: type[nn.Module], own: nn.Module) -> nn.Module:
        wrapped.append(around(own, shard, group))
        return wrapped[-1]

    for module in list(stage.modules()):
        match module:
            case SelfAttention():
                module.qkv = put(ColumnParallel, module.qkv)
                module.out = put(RowParallel, module.out)
            case Mlp():
                module.up = put(ColumnParallel, module.up)
                module.down = put(RowParallel, module.down)
            case GatedMlp():
                module.gate_up = put(ColumnParallel, module.gate_up)
                module.down = put(RowParallel, module.down)
            case TokenEmbedding():
                module.tokens = put(VocabParallel, module.tokens)
    for layer in stage.layers:
        if isinstance(layer.mlp, Experts):  # one sum for all that a token takes
            for expert in layer.mlp.experts:
                expert.down.sums_later()
            layer.mlp = put(SummedExperts, layer.mlp)
        if getattr(layer, "is_parallel", False):  # one sum for both halves
            layer.attention.out.sums_later()
            layer.mlp.down.adds_on_all()
    if stage.head is not None:
        stage.head = put(VocabParallelHead, stage.head)
    for each in wrapped:
        if isinstance(each, RowParallel | SummedExperts):
            each.sums = sums
    return wrapped


def regroup(wrapped: Iterable[nn.Module], group: ProcessGroup | None) -> None:
    """The same ranks have met anew, or parted."""
    for module in wrapped:
        module.tp_group = group


def _config(shard: Shard) -> ModelParallelConfig:
    return ModelParallelConfig(tensor_model_parallel_size=shard.of, **_CONFIG)


class ColumnParallel(ColumnParallelLinear):
    """Some outputs of a product; nothing is exchanged."""

    def __init__(self, own: Linear, shard: Shard, group: ProcessGroup) -> None:
        outputs, inputs = own.shape
        with torch.device("meta"):
            super().__init__(
                inputs,
                outputs * shard.of,
                config=_config(shard),
                init_method=None,
                bias=False,
                tp_group=group,
            )
        self.own = own

    def _forward_impl(self, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.own(input)

    def forward(self, x_X: Tensor) -> Tensor:
        return super().forward(x_X)[0]

    def some(self, x_X: Tensor, outputs: range) -> Tensor:
        """As of `Linear`, of this rank's."""
        return self.own.some(x_X, outputs)


class RowParallel(RowParallelLinear):
    """A product of some inputs, and the sum over all ranks.

    What it is added to goes into the first rank's part of that sum, as its bias does, for a kernel
    may add as it writes.
    """

    sums: Sums

    def __init__(self, own: Linear, shard: Shard, group: ProcessGroup) -> None:
        outputs, inputs = own.shape
        with torch.device("meta"):
            super().__init__(
                inputs * shard.of,
                outputs,
                config=_config(shard),
                init_method=None,
                bias=False,
                input_is_parallel=True,
                skip_bias_add=True,
                tp_group=group,
            )
        self.own = own
        self.adds = shard.number == 0

    def sums_later(self) -> None:
        """What comes out is this rank's part of a sum that another makes, as of Megatron's own
        experts."""
        self.explicit_expert_comm = True

    def adds_on_all(self) -> None:
        """What it is added to is such a part."""
        self.adds = True

    def _forward_impl(
        self, input: tuple[Tensor, Tensor | None], weight: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        part = self.own(*input).float()
        self.sums.begin()
        return part

    def forward(self, x_X: Tensor, onto_X: Tensor | None = None) -> Tensor:
        sum_X = super().forward((x_X, onto_X if self.adds else None))[0]
        if not self.explicit_expert_comm:
            self.sums.end()
        return sum_X


class SummedExperts(nn.Module):
    """Experts each of which gives this rank's part."""

    sums: Sums

    def __init__(self, own: Experts, shard: Shard, group: ProcessGroup) -> None:
        super().__init__()
        self.own, self.tp_group = own, group
        self.adds = shard.number == 0

    def forward(
        self, x_TD: Tensor, norm: nn.Module | None = None, onto_TD: Tensor | None = None
    ) -> Tensor:
        part_TD = self.own(x_TD, norm, onto_TD if self.adds else None).contiguous()
        self.sums.begin()
        sum_TD = reduce_from_tensor_model_parallel_region(part_TD, group=self.tp_group)
        self.sums.end()
        return sum_TD


class VocabParallel(VocabParallelEmbedding):
    """Some rows of a table; the rank that has a token's row tells the others."""

    def __init__(self, own: Embedding, shard: Shard, group: ProcessGroup) -> None:
        with torch.device("meta"):
            super().__init__(
                shard.padded(own.source[0].of),
                own.shape[1],
                init_method=None,
                config=_config(shard),
                tp_group=group,
            )
        self.own = own

    def forward(self, ids_T: Tensor) -> Tensor:
        if self.weight.is_meta:  # once the rows are read
            self.weight = nn.Parameter(self.own.weight, requires_grad=False)
        return self.own.scaled(super().forward(ids_T))
