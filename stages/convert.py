"""Writes a Llama GGUF file as a Hugging Face folder: bf16 safetensors, config and tokenizer.

    python -m pipeserve.stages.convert FILE.gguf FOLDER

Started by `sources.convert_gguf`.
"""

import sys
from pathlib import Path

import torch
import transformers


def convert(gguf: Path, folder: Path) -> None:
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)

    # A model that came from GGUF refuses to be saved ("quantized with gguf and is not
    # serializable"), though its weights are dequantised: move them into a fresh model.
    fields = loaded.config.to_dict()
    fields.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.config.dtype = torch.bfloat16

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes 0600: useless in a shared cache


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
