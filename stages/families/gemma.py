"""Gemma 2 and 3 (text): norms before and after each half, scaled embeddings, windows in turn.

Gemma 2 caps scores and logits; Gemma 3 norms queries and keys, and its sliding layers have a rope
of their own.
"""

from collections.abc import Callable

from torch import Tensor

from pipeserve.stages.attention.kv import PoolLayer
from pipeserve.stages.attention.scoring import Scoring
from pipeserve.stages.config.families.gemma import GemmaConfig
from pipeserve.stages.families.llama import gate_up_rows, qkv_rows, qkv_width
from pipeserve.stages.families.parts import Parts
from pipeserve.stages.layers.ends import Head, TokenEmbedding, token_table, vocabulary
from pipeserve.stages.layers.linear import GatedLinear, Linear
from pipeserve.stages.layers.mlp import GatedMlp
from pipeserve.stages.layers.norms import OffsetRMSNorm
from pipeserve.stages.layers.part import Part
from pipeserve.stages.layers.self_attention import LayerInputs, SelfAttention


class GemmaLayer(Part):
    def __init__(self, config: GemmaConfig, number: int, prefix: str) -> None:
        super().__init__()
        norm = _norm(config, config.hidden_size, prefix)
        self.attention_norm = norm("input_layernorm")
        self.attention = _attention(config, number, f"{prefix}self_attn.")
        self.attention_out_norm = norm("post_attention_layernorm")
        self.mlp_norm = norm("pre_feedforward_layernorm")
        self.mlp = _mlp(config, f"{prefix}mlp.")
        self.mlp_out_norm = norm("post_feedforward_layernorm")

    def forward(self, x_TD: Tensor, shared: LayerInputs, pool: PoolLayer) -> Tensor:
        attended_TD = self.attention(x_TD, shared, pool, self.attention_norm)
        x_TD = self.attention_out_norm(attended_TD, onto_XD=shared.kept(x_TD))
        return self.mlp_out_norm(self.mlp(x_TD, self.mlp_norm), onto_XD=x_TD)


def _norm(config: GemmaConfig, size: int, prefix: str) -> Callable[[str], OffsetRMSNorm]:
    return lambda name: OffsetRMSNorm(size, config.norm_eps, f"{prefix}{name}")


def _attention(config: GemmaConfig, number: int, prefix: str) -> SelfAttention:
    size, width = config.hidden_size, config.num_heads * config.head_dim
    norm = _norm(config, config.head_dim, prefix)
    return SelfAttention(
        config,
        Scoring(
            config.query_scale**-0.5,
            window=config.window_of(number),
            softcap=config.attention_softcap,
        ),
        qkv=Linear(size, qkv_width(config), qkv_rows(config, prefix), config.attention_bias),
        out=Linear(width, size, f"{prefix}o_proj", config.attention_bias),
        rope=config.local_rope if config.slides[number] else config.rope,
        q_norm=norm("q_norm") if config.qk_norm else None,
        k_norm=norm("k_norm") if config.qk_norm else None,
    )


def _mlp(config: GemmaConfig, prefix: str) -> GatedMlp:
    size, width = config.hidden_size, config.intermediate_size
    return GatedMlp(
        GatedLinear(config.activation, size, width, gate_up_rows(prefix, width)),
        Linear(width, size, f"{prefix}down_proj"),
    )


def _make_embedding(config: GemmaConfig) -> TokenEmbedding:
    size = config.hidden_size
    return TokenEmbedding(token_table(config, size, "model.embed_tokens", scale=size**0.5))


def _make_head(config: GemmaConfig) -> Head:
    return Head(
        _norm(config, config.hidden_size, "model.")("norm"),
        vocabulary(config, config.hidden_size, "model.embed_tokens"),
        softcap=config.logit_softcap,
    )


PARTS = Parts(_make_embedding, GemmaLayer, _make_head)
