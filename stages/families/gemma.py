"""Gemma 2 and 3 (text): norms before and after each half, scaled embeddings, windows in turn.

Gemma 2 caps scores and logits; Gemma 3 norms queries and keys, and its sliding layers have a rope
of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from pipeserve.errors import ConfigError
from pipeserve.stages.attention.kv import PoolLayer
from pipeserve.stages.attention.scoring import Scoring
from pipeserve.stages.backends.activations import ACTIVATIONS
from pipeserve.stages.config.config_file import ConfigFile
from pipeserve.stages.config.model_config import ModelConfig, RopeConfig
from pipeserve.stages.config.rope_keys import read_rope, rope_from
from pipeserve.stages.families.family import Family
from pipeserve.stages.families.llama import gate_up_rows, qkv_rows, qkv_width
from pipeserve.stages.layers.ends import Head, TokenEmbedding, token_table, vocabulary
from pipeserve.stages.layers.linear import GatedLinear, Linear
from pipeserve.stages.layers.mlp import GatedMlp
from pipeserve.stages.layers.norms import OffsetRMSNorm
from pipeserve.stages.layers.self_attention import LayerInputs, SelfAttention

_HEAD_DIM = 256  # where the file is silent


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
    file.only("use_bidirectional_attention", None, False)
    slides = differs["slides"]
    window = file.value("sliding_window", 4096)
    if window is None and any(slides):
        raise ConfigError(
            f"{file.path}: sliding_window is null, and layer_types has layers that slide; "
            "fetch the file again"
        )
    return GemmaConfig(
        **file.shared_fields(
            norm_eps=file.number("rms_norm_eps"),
            tied=True,
            head_dim=file.head_dim(_HEAD_DIM),
            ropes=[differs["rope"], differs["local_rope"]],
        ),
        intermediate_size=file.count("intermediate_size"),
        num_kv_heads=file.count("num_key_value_heads", 4),
        activation=file.one_of("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        attention_bias=file.flag("attention_bias", False),
        query_scale=file.number("query_pre_attn_scalar", 256),
        windows=file.windows(window, slides),
        **differs,
    )


def _slides(file: ConfigFile, period: int) -> tuple[bool, ...]:
    """Unless each layer's kind is listed, every `period`-th layer sees everything."""
    return file.slides((i + 1) % period != 0 for i in range(file.count("num_hidden_layers")))


def _cap(file: ConfigFile, name: str, default: float | None) -> float | None:
    """Null is none."""
    return None if file.value(name, default) is None else file.number(name, default)


def _read_gemma2(file: ConfigFile) -> GemmaConfig:
    rope = read_rope(file, file.head_dim(_HEAD_DIM))
    return _read(
        file,
        slides=_slides(file, 2),
        rope=rope,
        local_rope=rope,
        attention_softcap=_cap(file, "attn_logit_softcapping", 50.0),
        logit_softcap=_cap(file, "final_logit_softcapping", 30.0),
        qk_norm=False,
    )


def _read_gemma3(file: ConfigFile) -> GemmaConfig:
    rope, local_rope = _gemma3_ropes(file)
    return _read(
        file,
        slides=_slides(file, file.count("sliding_window_pattern", 6)),
        rope=rope,
        local_rope=local_rope,
        attention_softcap=file.one_of("attn_logit_softcapping", (None,), None),
        logit_softcap=_cap(file, "final_logit_softcapping", None),
        qk_norm=True,
    )


def _gemma3_ropes(file: ConfigFile) -> tuple[RopeConfig, RopeConfig]:
    """Of layers that see everything, and of those that slide. `rope_scaling` is laid over the
    first, as transformers does."""
    head_dim = file.head_dim(_HEAD_DIM)
    ropes = []
    for kind, base, theta in (
        ("full_attention", "rope_theta", 1e6),
        ("sliding_attention", "rope_local_base_freq", 1e4),
    ):
        rope = file.mapping("rope_parameters", kind) or {"rope_type": "default"}
        if kind == "full_attention":
            rope = {**rope, **file.mapping("rope_scaling")}
        if rope.get("truncate", True) is not True:
            raise ConfigError(
                f"{file.path}: truncate {rope['truncate']!r} in rope_parameters is not supported "
                "in Gemma 3; supported: true"
            )
        rope = {"rope_theta": file.value(base, theta), **rope}
        ropes.append(rope_from(file, rope, head_dim))
    return ropes[0], ropes[1]


class GemmaLayer(nn.Module):
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
        attended_TD = self.attention(self.attention_norm(x_TD), shared, pool)
        x_TD = self.attention_out_norm(attended_TD, onto_XD=x_TD)
        return self.mlp_out_norm(self.mlp(self.mlp_norm(x_TD)), onto_XD=x_TD)


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


GEMMA2 = Family(
    name="Gemma 2",
    architectures=("Gemma2ForCausalLM",),
    model_type="gemma2",
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
    model_type="gemma3_text",
    models="Gemma 3 270M, 1B (text; not the ones with images)",
    differs="Gemma 2 with norms on Q and K for soft caps; five of six layers slide, with own rope",
    read_config=_read_gemma3,
)
