"""The attention half of a decoder layer: the two products, and what the backend does between them.

Suffixes: T tokens, R rows that go on, D hidden size, N query heads, A all heads (queries, keys,
values), H head size, X any axes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from pipeserve.stages.attention.inputs import StageInputs
from pipeserve.stages.attention.kv import PoolLayer
from pipeserve.stages.attention.rotation import Rotation
from pipeserve.stages.attention.scoring import Scoring
from pipeserve.stages.backends.backend import Norm
from pipeserve.stages.config.model_config import ModelConfig, RopeConfig
from pipeserve.stages.layers.linear import Linear
from pipeserve.stages.layers.part import Part


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What depends on the microbatch and is the same for all layers, but for the model's last one:
    behind its keys and values nobody wants more than the rows that become logits."""

    inputs: StageInputs
    plan: object
    """Of `Backend.prepare_attention`, for the rows that go on."""
    rotations: Mapping[RopeConfig, Rotation]
    rows_R: Tensor | None = None
    """Those that go on behind keys and values, perhaps with padding; None: all of them."""

    def kept(self, x_TX: Tensor) -> Tensor:
        """Of what all rows have, the part of those that go on."""
        return x_TX if self.rows_R is None else x_TX[self.rows_R]


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
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.scoring = scoring
        self.rope = rope
        self.qkv, self.out = qkv, out
        self.norms = None if q_norm is None else nn.ModuleList((q_norm, k_norm))

    def forward(
        self,
        x_TD: Tensor,
        shared: LayerInputs,
        pool: PoolLayer,
        norm: Norm | None = None,
        onto_TD: Tensor | None = None,
    ) -> Tensor:
        """Of `x_TD`, normed by `norm`, if given. What comes out for the rows that go on, added to
        `onto_TD`, if given. Writes K and V of the whole microbatch into `pool`; does not modify
        `x_TD`."""
        backend, inputs, plan = self.backend, shared.inputs, shared.plan
        rotation = None if self.rope is None else shared.rotations[self.rope]
        if shared.rows_R is None:
            heads = (self.num_kv_heads, self.norms, rotation, pool, inputs, plan, self.scoring)
            return backend.attention_half(x_TD, norm, self.qkv, *heads, self.out, onto_TD)
        x_TD = x_TD if norm is None else norm(x_TD)
        q_RNH = self._place_apart(x_TD, shared, rotation, pool)
        out_RNH = backend.attend(q_RNH, pool, plan, self.scoring)
        onto_RD = None if onto_TD is None else shared.kept(onto_TD)
        return self.out(out_RNH.flatten(1), onto_RD)

    def _place_apart(
        self, x_TD: Tensor, shared: LayerInputs, rotation: Rotation | None, pool: PoolLayer
    ) -> Tensor:
        """Writes keys and values of all rows; returns the queries of some alone."""
        num_q, num_kv = (n * self.head_dim for n in (self.num_heads, 2 * self.num_kv_heads))
        kv_TAH = self._heads(self.qkv.some(x_TD, range(num_q, num_q + num_kv)))
        self.backend.place_heads(
            kv_TAH, self.num_kv_heads, self.norms, rotation, pool, shared.inputs
        )
        q_RNH = self._heads(self.qkv.some(shared.kept(x_TD), range(num_q)))
        if rotation is not None:
            rotation = rotation.of(shared.rows_R)
        norm = None if self.norms is None else self.norms[0]
        return self.backend.turn_heads(q_RNH, norm, rotation)

    def _heads(self, x_TO: Tensor) -> Tensor:
        return x_TO.unflatten(-1, (-1, self.head_dim))
