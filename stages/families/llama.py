"""Llama 1-3, Yi, SmolLM2, and the layer of all that follow them closely.

Pre-norm RMSNorm, rotary positions, grouped-query attention, gated MLP or experts.
"""

from pipeserve.stages.attention.scoring import Scoring
from pipeserve.stages.config.families.llama import LlamaConfig
from pipeserve.stages.config.model_config import ModelConfig
from pipeserve.stages.families.parts import Parts
from pipeserve.stages.layers.decoder_layer import PreNormLayer
from pipeserve.stages.layers.ends import Head, TokenEmbedding, token_table, vocabulary
from pipeserve.stages.layers.leaf import Rows, whole
from pipeserve.stages.layers.linear import GatedLinear, Linear
from pipeserve.stages.layers.mlp import Experts, GatedMlp
from pipeserve.stages.layers.norms import RMSNorm
from pipeserve.stages.layers.self_attention import SelfAttention


def _make_layer(config: LlamaConfig, number: int, prefix: str) -> PreNormLayer:
    size, eps = config.hidden_size, config.norm_eps
    is_dense = config.experts is None
    return PreNormLayer(
        RMSNorm(size, eps, f"{prefix}input_layernorm"),
        _attention(config, number, f"{prefix}self_attn."),
        RMSNorm(size, eps, f"{prefix}post_attention_layernorm"),
        gated_mlp(config, f"{prefix}mlp.") if is_dense else _experts(config, prefix),
    )


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


PARTS = Parts(make_embedding, _make_layer, make_head)
