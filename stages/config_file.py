"""Reading config.json: what families share, and one clear line for what is wrong in it."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pipeserve.errors import ConfigError
from pipeserve.stages.config import DTYPE_BYTES, RopeConfig

_ROPE_FACTORS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""What each type of rope cannot do without."""


class ConfigFile:
    """config.json of a model folder. Every method raises ConfigError, naming the file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.json"
        _check_is_model(folder)
        self.raw = _read_json(self.path)
        self.architecture = (self.raw.get("architectures") or [self.raw.get("model_type")])[0]
        if "quantization_config" in self.raw:
            raise ConfigError(
                f"{folder}: quantised weights are not supported; use a full checkpoint"
            )

    def get(self, name: str, default: Any = None) -> Any:
        """`default` where the key is missing or null."""
        value = self.raw.get(name)
        return default if value is None else value

    def require(self, name: str) -> Any:
        """The value of a key that must be there."""
        if name not in self.raw:
            raise ConfigError(f"{self.path} has no {name!r}; fetch it again with its checkpoint")
        return self.raw[name]

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1; must be there where no default is given."""
        value = self.require(name) if default is None else self.get(name, default)
        if type(value) is not int or value < 1:
            raise ConfigError(
                f"{self.path}: {name} is {value!r}, must be a whole number of at least 1; "
                "fetch the file again"
            )
        return value

    def one_of(self, name: str, supported: Collection[Any], default: Any) -> Any:
        """A value that must be among `supported`."""
        value = self.get(name, default)
        if value not in supported:
            raise ConfigError(
                f"{self.path}: {name} {value!r} is not supported; supported: "
                f"{', '.join(map(str, supported))}"
            )
        return value

    def shared_fields(
        self, *, norm_eps: float, tied: bool, max_positions: int | None = None
    ) -> dict[str, Any]:
        """Fields of `ModelConfig` that every family spells alike. `tied`, `max_positions`: what
        transformers takes where the file is silent."""
        num_heads, hidden_size = self.count("num_attention_heads"), self.count("hidden_size")
        if self.get("head_dim") is None and hidden_size % num_heads:
            raise ConfigError(
                f"{self.path}: hidden_size {hidden_size} is no multiple of the {num_heads} "
                "attention heads; fetch the file again"
            )
        return {
            "architecture": self.architecture,
            "num_layers": self.count("num_hidden_layers"),
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "head_dim": self.count("head_dim", hidden_size // num_heads),
            "vocab_size": self.count("vocab_size"),
            "max_position_embeddings": self.count("max_position_embeddings", max_positions),
            "norm_eps": norm_eps,
            "tie_word_embeddings": self.get("tie_word_embeddings", tied),
            "dtype": self._dtype(),
            "eos_token_ids": self._eos(),
        }

    def rope(self, default_theta: float = 10000.0) -> RopeConfig:
        """Both spellings: `rope_parameters` (transformers 5), `rope_theta` with `rope_scaling`."""
        rope = self.get("rope_parameters") or self.get("rope_scaling") or {}
        return self.rope_from({"rope_theta": self.get("rope_theta", default_theta), **rope})

    def rope_from(self, rope: Mapping[str, Any]) -> RopeConfig:
        """`rope`: with a `rope_theta`."""
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in _ROPE_FACTORS:
            raise ConfigError(
                f"{self.path}: rope type {kind!r} is not supported; supported: "
                f"{', '.join(_ROPE_FACTORS)}"
            )
        part = rope.get("partial_rotary_factor", self.get("partial_rotary_factor", 1.0))
        if part != 1.0:
            raise ConfigError(
                f"{self.path}: partial_rotary_factor {part} is not supported; supported: 1.0"
            )
        missing = [name for name in _ROPE_FACTORS[kind] if name not in rope]
        if missing:
            raise ConfigError(
                f"{self.path}: rope type {kind!r} has no {missing[0]!r}; fetch the file again"
            )
        return RopeConfig(
            theta=rope["rope_theta"],
            kind=kind,
            original_max_position_embeddings=rope.get(
                "original_max_position_embeddings", self.get("max_position_embeddings", 0)
            ),
            **{name: rope[name] for name in _ROPE_FACTORS[kind]},
        )

    def windows(self, window: int | None, slides: Collection[bool]) -> tuple[int | None, ...]:
        """For each layer `window` where it slides. One that no position can leave is none."""
        if window is None or window >= self.get("max_position_embeddings", window + 1):
            return ()
        return tuple(window if each else None for each in slides)

    def _dtype(self) -> str:
        dtype = self.get("dtype", self.get("torch_dtype", "float32"))
        if dtype not in DTYPE_BYTES:
            raise ConfigError(
                f"{self.path}: dtype {dtype!r} is not supported; supported: "
                f"{', '.join(DTYPE_BYTES)}"
            )
        return dtype

    def _eos(self) -> tuple[int, ...]:
        """generation_config.json knows every id that ends a turn; config.json often only one."""
        generation = self.path.with_name("generation_config.json")
        eos = _read_json(generation).get("eos_token_id") if generation.exists() else None
        if eos is None:
            eos = self.get("eos_token_id", [])
        return tuple(eos) if isinstance(eos, list) else (eos,)


def _check_is_model(folder: Path) -> None:
    adapter = folder / "adapter_config.json"
    if adapter.exists() and not (folder / "config.json").exists():
        base = _read_json(adapter).get("base_model_name_or_path") or "its base model"
        raise ConfigError(
            f"{folder} holds an adapter for {base}, not a model; merge the two "
            "(merge_and_unload of peft) and give the merged folder"
        )


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
