"""A decoder layer of attention and MLP, each with a norm and added to its input.

Suffixes: T tokens, D hidden size.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from pipeserve.stages.attention.kv import PoolLayer
from pipeserve.stages.attention.rotation import RotationTable
from pipeserve.stages.backends.backend import TwoHalves
from pipeserve.stages.config.model_config import RopeConfig
from pipeserve.stages.layers.mlp import GatedMlp, Mlp
from pipeserve.stages.layers.part import Part
from pipeserve.stages.layers.self_attention import LayerInputs, SelfAttention


class DecoderLayer(Part):
    """What it is made of; what is done with that differs."""

    def __init__(
        self, attention_norm: nn.Module, attention: SelfAttention, mlp_norm: nn.Module, mlp: Part
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp


class PreNormLayer(DecoderLayer):
    """That of most families: what is normed goes into attention, and into the MLP."""

    def forward(self, x_TD: Tensor, shared: LayerInputs, pool: PoolLayer) -> Tensor:
        x_TD = self.attention(x_TD, shared, pool, self.attention_norm, x_TD)
        return self.mlp(x_TD, self.mlp_norm, x_TD)


def two_halves(layer: nn.Module, tables: Mapping[RopeConfig, RotationTable]) -> TwoHalves | None:
    """What a backend needs to run such layers in one go; None of others, as with experts."""
    if not isinstance(layer, PreNormLayer) or not isinstance(layer.mlp, Mlp | GatedMlp):
        return None
    attention, mlp = layer.attention, layer.mlp
    is_gated = isinstance(mlp, GatedMlp)
    return TwoHalves(
        attention_norm=layer.attention_norm,
        qkv=attention.qkv,
        head_norms=attention.norms,
        rotation=None if attention.rope is None else tables[attention.rope],
        scoring=attention.scoring,
        out=attention.out,
        mlp_norm=layer.mlp_norm,
        up=mlp.gate_up if is_gated else mlp.up,
        activation=mlp.activation,
        down=mlp.down,
        is_gated=is_gated,
    )
