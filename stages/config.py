"""What a checkpoint's config.json says, as one frozen record. Reads no weights, loads no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeserve.errors import ConfigError

SUPPORTED = ("LlamaForCausalLM",)
_COUNTS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_ROPE_FACTORS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""What each type of rope cannot do without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: base and, for longer contexts than trained, how frequencies are scaled."""

    theta: float
    kind: str = "default"
    """"default" | "linear" (positions divided by `factor`) | "llama3" (see `llama.py`)."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder, in Hugging Face's names where they are clear."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    dtype: str
    """Of the checkpoint: a key of `DTYPE_BYTES`."""
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Reads config.json (and generation_config.json, for the end-of-text ids).

        Raises ConfigError for a file that is missing or malformed, and for what is not supported.
        """
        raw = _read_json(Path(folder) / "config.json")
        architecture = (raw.get("architectures") or [raw.get("model_type", "unknown")])[0]
        if architecture not in SUPPORTED:
            raise ConfigError(
                f"{folder}: architecture {architecture} is not supported; "
                f"supported: {', '.join(SUPPORTED)} (Llama, Yi, SmolLM2)"
            )
        try:
            return cls(**_llama_fields(raw, Path(folder)), architecture=architecture)
        except KeyError as error:
            raise ConfigError(
                f"{folder}/config.json has no {error.args[0]!r}; fetch it again with its checkpoint"
            ) from None

    def resolve_dtype(self, wanted: str) -> str:
        """`wanted`, or the checkpoint's own for "auto"."""
        return self.dtype if wanted == "auto" else wanted

    def kv_bytes_per_token_per_layer(self, dtype: str) -> int:
        """K and V of one position in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * DTYPE_BYTES[dtype]


def _llama_fields(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    _check_counts(raw, folder)
    num_heads, hidden_size = raw["num_attention_heads"], raw["hidden_size"]
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{folder}: hidden_act {raw['hidden_act']!r} is not supported; only silu")
    if "quantization_config" in raw:
        raise ConfigError(f"{folder}: quantised weights are not supported; use a full checkpoint")
    return {
        "num_layers": raw["num_hidden_layers"],
        "hidden_size": hidden_size,
        "intermediate_size": raw["intermediate_size"],
        "num_heads": num_heads,
        "num_kv_heads": raw.get("num_key_value_heads") or num_heads,
        "head_dim": raw.get("head_dim") or hidden_size // num_heads,
        "vocab_size": raw["vocab_size"],
        "max_position_embeddings": raw["max_position_embeddings"],
        "rms_norm_eps": raw["rms_norm_eps"],
        "rope": _rope(raw, folder),
        "attention_bias": raw.get("attention_bias", False),
        "mlp_bias": raw.get("mlp_bias", False),
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "dtype": _dtype(raw, folder),
        "eos_token_ids": _eos(raw, folder),
    }


def _check_counts(raw: Mapping[str, Any], folder: Path) -> None:
    for name in _COUNTS:
        if type(raw[name]) is not int or raw[name] < 1:
            raise ConfigError(
                f"{folder}/config.json: {name} is {raw[name]!r}, must be a whole number of at "
                "least 1; fetch the file again"
            )


def _rope(raw: Mapping[str, Any], folder: Path) -> RopeConfig:
    """Both spellings: `rope_parameters` (transformers 5), `rope_theta` with `rope_scaling`."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_FACTORS:
        raise ConfigError(
            f"{folder}: rope type {kind!r} is not supported; supported: {', '.join(_ROPE_FACTORS)}"
        )
    return RopeConfig(
        theta=rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
        kind=kind,
        original_max_position_embeddings=rope.get(
            "original_max_position_embeddings", raw["max_position_embeddings"]
        ),
        **{name: rope[name] for name in _ROPE_FACTORS[kind]},
    )


def _dtype(raw: Mapping[str, Any], folder: Path) -> str:
    dtype = raw.get("dtype", raw.get("torch_dtype")) or "float32"
    if dtype not in DTYPE_BYTES:
        raise ConfigError(
            f"{folder}: dtype {dtype!r} is not supported; supported: {', '.join(DTYPE_BYTES)}"
        )
    return dtype


def _eos(raw: Mapping[str, Any], folder: Path) -> tuple[int, ...]:
    """generation_config.json knows every id that ends a turn; config.json often only one."""
    generation = folder / "generation_config.json"
    eos = _read_json(generation).get("eos_token_id") if generation.exists() else None
    if eos is None:
        eos = raw.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; give a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; fetch it again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object; fetch it again")
    return content
