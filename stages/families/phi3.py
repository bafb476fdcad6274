"""Phi-3: a Llama whose checkpoint keeps Q, K, V in one tensor and gate and up in another."""

from dataclasses import replace

from pipeserve.stages.config_file import ConfigFile
from pipeserve.stages.families.llama import LLAMA, LlamaConfig, read_config


def _read_phi3(file: ConfigFile) -> LlamaConfig:
    """Refuses longrope: it turns every position by the context's length, cached ones included."""
    slides = [True] * file.count("num_hidden_layers")
    return read_config(
        file, is_fused=True, windows=file.windows(file.get("sliding_window"), slides)
    )


PHI3 = replace(
    LLAMA,
    name="Phi-3",
    architectures=("Phi3ForCausalLM",),
    models="Phi-3 mini and medium 4k, Phi-4 (not the 128k ones: longrope)",
    differs="fused tensors; sliding window, where given",
    read_config=_read_phi3,
)
