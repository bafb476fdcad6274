"""OPT (and Galactica): learned positions, LayerNorm, biases, a plain MLP, tied embeddings.

350M norms after each half instead of before, has no final norm, and its embedding is narrower than
its hidden states.
"""

from dataclasses import dataclass

from pipeserve.stages.config.config_file import ConfigFile
from pipeserve.stages.config.families.family import Family
from pipeserve.stages.config.model_config import ACTIVATION_NAMES, ModelConfig

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
        activation=file.one_of("activation_function", ACTIVATION_NAMES, "relu"),
        gated_mlp=False,
        embedding_size=file.count("word_embed_proj_dim", file.count("hidden_size")),
        is_pre_norm=is_pre_norm,
        has_final_norm=is_pre_norm and not file.flag("_remove_final_layer_norm", False),
        has_bias=file.flag("enable_bias", True),
    )


OPT = Family(
    name="OPT",
    architectures=("OPTForCausalLM",),
    model_type="opt",
    models="OPT 125M to 66B, Galactica",
    differs="learned positions, LayerNorm, ReLU MLP, biases; 350M: post-norm, narrow embedding",
    layers="model.decoder.layers",
    parts="opt",
    read_config=_read_opt,
)
