"""Phi-3: a Llama whose checkpoint keeps Q, K, V in one tensor and gate and up in another."""

from dataclasses import replace

from pipeserve.errors import ConfigError
from pipeserve.stages.config.config_file import ConfigFile
from pipeserve.stages.config.families.llama import LLAMA, LlamaConfig, read_config
from pipeserve.stages.config.rope_keys import read_rope

_LONGROPE = {"su": "longrope", "yarn": "longrope"}  # as the first files called it


def _read_phi3(file: ConfigFile) -> LlamaConfig:
    rope = read_rope(file, file.head_dim(), trained=4096, rotates_part=True, other_names=_LONGROPE)
    if rope.kind not in ("default", "longrope"):
        raise ConfigError(
            f"{file.path}: rope type {rope.kind!r} (rope_parameters, rope_scaling) is none of "
            "Phi-3's; give default or longrope"
        )
    windows = file.all_slide(file.value("sliding_window"))
    return read_config(file, rope=rope, is_fused=True, windows=windows)


PHI3 = replace(
    LLAMA,
    name="Phi-3",
    architectures=("Phi3ForCausalLM",),
    model_type="phi3",
    models="Phi-3 mini and medium, Phi-4, Phi-4 mini (128k ones: up to 4k)",
    differs="fused tensors; sliding window, where given",
    read_config=_read_phi3,
)
