"""Writes a GGUF file as a Hugging Face folder: safetensors, config and tokenizer.

    python -m pipeserve.stages.checkpoint.convert FILE.gguf FOLDER

Weights are unpacked to bfloat16; those of a file that is float32 or float16 keep their type. It is
transformers that reads the file, and what it leaves behind (experts, windows, scaled rotary
frequencies, biases) it leaves without a word: the model would run, and be another. So only what was
seen to come through whole (tests/stages/test_gguf.py) is converted. Started by
`sources.convert_gguf`.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader
from tokenizers import Tokenizer, pre_tokenizers

from pipeserve.errors import ConfigError
from pipeserve.stages.config.families import read_config

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_REMEDY = "give the model's safetensors folder or hub id"
_READ_FIELDS = (
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "vocab_size",
)
"""Of an architecture: what comes through."""
_LOST_FIELDS: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scale_linear": (1.0,),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.type": ("none",),
    "tensor_data_layout": ("Meta AI original pth",),
}
"""What is lost, and the values with which nothing is. All other fields say something as well."""
_AS_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais")
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b")
"""Of `tokenizer.ggml.pre`, which names how a text is cut into words before byte-level BPE: the rule
of GPT-2, and that with each digit a word. Source: `llm_tokenizer_bpe` in llama-vocab.cpp of
llama.cpp."""
_ROPE_FACTORS = "rope_freqs.weight"
_DTYPE_OF_FILE_TYPE = {0: torch.float32, 1: torch.float16}
"""Of `general.file_type`, as gguf.LlamaFileType counts: ALL_F32 and MOSTLY_F16."""


def convert(gguf: Path, folder: Path) -> None:
    """Raises ConfigError for what does not come through whole; saves no weights then."""
    where = {
        "pretrained_model_name_or_path": str(gguf.parent),
        "gguf_file": gguf.name,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    reader = _open(gguf)
    _check_fields(reader)
    dtype = _DTYPE_OF_FILE_TYPE.get(_field(reader, "general.file_type"), torch.bfloat16)
    config = transformers.AutoConfig.from_pretrained(**where)
    config.dtype = dtype
    rope_factors = _rope_factors(reader)
    if rope_factors:
        config.rope_parameters = _rope_of_factors(config, rope_factors)
    config.architectures = [transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    config.save_pretrained(folder)
    _check_head(reader, read_config(folder).head_dim)

    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    _set_words(reader, tokenizer.backend_tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=dtype)
    _check_tensors(reader, model, num_others=bool(rope_factors))
    # transformers takes what came from GGUF for quantised, and refuses to save it; it is not.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.generation_config.eos_token_id = _ends(reader)
    model.save_pretrained(folder)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes 0600: useless in a shared cache


def _open(gguf: Path) -> GGUFReader:
    try:
        return GGUFReader(gguf)
    except (IndexError, KeyError, ValueError) as error:  # it reads on past the end, or nonsense
        raise ConfigError(f"it breaks off or is damaged ({error}); fetch it again") from None


def _check_fields(reader: GGUFReader) -> None:
    architecture = _field(reader, "general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ConfigError(
            f"its architecture {architecture} does not come through whole, "
            f"{', '.join(_ARCHITECTURES)} do; {_REMEDY}"
        )
    if _field(reader, "general.type") not in (None, "model"):
        raise ConfigError(f"it is of type {_field(reader, 'general.type')}, no model; {_REMEDY}")
    for field in reader.fields:
        prefix, _, name = field.partition(".")
        value = _field(reader, field)
        is_read = prefix != architecture or name in _READ_FIELDS
        if not is_read and value not in _LOST_FIELDS.get(name, ()):
            raise ConfigError(f"its {name} ({value}) would be lost; {_REMEDY}")


def _check_head(reader: GGUFReader, head_dim: int) -> None:
    """A head has one size for queries, keys, values and rotation: transformers reads one or none of
    the four, by architecture."""
    architecture = _field(reader, "general.architecture")
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        size = _field(reader, f"{architecture}.{name}")
        if size not in (None, head_dim):
            raise ConfigError(f"its {name} ({size}) would be taken for {head_dim}; {_REMEDY}")


def _ends(reader: GGUFReader) -> list[int] | None:
    """The tokens that end a text, a turn and a message: llama.cpp ends at each of them."""
    ids = [_field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return list(dict.fromkeys(each for each in ids if each is not None)) or None


def _set_words(reader: GGUFReader, tokenizer: Tokenizer) -> None:
    """For a rule that it does not know transformers takes that of GPT-2: other tokens, as of
    SmolLM2's two newlines before a number."""
    rule = _field(reader, "tokenizer.ggml.pre")
    if _field(reader, "tokenizer.ggml.model") != "gpt2" or rule is None:
        return
    words = json.loads(tokenizer.pre_tokenizer.__getstate__())
    if words["type"] != "ByteLevel" or rule in _AS_GPT2:
        return
    if rule not in _DIGITS_APART:
        raise ConfigError(f"its tokenizer.ggml.pre ({rule}) would be lost; {_REMEDY}")
    as_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=words["add_prefix_space"])
    digits_apart = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits_apart, as_gpt2])


def _rope_factors(reader: GGUFReader) -> list[float]:
    """By how much each pair of dimensions turns more slowly, as Llama 3.1 and later have it; []
    where the file does not say."""
    if _field(reader, "general.architecture") != "llama":
        return []
    for tensor in reader.tensors:
        if tensor.name == _ROPE_FACTORS:
            if tensor.tensor_type != GGMLQuantizationType.F32:
                raise ConfigError(f"its {_ROPE_FACTORS} is {tensor.tensor_type.name}; {_REMEDY}")
            return tensor.data.tolist()
    return []


def _rope_of_factors(
    config: transformers.PreTrainedConfig, factors: list[float]
) -> dict[str, object]:
    """A rope that divides each pair's frequency by its factor, at every length of the context.
    That of Llama 3 makes the same of four numbers, which GGUF does not keep."""
    return {
        "rope_type": "longrope",
        "rope_theta": config.rope_parameters["rope_theta"],
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config.max_position_embeddings,
    }


def _check_tensors(reader: GGUFReader, model: torch.nn.Module, num_others: int) -> None:
    """Every tensor of the file became one of the model, but `num_others`, and none of the model
    was made up."""
    in_file = len(reader.tensors) - num_others
    in_model = len(list(model.parameters()))  # a tied one once
    if in_file != in_model:
        raise ConfigError(
            f"it has {in_file} tensors, its config asks for {in_model}, so some would be lost; "
            f"{_REMEDY}"
        )


def _field(reader: GGUFReader, name: str) -> str | int | None:
    field = reader.get_field(name)
    return None if field is None else field.contents()


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
