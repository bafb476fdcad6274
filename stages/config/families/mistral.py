"""Mistral: a Llama whose queries see a sliding window, where config.json gives one."""

from dataclasses import replace

from pipeserve.stages.config.config_file import ConfigFile
from pipeserve.stages.config.families.llama import LLAMA, LlamaConfig, read_config

_WINDOW = 4096  # of v0.1, which transformers takes where the file is silent; null is none


def _read_mistral(file: ConfigFile) -> LlamaConfig:
    window = file.value("sliding_window", _WINDOW)
    return read_config(file, num_kv_heads=8, windows=file.all_slide(window))


MISTRAL = replace(
    LLAMA,
    name="Mistral",
    architectures=("MistralForCausalLM",),
    model_type="mistral",
    models="Mistral 7B v0.1 to v0.3, Mistral NeMo",
    differs="sliding window in every layer, or none",
    read_config=_read_mistral,
)
