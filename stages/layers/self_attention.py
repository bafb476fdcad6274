"""The attention half of a decoder layer: the two products, and what the backend does between them.

Suffixes: T tokens, D hidden size, N query heads, A all heads (queries, keys, values), H head size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from pipeserve.stages.attention.inputs import StageInputs
from pipeserve.stages.attention.kv import PoolLayer
from pipeserve.stages.attention.scoring import Scoring
from pipeserve.stages.backends.backend import Rotation
from pipeserve.stages.config.model_config import ModelConfig, RopeConfig
from pipeserve.stages.layers.linear import Linear
from pipeserve.stages.layers.part import Part


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What depends on the microbatch and is the same for all layers."""

    inputs: StageInputs
    plan: object
    """Of `Backend.prepare_attention`."""
    rotations: Mapping[RopeConfig, Rotation]


class SelfAttention(Part):
    """Q, K and V in one product, all query heads first, then keys, then values.

    `rope` None: positions are not rotated. The norms, where given, go over each head.
    """

    def __init__(
        self,
        config: ModelConfig,
        scoring: Scoring,
        *,
        qkv: Linear,
        out: Linear,
        rope: RopeConfig | None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.num_kv_heads, self.head_dim = config.num_kv_heads, config.head_dim
        self.scoring = scoring
        self.rope = rope
        self.qkv, self.out = qkv, out
        self.norms = None if q_norm is None else nn.ModuleList((q_norm, k_norm))

    def forward(
        self,
        x_TD: Tensor,
        shared: LayerInputs,
        pool: PoolLayer,
        onto_TD: Tensor | None = None,
    ) -> Tensor:
        """What comes out, added to `onto_TD`, if given. Writes K and V of the microbatch into
        `pool`; does not modify `x_TD`."""
        heads_TAH = self.qkv(x_TD).unflatten(-1, (-1, self.head_dim))
        rotation = None if self.rope is None else shared.rotations[self.rope]
        q_TNH = self.backend.place_heads(
            heads_TAH, self.num_kv_heads, self.norms, rotation, pool, shared.inputs
        )
        out_TNH = self.backend.attend(q_TNH, pool, shared.plan, self.scoring)
        return self.out(out_TNH.flatten(1), onto_TD)
