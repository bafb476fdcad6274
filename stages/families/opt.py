"""OPT (and Galactica): learned positions, LayerNorm, biases, a plain MLP, tied embeddings.

350M norms after each half instead of before, has no final norm, and its embedding is narrower than
its hidden states.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from pipeserve.stages.attention.kv import PoolLayer
from pipeserve.stages.attention.scoring import Scoring
from pipeserve.stages.backends.activations import ACTIVATIONS
from pipeserve.stages.config.config_file import ConfigFile
from pipeserve.stages.config.model_config import ModelConfig
from pipeserve.stages.families.family import Family
from pipeserve.stages.families.llama import qkv_rows, qkv_width
from pipeserve.stages.layers.ends import Head, TokenEmbedding, token_table, vocabulary
from pipeserve.stages.layers.leaf import Embedding
from pipeserve.stages.layers.linear import Linear
from pipeserve.stages.layers.mlp import Mlp
from pipeserve.stages.layers.norms import LayerNorm
from pipeserve.stages.layers.self_attention import LayerInputs, SelfAttention

_DECODER = "model.decoder"
_OFFSET = 2  # rows of the position table before position 0, left over from padding ids
_EPS = 1e-5  # torch's own default, which OPT's configuration does not name


@dataclass(frozen=True, slots=True, kw_only=True)
class OPTConfig(ModelConfig):
    embedding_size: int
    is_pre_norm: bool
    has_final_norm: bool
    has_bias: bool


def _read_opt(file: ConfigFile) -> OPTConfig:
    """Where the file is silent: what transformers takes."""
    file.only("layer_norm_elementwise_affine", True)
    file.only("head_dim", None)
    file.none_slides()
    is_pre_norm = file.flag("do_layer_norm_before", True)
    return OPTConfig(
        **file.shared_fields(
            norm_eps=_EPS, tied=True, head_dim=file.share_of_head(), max_positions=2048
        ),
        intermediate_size=file.count("ffn_dim"),
        num_kv_heads=file.count("num_attention_heads"),
        activation=file.one_of("activation_function", ACTIVATIONS, "relu"),
        gated_mlp=False,
        embedding_size=file.count("word_embed_proj_dim", file.count("hidden_size")),
        is_pre_norm=is_pre_norm,
        has_final_norm=is_pre_norm and not file.flag("_remove_final_layer_norm", False),
        has_bias=file.flag("enable_bias", True),
    )


class OPTLayer(nn.Module):
    def __init__(self, config: OPTConfig, number: int, prefix: str) -> None:
        super().__init__()
        size, width = config.hidden_size, config.intermediate_size
        self.is_pre_norm = config.is_pre_norm
        self.attention_norm = LayerNorm(size, config.norm_eps, f"{prefix}self_attn_layer_norm")
        self.attention = _attention(config, f"{prefix}self_attn.")
        self.mlp_norm = LayerNorm(size, config.norm_eps, f"{prefix}final_layer_norm")
        self.mlp = Mlp(
            config.activation,
            Linear(size, width, f"{prefix}fc1", config.has_bias),
            Linear(width, size, f"{prefix}fc2", config.has_bias),
        )

    def forward(self, x_TD: Tensor, shared: LayerInputs, pool: PoolLayer) -> Tensor:
        if self.is_pre_norm:
            x_TD = self.attention(self.attention_norm(x_TD), shared, pool, onto_TD=x_TD)
            return self.mlp(self.mlp_norm(x_TD), onto_TD=x_TD)
        x_TD = self.attention_norm(self.attention(x_TD, shared, pool, onto_TD=x_TD))
        return self.mlp_norm(self.mlp(x_TD, onto_TD=x_TD))


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


OPT = Family(
    name="OPT",
    architectures=("OPTForCausalLM",),
    model_type="opt",
    models="OPT 125M to 66B, Galactica",
    differs="learned positions, LayerNorm, ReLU MLP, biases; 350M: post-norm, narrow embedding",
    layers=f"{_DECODER}.layers",
    read_config=_read_opt,
    make_embedding=_make_embedding,
    make_layer=OPTLayer,
    make_head=_make_head,
)
