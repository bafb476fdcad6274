"""Falcon: fused Q, K, V in groups, LayerNorm, a plain GELU MLP, mostly beside the attention.

40B, 180B and 11B: the new decoder architecture, grouped queries, attention and MLP side by side
behind two norms (11B: one). 7B: one key and value head, side by side behind one norm. RW: as many
key and value heads as query heads, ALiBi, biases, one after the other.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from pipeserve.stages.attention.kv import PoolLayer
from pipeserve.stages.attention.scoring import Scoring, alibi_slopes
from pipeserve.stages.backends.activations import ACTIVATIONS
from pipeserve.stages.config.config_file import ConfigFile
from pipeserve.stages.config.model_config import ModelConfig
from pipeserve.stages.config.rope_keys import read_rope
from pipeserve.stages.families.family import Family
from pipeserve.stages.families.llama import qkv_width
from pipeserve.stages.layers.ends import Head, TokenEmbedding, token_table, vocabulary
from pipeserve.stages.layers.leaf import Rows
from pipeserve.stages.layers.linear import Linear
from pipeserve.stages.layers.mlp import Mlp
from pipeserve.stages.layers.norms import LayerNorm
from pipeserve.stages.layers.self_attention import LayerInputs, SelfAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class FalconConfig(ModelConfig):
    has_bias: bool
    has_two_norms: bool
    """Side by side, attention and MLP behind a norm each."""


def _read_falcon(file: ConfigFile) -> FalconConfig:
    """Where the file is silent: what transformers takes."""
    file.none_slides()
    file.only("head_dim", None)
    num_heads, size = file.count("num_attention_heads"), file.count("hidden_size")
    file.only("n_embed", None, size)
    is_new = file.flag("new_decoder_architecture", False)
    if is_new:
        num_kv_heads = file.count("num_kv_heads", num_heads)
    else:
        num_kv_heads = 1 if file.flag("multi_query", True) else num_heads
    head_dim = file.share_of_head()
    rope = None if file.flag("alibi", False) else read_rope(file, head_dim)
    return FalconConfig(
        **file.shared_fields(
            norm_eps=file.number("layer_norm_epsilon", 1e-5),
            tied=True,
            head_dim=head_dim,
            ropes=[rope] if rope else [],
            max_positions=2048,
        ),
        intermediate_size=file.count("ffn_hidden_size", 4 * size),
        num_kv_heads=num_kv_heads,
        activation=file.one_of("activation", ACTIVATIONS, "gelu"),
        rope=rope,
        gated_mlp=False,
        parallel_attention=is_new or file.flag("parallel_attn", True),
        has_bias=file.flag("bias", False),
        has_two_norms=is_new and file.get("num_ln_in_parallel_attn", 2) == 2,
    )


class FalconLayer(nn.Module):
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
        if self.mlp_norm is not None:
            normed_TD = self.mlp_norm(x_TD if self.is_parallel else attended_TD)
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


FALCON = Family(
    name="Falcon",
    architectures=("FalconForCausalLM",),
    model_type="falcon",
    models="Falcon 180B, 40B, 11B, 7B, RW",
    differs="LayerNorm, GELU MLP beside the attention, fused grouped Q, K, V; RW: ALiBi, biases",
    layers="transformer.h",
    read_config=_read_falcon,
    make_embedding=_make_embedding,
    make_layer=FalconLayer,
    make_head=_make_head,
)
