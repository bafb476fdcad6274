"""Falcon: fused Q, K, V in groups, LayerNorm, a plain GELU MLP, mostly beside the attention.

40B, 180B and 11B: the new decoder architecture, grouped queries, attention and MLP side by side
behind two norms (11B: one). 7B: one key and value head, side by side behind one norm. RW: as many
key and value heads as query heads, ALiBi, biases, one after the other.
"""

from dataclasses import dataclass

from pipeserve.stages.config.config_file import ConfigFile
from pipeserve.stages.config.families.family import Family
from pipeserve.stages.config.model_config import ACTIVATION_NAMES, ModelConfig
from pipeserve.stages.config.rope_keys import read_rope


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
        activation=file.one_of("activation", ACTIVATION_NAMES, "gelu"),
        rope=rope,
        gated_mlp=False,
        parallel_attention=is_new or file.flag("parallel_attn", True),
        has_bias=file.flag("bias", False),
        has_two_norms=is_new and file.get("num_ln_in_parallel_attn", 2) == 2,
    )


FALCON = Family(
    name="Falcon",
    architectures=("FalconForCausalLM",),
    model_type="falcon",
    models="Falcon 180B, 40B, 11B, 7B, RW",
    differs="LayerNorm, GELU MLP beside the attention, fused grouped Q, K, V; RW: ALiBi, biases",
    layers="transformer.h",
    parts="falcon",
    read_config=_read_falcon,
)
