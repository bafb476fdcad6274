"""OPT (and Galactica): learned positions, LayerNorm, biases, a plain MLP, tied embeddings.

350M norms after each half instead of before, has no final norm, and its embedding is narrower than
its hidden states.
"""

from torch import Tensor

from pipeserve.stages.attention.kv import PoolLayer
from pipeserve.stages.attention.scoring import Scoring
from pipeserve.stages.config.families.opt import OPTConfig
from pipeserve.stages.families.llama import qkv_rows, qkv_width
from pipeserve.stages.families.parts import Parts
from pipeserve.stages.layers.decoder_layer import DecoderLayer, PreNormLayer
from pipeserve.stages.layers.ends import Head, TokenEmbedding, token_table, vocabulary
from pipeserve.stages.layers.leaf import Embedding
from pipeserve.stages.layers.linear import Linear
from pipeserve.stages.layers.mlp import Mlp
from pipeserve.stages.layers.norms import LayerNorm
from pipeserve.stages.layers.self_attention import LayerInputs, SelfAttention

_DECODER = "model.decoder"
_OFFSET = 2  # rows of the position table before position 0, left over from padding ids


class _PostNormLayer(DecoderLayer):
    def forward(self, x_TD: Tensor, shared: LayerInputs, pool: PoolLayer) -> Tensor:
        x_TD = self.attention_norm(self.attention(x_TD, shared, pool, onto_TD=x_TD))
        return self.mlp_norm(self.mlp(x_TD, onto_TD=x_TD))


def _make_layer(config: OPTConfig, number: int, prefix: str) -> DecoderLayer:
    size, width = config.hidden_size, config.intermediate_size
    kind = PreNormLayer if config.is_pre_norm else _PostNormLayer
    return kind(
        LayerNorm(size, config.norm_eps, f"{prefix}self_attn_layer_norm"),
        _attention(config, f"{prefix}self_attn."),
        LayerNorm(size, config.norm_eps, f"{prefix}final_layer_norm"),
        Mlp(
            config.activation,
            Linear(size, width, f"{prefix}fc1", config.has_bias),
            Linear(width, size, f"{prefix}fc2", config.has_bias),
        ),
    )


def _attention(config: OPTConfig, prefix: str) -> SelfAttention:
    size = config.hidden_size
    return SelfAttention(
        config,
        Scoring(config.head_dim**-0.5),
        qkv=Linear(size, qkv_width(config), qkv_rows(config, prefix), config.has_bias),
        out=Linear(size, size, f"{prefix}out_proj", config.has_bias),
        rope=None,
    )


def _make_embedding(config: OPTConfig) -> TokenEmbedding:
    size, narrow = config.hidden_size, config.embedding_size
    return TokenEmbedding(
        token_table(config, narrow, f"{_DECODER}.embed_tokens"),
        projection=Linear(narrow, size, f"{_DECODER}.project_in") if narrow != size else None,
        positions=Embedding(
            config.max_position_embeddings + _OFFSET, size, f"{_DECODER}.embed_positions"
        ),
        offset=_OFFSET,
    )


def _make_head(config: OPTConfig) -> Head:
    size, narrow = config.hidden_size, config.embedding_size
    norm = (
        LayerNorm(size, config.norm_eps, f"{_DECODER}.final_layer_norm")
        if config.has_final_norm
        else None
    )
    return Head(
        norm,
        vocabulary(config, narrow, f"{_DECODER}.embed_tokens"),
        projection=Linear(size, narrow, f"{_DECODER}.project_out") if narrow != size else None,
    )


PARTS = Parts(_make_embedding, _make_layer, _make_head)
