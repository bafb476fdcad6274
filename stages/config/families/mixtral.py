"""Mixtral: a Mistral with experts in the place of its MLP."""

from dataclasses import replace

from pipeserve.stages.config.config_file import ConfigFile
from pipeserve.stages.config.families.llama import LLAMA, ExpertNames, LlamaConfig, read_config
from pipeserve.stages.config.model_config import ExpertsConfig
from pipeserve.stages.config.rope_keys import read_rope


def _read_mixtral(file: ConfigFile) -> LlamaConfig:
    return read_config(
        file,
        rope=read_rope(file, file.head_dim(), theta=1e6),
        num_kv_heads=8,
        windows=file.all_slide(file.value("sliding_window")),
        experts=ExpertsConfig(
            # Either name is the same attribute of transformers; the other comes last and wins.
            num_experts=file.count("num_experts", file.count("num_local_experts", 8)),
            num_taken=file.count("num_experts_per_tok", 2),
            normalize=True,
        ),
        expert_names=ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2"),
    )


MIXTRAL = replace(
    LLAMA,
    name="Mixtral",
    architectures=("MixtralForCausalLM",),
    model_type="mixtral",
    models="Mixtral 8x7B, 8x22B",
    differs="experts, all of a layer's on its stage; sliding window, where given",
    read_config=_read_mixtral,
)
