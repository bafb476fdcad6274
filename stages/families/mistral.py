"""Mistral: a Llama whose queries see a sliding window, where config.json gives one."""

from dataclasses import replace

from pipeserve.stages.config_file import ConfigFile
from pipeserve.stages.families.llama import LLAMA, LlamaConfig, read_config

_WINDOW = 4096  # of v0.1, which transformers takes where the file is silent; null is none


def _read_mistral(file: ConfigFile) -> LlamaConfig:
    window = file.raw.get("sliding_window", _WINDOW)
    slides = [True] * file.count("num_hidden_layers")
    return read_config(file, windows=file.windows(window, slides))


MISTRAL = replace(
    LLAMA,
    name="Mistral",
    architectures=("MistralForCausalLM",),
    models="Mistral 7B v0.1 to v0.3, Mistral NeMo",
    differs="sliding window in every layer, or none",
    read_config=_read_mistral,
)
