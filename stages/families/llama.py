"""Llama 1-3, Yi, SmolLM2, and the layer of all that follow them closely.

Pre-norm RMSNorm, rotary positions, grouped-query attention, gated MLP or experts.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from pipeserve.stages.attention.kv import PoolLayer
from pipeserve.stages.attention.scoring import Scoring
from pipeserve.stages.backends.activations import ACTIVATIONS
from pipeserve.stages.config.config_file import ConfigFile
from pipeserve.stages.config.model_config import ModelConfig, RopeConfig
from pipeserve.stages.config.rope_keys import read_rope
from pipeserve.stages.families.family import Family
from pipeserve.stages.layers.ends import Head, TokenEmbedding, token_table, vocabulary
from pipeserve.stages.layers.leaf import Rows, whole
from pipeserve.stages.layers.linear import GatedLinear, Linear
from pipeserve.stages.layers.mlp import Experts, GatedMlp
from pipeserve.stages.layers.norms import RMSNorm
from pipeserve.stages.layers.self_attention import LayerInputs, SelfAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """Of a layer's experts in the checkpoint, behind the layer's prefix."""

    block: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig(ModelConfig):
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """An RMSNorm over each query and key head."""
    is_fused: bool = False
    """The checkpoint keeps Q, K, V in one tensor, gate and up in another."""
    expert_names: ExpertNames | None = None


def read_config(
    file: ConfigFile,
    *,
    rope: RopeConfig | None = None,
    head_dim: int | None = None,
    num_kv_heads: int | None = None,
    **differs: object,
) -> LlamaConfig:
    """`differs`: fields of LlamaConfig that are not Llama's. `head_dim`, `num_kv_heads`: what
    transformers takes where the file is silent."""
    head_dim = file.head_dim(head_dim)
    rope = rope or read_rope(file, head_dim)
    fields = {
        **file.shared_fields(
            norm_eps=file.number("rms_norm_eps"), tied=False, head_dim=head_dim, ropes=[rope]
        ),
        "intermediate_size": file.count("intermediate_size"),
        "num_kv_heads": file.num_kv_heads(num_kv_heads),
        "activation": file.one_of("hidden_act", ACTIVATIONS, "silu"),
        "rope": rope,
        **differs,
    }
    return LlamaConfig(**fields)


def _read_llama(file: ConfigFile) -> LlamaConfig:
    file.none_slides()
    bias = file.flag("attention_bias", False)
    return read_config(file, qkv_bias=bias, out_bias=bias, mlp_bias=file.flag("mlp_bias", False))


class LlamaLayer(nn.Module):
    def __init__(self, config: LlamaConfig, number: int, prefix: str) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.attention_norm = RMSNorm(size, eps, f"{prefix}input_layernorm")
        self.attention = _attention(config, number, f"{prefix}self_attn.")
        self.mlp_norm = RMSNorm(size, eps, f"{prefix}post_attention_layernorm")
        self.mlp = (
            gated_mlp(config, f"{prefix}mlp.")
            if config.experts is None
            else _experts(config, prefix)
        )

    def forward(self, x_TD: Tensor, shared: LayerInputs, pool: PoolLayer) -> Tensor:
        x_TD = self.attention(self.attention_norm(x_TD), shared, pool, onto_TD=x_TD)
        return self.mlp(self.mlp_norm(x_TD), onto_TD=x_TD)


def _attention(config: LlamaConfig, number: int, prefix: str) -> SelfAttention:
    size, head_dim, eps = config.hidden_size, config.head_dim, config.norm_eps
    width = config.num_heads * head_dim
    source = f"{prefix}qkv_proj" if config.is_fused else qkv_rows(config, prefix)
    return SelfAttention(
        config,
        Scoring(head_dim**-0.5, config.window_of(number)),
        qkv=Linear(size, qkv_width(config), source, config.qkv_bias),
        out=Linear(width, size, f"{prefix}o_proj", config.out_bias),
        rope=config.rope,
        q_norm=RMSNorm(head_dim, eps, f"{prefix}q_norm") if config.qk_norm else None,
        k_norm=RMSNorm(head_dim, eps, f"{prefix}k_norm") if config.qk_norm else None,
    )


def qkv_width(config: ModelConfig) -> int:
    return (config.num_heads + 2 * config.num_kv_heads) * config.head_dim


def qkv_rows(config: ModelConfig, prefix: str) -> tuple[Rows, ...]:
    """Of three tensors: q_proj, k_proj, v_proj."""
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    return tuple(whole(f"{prefix}{x}_proj", n * config.head_dim) for x, n in heads.items())


def gated_mlp(config: LlamaConfig, prefix: str) -> GatedMlp:
    size, width = config.hidden_size, config.intermediate_size
    source = f"{prefix}gate_up_proj" if config.is_fused else gate_up_rows(prefix, width)
    return GatedMlp(
        GatedLinear(config.activation, size, width, source, config.mlp_bias),
        Linear(width, size, f"{prefix}down_proj", config.mlp_bias),
    )


def gate_up_rows(
    prefix: str, width: int, gate: str = "gate_proj", up: str = "up_proj"
) -> tuple[Rows, Rows]:
    """Of two tensors."""
    return whole(f"{prefix}{gate}", width), whole(f"{prefix}{up}", width)


def _experts(config: LlamaConfig, prefix: str) -> Experts:
    names, size, width = config.expert_names, config.hidden_size, config.intermediate_size
    experts = []
    for number in range(config.experts.num_experts):
        own = f"{prefix}{names.block}.experts.{number}."
        rows = gate_up_rows(own, width, names.gate, names.up)
        gate_up = GatedLinear(config.activation, size, width, rows)
        experts.append(GatedMlp(gate_up, Linear(width, size, f"{own}{names.down}")))
    router = Linear(size, config.experts.num_experts, f"{prefix}{names.block}.gate")
    return Experts(router, experts, config.experts.num_taken, config.experts.normalize)


def make_embedding(config: ModelConfig) -> TokenEmbedding:
    return TokenEmbedding(token_table(config, config.hidden_size, "model.embed_tokens"))


def make_head(config: ModelConfig) -> Head:
    norm = RMSNorm(config.hidden_size, config.norm_eps, "model.norm")
    return Head(norm, vocabulary(config, config.hidden_size, "model.embed_tokens"))


LLAMA = Family(
    name="Llama",
    architectures=("LlamaForCausalLM",),
    model_type="llama",
    models="Llama 1-3, CodeLlama, Yi, SmolLM2",
    differs="",
    layers="model.layers",
    read_config=_read_llama,
    make_embedding=make_embedding,
    make_layer=LlamaLayer,
    make_head=make_head,
)
