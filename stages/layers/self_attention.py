"""The attention half of a decoder layer: projections, positions, and `attention.py` between them.

Suffixes: T tokens, D hidden size, N query heads, K kv heads, X any heads, H head size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from pipeserve.stages.attention.attention import Attention, PoolLayer, Scoring
from pipeserve.stages.config.model_config import ModelConfig, RopeConfig
from pipeserve.stages.layers.linear import Linear
from pipeserve.stages.layers.rotary import Rotation, rotate


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What depends on the microbatch and is the same for all layers."""

    plan: object
    """Of `Attention.prepare`."""
    rotations: Mapping[RopeConfig, Rotation]


class SelfAttention(nn.Module):
    """Q, K and V in one product, all query heads first, then keys, then values.

    `rope` None: positions are not rotated. The norms, where given, go over each head.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: Attention,
        scoring: Scoring,
        *,
        qkv: Linear,
        out: Linear,
        rope: RopeConfig | None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        self.attention = attention
        self.scoring = scoring
        self.rope = rope
        self.qkv, self.out = qkv, out
        self.q_norm, self.k_norm = q_norm, k_norm

    def forward(self, x_TD: Tensor, shared: LayerInputs, pool: PoolLayer) -> Tensor:
        """Writes K and V of the microbatch into `pool`; does not modify `x_TD`."""
        num_q, num_k, _ = self.heads
        heads_TXH = self.qkv(x_TD).unflatten(-1, (-1, self.head_dim))
        q_TNH, k_TKH, v_TKH = heads_TXH.split(self.heads, 1)
        if self.q_norm is not None:
            q_TNH, k_TKH = self.q_norm(q_TNH), self.k_norm(k_TKH)
            q_TNH, k_TKH = (rotate(x, shared.rotations[self.rope]) for x in (q_TNH, k_TKH))
        elif self.rope is not None:
            rotated_TXH = rotate(heads_TXH[:, : num_q + num_k], shared.rotations[self.rope])
            q_TNH, k_TKH = rotated_TXH.split((num_q, num_k), 1)
        out_TNH = self.attention(q_TNH, k_TKH, v_TKH, pool, shared.plan, self.scoring)
        return self.out(out_TNH.flatten(1))
