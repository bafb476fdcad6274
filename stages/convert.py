"""Writes a GGUF file as a Hugging Face folder: safetensors, config and tokenizer.

    python -m pipeserve.stages.convert FILE.gguf FOLDER

Weights are unpacked to bfloat16; those of a file that is float32 or float16 keep their type.
Started by `sources.convert_gguf`.
"""

import sys
from pathlib import Path

import torch
import transformers
from gguf import GGUFReader

from pipeserve.errors import ConfigError
from pipeserve.stages.config import ModelConfig

_DTYPE_OF_FILE_TYPE = {0: torch.float32, 1: torch.float16}
"""Of `general.file_type`, as gguf.LlamaFileType counts: ALL_F32 and MOSTLY_F16."""
_ROPE_TENSORS = ("rope_freqs", "rope_factors")


def convert(gguf: Path, folder: Path) -> None:
    """Raises ConfigError, before weights are unpacked, if the model's family is not supported."""
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    reader = GGUFReader(gguf)
    _check_rope(reader)
    dtype = _dtype(reader)
    config = transformers.AutoConfig.from_pretrained(**where)
    config.dtype = dtype
    config.architectures = [transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    config.save_pretrained(folder)
    ModelConfig.from_folder(folder)

    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=dtype)
    # transformers takes what came from GGUF for quantised, and refuses to save it; it is not.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes 0600: useless in a shared cache


def _check_rope(reader: GGUFReader) -> None:
    """Raises ConfigError for scaled rotary frequencies (Llama 3.1 and later, YaRN), which
    transformers leaves behind without a word: the model would run, and be another."""
    lost = [name for name in reader.fields if name.endswith(".rope.scaling.type")]
    lost = [name for name in lost if reader.get_field(name).contents() != "none"]
    lost += [tensor.name for tensor in reader.tensors if tensor.name.startswith(_ROPE_TENSORS)]
    if lost:
        raise ConfigError(
            f"its rotary embedding is scaled ({lost[0]}), which is not read from GGUF files; give "
            "the model's safetensors folder or hub id"
        )


def _dtype(reader: GGUFReader) -> torch.dtype:
    field = reader.get_field("general.file_type")
    file_type = None if field is None else int(field.contents())
    return _DTYPE_OF_FILE_TYPE.get(file_type, torch.bfloat16)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
