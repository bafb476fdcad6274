"""Gemma 2 and 3 (text): norms before and after each half, scaled embeddings, windows in turn.

Gemma 2 caps scores and logits; Gemma 3 norms queries and keys, and its sliding layers have a rope
of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from pipeserve.stages.attention import Attention
from pipeserve.stages.config import ModelConfig, RopeConfig
from pipeserve.stages.config_file import ConfigFile
from pipeserve.stages.ends import Head, TokenEmbedding, vocabulary
from pipeserve.stages.families.family import Family
from pipeserve.stages.families.llama import gate_up_rows, qkv_rows, qkv_width
from pipeserve.stages.kv import PoolLayer
from pipeserve.stages.leaf import Embedding
from pipeserve.stages.linear import Linear
from pipeserve.stages.mlp import GatedMlp
from pipeserve.stages.norms import OffsetRMSNorm
from pipeserve.stages.scoring import Scoring
from pipeserve.stages.self_attention import LayerInputs, SelfAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmaConfig(ModelConfig):
    attention_bias: bool
    query_scale: float
    """Queries are divided by its square root (query_pre_attn_scalar)."""
    attention_softcap: float | None
    logit_softcap: float | None
    local_rope: RopeConfig
    """Of layers with a window."""
    qk_norm: bool
    slides: tuple[bool, ...]
    """For each layer whether it is one of the sliding kind."""


def _read(file: ConfigFile, **differs: object) -> GemmaConfig:
    """`differs`: what Gemma 2 and 3 do not share."""
    file.one_of("use_bidirectional_attention", (False,), False)
    return GemmaConfig(
        **file.shared_fields(norm_eps=file.number("rms_norm_eps"), tied=True),
        intermediate_size=file.count("intermediate_size"),
        num_kv_heads=file.count("num_key_value_heads"),
        activation=file.one_of("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh"),
        attention_bias=file.flag("attention_bias", False),
        query_scale=file.number("query_pre_attn_scalar", 256),
        windows=file.windows(file.get("sliding_window", 4096), differs["slides"]),
        **differs,
    )


def _slides(file: ConfigFile, period: int) -> tuple[bool, ...]:
    """Unless each layer's kind is listed, every `period`-th layer sees everything."""
    return file.slides((i + 1) % period != 0 for i in range(file.count("num_hidden_layers")))


def _cap(file: ConfigFile, name: str, default: float | None) -> float | None:
    """Null is none."""
    return None if file.raw.get(name, default) is None else file.number(name, default)


def _read_gemma2(file: ConfigFile) -> GemmaConfig:
    return _read(
        file,
        slides=_slides(file, 2),
        rope=file.rope(),
        local_rope=file.rope(),
        attention_softcap=_cap(file, "attn_logit_softcapping", 50.0),
        logit_softcap=_cap(file, "final_logit_softcapping", 30.0),
        qk_norm=False,
    )


def _read_gemma3(file: ConfigFile) -> GemmaConfig:
    period = file.count("sliding_window_pattern", file.count("_sliding_window_pattern", 6))
    scaled = file.mapping("rope_parameters", "full_attention") or file.mapping("rope_scaling")
    local = file.mapping("rope_parameters", "sliding_attention")
    return _read(
        file,
        slides=_slides(file, period),
        rope=file.rope_from(scaled, file.get("rope_theta", 1e6)),
        local_rope=file.rope_from(local, file.get("rope_local_base_freq", 1e4)),
        attention_softcap=file.one_of("attn_logit_softcapping", (None,), None),
        logit_softcap=_cap(file, "final_logit_softcapping", None),
        qk_norm=True,
    )


class GemmaLayer(nn.Module):
    def __init__(self, config: GemmaConfig, number: int, prefix: str, attention: Attention) -> None:
        super().__init__()
        norm = _norm(config, config.hidden_size, prefix)
        self.attention_norm = norm("input_layernorm")
        self.attention = _attention(config, number, f"{prefix}self_attn.", attention)
        self.attention_out_norm = norm("post_attention_layernorm")
        self.mlp_norm = norm("pre_feedforward_layernorm")
        self.mlp = _mlp(config, f"{prefix}mlp.")
        self.mlp_out_norm = norm("post_feedforward_layernorm")

    def forward(self, x_TD: Tensor, shared: LayerInputs, pool: PoolLayer) -> Tensor:
        attended_TD = self.attention(self.attention_norm(x_TD), shared, pool)
        x_TD = x_TD + self.attention_out_norm(attended_TD)
        return x_TD + self.mlp_out_norm(self.mlp(self.mlp_norm(x_TD)))


def _norm(config: GemmaConfig, size: int, prefix: str) -> Callable[[str], OffsetRMSNorm]:
    return lambda name: OffsetRMSNorm(size, config.norm_eps, f"{prefix}{name}")


def _attention(
    config: GemmaConfig, number: int, prefix: str, attention: Attention
) -> SelfAttention:
    size, width = config.hidden_size, config.num_heads * config.head_dim
    norm = _norm(config, config.head_dim, prefix)
    return SelfAttention(
        config,
        attention,
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
        config.activation,
        Linear(size, 2 * width, gate_up_rows(prefix, width)),
        Linear(width, size, f"{prefix}down_proj"),
    )


def _make_embedding(config: GemmaConfig) -> TokenEmbedding:
    size = config.hidden_size
    return TokenEmbedding(Embedding(config.vocab_size, size, "model.embed_tokens", size**0.5))


def _make_head(config: GemmaConfig) -> Head:
    return Head(
        _norm(config, config.hidden_size, "model.")("norm"),
        vocabulary(config, config.hidden_size, "model.embed_tokens"),
        softcap=config.logit_softcap,
    )


GEMMA2 = Family(
    name="Gemma 2",
    architectures=("Gemma2ForCausalLM",),
    models="Gemma 2 2B, 9B, 27B",
    differs="four norms of 1 + w, tanh GELU, scaled embedding, soft caps, every other layer slides",
    layers="model.layers",
    read_config=_read_gemma2,
    make_embedding=_make_embedding,
    make_layer=GemmaLayer,
    make_head=_make_head,
)
GEMMA3 = replace(
    GEMMA2,
    name="Gemma 3",
    architectures=("Gemma3ForCausalLM",),
    models="Gemma 3 270M, 1B (text; not the ones with images)",
    differs="Gemma 2 with norms on Q and K for soft caps; five of six layers slide, with own rope",
    read_config=_read_gemma3,
)
