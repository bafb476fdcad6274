"""Qwen 2, 2.5 and 3: Llamas with biases on Q, K and V (2), or norms on Q and K (3)."""

from dataclasses import replace

from pipeserve.errors import ConfigError
from pipeserve.stages.config import ExpertsConfig
from pipeserve.stages.config_file import ConfigFile
from pipeserve.stages.families.llama import LLAMA, ExpertNames, LlamaConfig, read_config


def _windows(file: ConfigFile) -> tuple[int | None, ...]:
    """The first `max_window_layers` layers see everything, unless each layer's kind is listed."""
    if not file.flag("use_sliding_window", False):
        return ()
    full = file.get("max_window_layers", 28)
    slides = file.slides(i >= full for i in range(file.count("num_hidden_layers")))
    return file.windows(file.raw.get("sliding_window", 4096), slides)


def _read_qwen2(file: ConfigFile) -> LlamaConfig:
    return read_config(file, qkv_bias=True, windows=_windows(file))


def _read_qwen3(file: ConfigFile) -> LlamaConfig:
    bias = file.flag("attention_bias", False)
    return read_config(
        file,
        head_dim=file.count("head_dim", 128),
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        windows=_windows(file),
    )


def _read_qwen3_moe(file: ConfigFile) -> LlamaConfig:
    if file.get("decoder_sparse_step", 1) != 1 or file.get("mlp_only_layers", []):
        raise ConfigError(
            f"{file.path}: layers without experts (decoder_sparse_step, mlp_only_layers) are not "
            "supported in Qwen3-MoE; use a checkpoint with experts in every layer"
        )
    bias = file.flag("attention_bias", False)
    experts = "num_experts" if "num_experts" in file.raw else "num_local_experts"
    window = file.raw.get("sliding_window", 4096)
    if not file.flag("use_sliding_window", False):
        window = None
    return read_config(
        file,
        intermediate_size=file.count("moe_intermediate_size"),
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        windows=file.windows(window, [True] * file.count("num_hidden_layers")),
        experts=ExpertsConfig(
            num_experts=file.count(experts),
            num_taken=file.count("num_experts_per_tok"),
            normalize=file.flag("norm_topk_prob", False),
        ),
        expert_names=ExpertNames(block="mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    )


QWEN2 = replace(
    LLAMA,
    name="Qwen2",
    architectures=("Qwen2ForCausalLM",),
    models="Qwen 2, Qwen 2.5",
    differs="biases on Q, K, V; sliding window in the later layers, where switched on",
    read_config=_read_qwen2,
)
QWEN3 = replace(
    LLAMA,
    name="Qwen3",
    architectures=("Qwen3ForCausalLM",),
    models="Qwen 3",
    differs="RMSNorm on each query and key head",
    read_config=_read_qwen3,
)
QWEN3_MOE = replace(
    LLAMA,
    name="Qwen3-MoE",
    architectures=("Qwen3MoeForCausalLM",),
    models="Qwen3-30B-A3B, Qwen3-235B-A22B",
    differs="Qwen3 with experts, all of a layer's on its stage",
    read_config=_read_qwen3_moe,
)
