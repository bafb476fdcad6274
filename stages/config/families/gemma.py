"""Gemma 2 and 3 (text): norms before and after each half, scaled embeddings, windows in turn.

Gemma 2 caps scores and logits; Gemma 3 norms queries and keys, and its sliding layers have a rope
of their own.
"""

from dataclasses import dataclass, replace

from pipeserve.errors import ConfigError
from pipeserve.stages.config.config_file import ConfigFile
from pipeserve.stages.config.families.family import Family
from pipeserve.stages.config.model_config import ACTIVATION_NAMES, ModelConfig, RopeConfig
from pipeserve.stages.config.rope_keys import read_rope, rope_from

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
        activation=file.one_of("hidden_activation", ACTIVATION_NAMES, "gelu_pytorch_tanh"),
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


GEMMA2 = Family(
    name="Gemma 2",
    architectures=("Gemma2ForCausalLM",),
    model_type="gemma2",
    models="Gemma 2 2B, 9B, 27B",
    differs="four norms of 1 + w, tanh GELU, scaled embedding, soft caps, every other layer slides",
    layers="model.layers",
    parts="gemma",
    read_config=_read_gemma2,
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
