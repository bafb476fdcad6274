"""Llama 1-3, Yi, SmolLM2, and the layer of all that follow them closely.

Pre-norm RMSNorm, rotary positions, grouped-query attention, gated MLP or experts.
"""

from dataclasses import dataclass

from pipeserve.stages.config.config_file import ConfigFile
from pipeserve.stages.config.families.family import Family
from pipeserve.stages.config.model_config import ACTIVATION_NAMES, ModelConfig, RopeConfig
from pipeserve.stages.config.rope_keys import read_rope


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
        "activation": file.one_of("hidden_act", ACTIVATION_NAMES, "silu"),
        "rope": rope,
        **differs,
    }
    return LlamaConfig(**fields)


def _read_llama(file: ConfigFile) -> LlamaConfig:
    file.none_slides()
    bias = file.flag("attention_bias", False)
    return read_config(file, qkv_bias=bias, out_bias=bias, mlp_bias=file.flag("mlp_bias", False))


LLAMA = Family(
    name="Llama",
    architectures=("LlamaForCausalLM",),
    model_type="llama",
    models="Llama 1-3, CodeLlama, Yi, SmolLM2",
    differs="",
    layers="model.layers",
    parts="llama",
    read_config=_read_llama,
)
