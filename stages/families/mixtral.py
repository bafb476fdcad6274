"""Mixtral: a Mistral with experts in the place of its MLP."""

from dataclasses import replace

from pipeserve.stages.config import ExpertsConfig
from pipeserve.stages.config_file import ConfigFile
from pipeserve.stages.families.llama import LLAMA, ExpertNames, LlamaConfig, read_config


def _read_mixtral(file: ConfigFile) -> LlamaConfig:
    slides = [True] * file.count("num_hidden_layers")
    return read_config(
        file,
        rope=file.rope(default_theta=1e6),
        windows=file.windows(file.get("sliding_window"), slides),
        experts=ExpertsConfig(
            num_experts=file.count("num_local_experts", 8),
            num_taken=file.count("num_experts_per_tok", 2),
            normalize=True,
        ),
        expert_names=ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2"),
    )


MIXTRAL = replace(
    LLAMA,
    name="Mixtral",
    architectures=("MixtralForCausalLM",),
    models="Mixtral 8x7B, 8x22B",
    differs="experts, all of a layer's on its stage; sliding window, where given",
    read_config=_read_mixtral,
)
