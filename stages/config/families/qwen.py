"""Qwen 2, 2.5 and 3: Llamas with biases on Q, K and V (2), or norms on Q and K (3)."""

from dataclasses import replace

from pipeserve.errors import ConfigError
from pipeserve.stages.config.config_file import ConfigFile
from pipeserve.stages.config.families.llama import LLAMA, ExpertNames, LlamaConfig, read_config
from pipeserve.stages.config.model_config import ExpertsConfig


def _windows(file: ConfigFile) -> tuple[int | None, ...]:
    """The first `max_window_layers` layers see everything, unless each layer's kind is listed."""
    window = file.value("sliding_window", 4096)
    if not file.flag("use_sliding_window", False):
        window = None
    full = file.whole("max_window_layers", 28)
    has_window = window is not None
    layers = range(file.count("num_hidden_layers"))
    slides = file.slides(has_window and i >= full for i in layers)
    if any(slides) and not has_window:
        raise ConfigError(
            f"{file.path}: layer_types has layers that slide, and use_sliding_window and "
            "sliding_window give no window; fetch the file again"
        )
    return file.windows(window, slides)


def _read_qwen2(file: ConfigFile) -> LlamaConfig:
    return read_config(file, num_kv_heads=32, qkv_bias=True, windows=_windows(file))


def _read_qwen3(file: ConfigFile) -> LlamaConfig:
    bias = file.flag("attention_bias", False)
    return read_config(
        file,
        head_dim=128,
        num_kv_heads=32,
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        windows=_windows(file),
    )


def _read_qwen3_moe(file: ConfigFile) -> LlamaConfig:
    if file.whole("decoder_sparse_step", 1) != 1 or file.get("mlp_only_layers", []):
        raise ConfigError(
            f"{file.path}: layers without experts (decoder_sparse_step, mlp_only_layers) are not "
            "supported in Qwen3-MoE; use a checkpoint with experts in every layer"
        )
    bias = file.flag("attention_bias", False)
    window = file.value("sliding_window", 4096)
    if not file.flag("use_sliding_window", False):
        window = None
    return read_config(
        file,
        intermediate_size=file.count("moe_intermediate_size"),
        num_kv_heads=4,
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        windows=file.all_slide(window),
        experts=ExpertsConfig(
            # Either name is the same attribute of transformers; the other comes last and wins.
            num_experts=file.count("num_local_experts", file.count("num_experts", 128)),
            num_taken=file.count("num_experts_per_tok", 8),
            normalize=file.flag("norm_topk_prob", False),
        ),
        expert_names=ExpertNames(block="mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    )


QWEN2 = replace(
    LLAMA,
    name="Qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_type="qwen2",
    models="Qwen 2, Qwen 2.5",
    differs="biases on Q, K, V; sliding window in the later layers, where switched on",
    read_config=_read_qwen2,
)
QWEN3 = replace(
    LLAMA,
    name="Qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_type="qwen3",
    models="Qwen 3",
    differs="RMSNorm on each query and key head",
    read_config=_read_qwen3,
)
QWEN3_MOE = replace(
    LLAMA,
    name="Qwen3-MoE",
    architectures=("Qwen3MoeForCausalLM",),
    model_type="qwen3_moe",
    models="Qwen3-30B-A3B, Qwen3-235B-A22B",
    differs="Qwen3 with experts, all of a layer's on its stage",
    read_config=_read_qwen3_moe,
)
