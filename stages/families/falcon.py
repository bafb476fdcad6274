"""Falcon: fused Q, K, V in groups, LayerNorm, a plain GELU MLP, mostly beside the attention.

40B, 180B and 11B: the new decoder architecture, grouped queries, attention and MLP side by side
behind two norms (11B: one). 7B: one key and value head, side by side behind one norm. RW: as many
key and value heads as query heads, ALiBi, biases, one after the other.
"""

from torch import Tensor

from pipeserve.stages.attention.kv import PoolLayer
from pipeserve.stages.attention.scoring import Scoring, alibi_slopes
from pipeserve.stages.config.families.falcon import FalconConfig
from pipeserve.stages.families.llama import qkv_width
from pipeserve.stages.families.parts import Parts
from pipeserve.stages.layers.ends import Head, TokenEmbedding, token_table, vocabulary
from pipeserve.stages.layers.leaf import Rows
from pipeserve.stages.layers.linear import Linear
from pipeserve.stages.layers.mlp import Mlp
from pipeserve.stages.layers.norms import LayerNorm
from pipeserve.stages.layers.part import Part
from pipeserve.stages.layers.self_attention import LayerInputs, SelfAttention


class FalconLayer(Part):
    """Attention and MLP read the same x, or one after the other."""

    def __init__(self, config: FalconConfig, number: int, prefix: str) -> None:
        super().__init__()
        size, width = config.hidden_size, config.intermediate_size
        first, second = "input_layernorm", None
        if config.has_two_norms:
            first, second = "ln_attn", "ln_mlp"
        elif not config.parallel_attention:
            second = "post_attention_layernorm"
        self.is_parallel = config.parallel_attention
        self.attention_norm = LayerNorm(size, config.norm_eps, f"{prefix}{first}")
        self.mlp_norm = LayerNorm(size, config.norm_eps, f"{prefix}{second}") if second else None
        self.attention = _attention(config, f"{prefix}self_attention.")
        self.mlp = Mlp(
            config.activation,
            Linear(size, width, f"{prefix}mlp.dense_h_to_4h", config.has_bias),
            Linear(width, size, f"{prefix}mlp.dense_4h_to_h", config.has_bias),
        )

    def forward(self, x_TD: Tensor, shared: LayerInputs, pool: PoolLayer) -> Tensor:
        normed_TD = self.attention_norm(x_TD)
        attended_TD = self.attention(normed_TD, shared, pool, onto_TD=x_TD)
        if self.mlp_norm is None:
            normed_TD = shared.kept(normed_TD)
        else:
            normed_TD = self.mlp_norm(shared.kept(x_TD) if self.is_parallel else attended_TD)
        return self.mlp(normed_TD, onto_TD=attended_TD)


def _attention(config: FalconConfig, prefix: str) -> SelfAttention:
    size = config.hidden_size
    slopes_N = alibi_slopes(config.num_heads) if config.rope is None else None
    return SelfAttention(
        config,
        Scoring(config.head_dim**-0.5, slopes_N=slopes_N),
        qkv=Linear(size, qkv_width(config), _qkv_rows(config, prefix), config.has_bias),
        out=Linear(size, size, f"{prefix}dense", config.has_bias),
        rope=config.rope,
    )


def _qkv_rows(config: FalconConfig, prefix: str) -> tuple[Rows, ...]:
    """The tensor holds, for each key and value head, its query heads, the key, the value."""
    name, size, group = f"{prefix}query_key_value", config.head_dim, config.num_heads
    group //= config.num_kv_heads
    stride = (group + 2) * size

    def rows(start: int, num_heads: int) -> list[Rows]:
        firsts = [kv * stride + start * size for kv in range(config.num_kv_heads)]
        return [Rows(name, qkv_width(config), i, i + num_heads * size) for i in firsts]

    return (*rows(0, group), *rows(group, 1), *rows(group + 1, 1))


def _make_embedding(config: FalconConfig) -> TokenEmbedding:
    table = token_table(config, config.hidden_size, "transformer.word_embeddings")
    return TokenEmbedding(table)


def _make_head(config: FalconConfig) -> Head:
    norm = LayerNorm(config.hidden_size, config.norm_eps, "transformer.ln_f")
    return Head(norm, vocabulary(config, config.hidden_size, "transformer.word_embeddings"))


PARTS = Parts(_make_embedding, FalconLayer, _make_head)
