"""Reading config.json: what families share, and one clear line for what is wrong in it."""

import json
import math
from collections.abc import Collection, Iterable
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

_SLIDING = "sliding_attention"
_LAYER_KINDS = ("full_attention", _SLIDING)


class ConfigFile:
    """config.json of a model folder. Every method raises ConfigError, naming the file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.json"
        _check_is_model(folder)
        self.raw = _read_json(self.path)
        self.architecture = self._architecture()
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

    def number(self, name: str, default: float | None = None) -> float:
        """Over 0; must be there where no default is given."""
        value = self.require(name) if default is None else self.get(name, default)
        return self._positive(name, value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if type(value) is not bool:
            raise ConfigError(
                f"{self.path}: {name} is {value!r}, must be true or false; fetch the file again"
            )
        return value

    def mapping(self, name: str, key: str | None = None) -> dict[str, Any]:
        """The object of that name, or the one under its `key`; empty where missing or null."""
        value = self.get(name, {}) if key is None else self.mapping(name).get(key) or {}
        if not isinstance(value, dict):
            raise ConfigError(
                f"{self.path}: {key or name} is {value!r}, must be an object; fetch the file again"
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
            "tie_word_embeddings": self.flag("tie_word_embeddings", tied),
            "dtype": self._dtype(),
            "eos_token_ids": self._eos(),
        }

    def rope(self, default_theta: float = 10000.0) -> RopeConfig:
        """Both spellings: `rope_parameters` (transformers 5), `rope_theta` with `rope_scaling`."""
        rope = self.mapping("rope_parameters") or self.mapping("rope_scaling")
        return self.rope_from(rope, self.get("rope_theta", default_theta))

    def rope_from(self, rope: dict[str, Any], theta: float) -> RopeConfig:
        """As `rope` says; `theta` where it has none."""
        theta = rope.get("rope_theta", theta)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in tuple(_ROPE_FACTORS):
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
            theta=self._positive("rope_theta", theta),
            kind=kind,
            original_max_position_embeddings=rope.get(
                "original_max_position_embeddings", self.get("max_position_embeddings", 0)
            ),
            **{name: self._positive(name, rope[name]) for name in _ROPE_FACTORS[kind]},
        )

    def slides(self, otherwise: Iterable[bool]) -> tuple[bool, ...]:
        """For each layer whether it slides: as `layer_types` lists them, or `otherwise`."""
        kinds = self.get("layer_types")
        if kinds is None:
            return tuple(otherwise)
        num_layers = self.count("num_hidden_layers")
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise ConfigError(
                f"{self.path}: layer_types is {kinds!r}, must list {num_layers} layers; "
                "fetch the file again"
            )
        for kind in kinds:
            if kind not in _LAYER_KINDS:
                raise ConfigError(
                    f"{self.path}: layer type {kind!r} is not supported; supported: "
                    f"{', '.join(_LAYER_KINDS)}"
                )
        return tuple(kind == _SLIDING for kind in kinds)

    def windows(self, window: int | None, slides: Collection[bool]) -> tuple[int | None, ...]:
        """For each layer `window` where it slides. One that no position can leave is none."""
        if window is None:
            return ()
        if type(window) is not int or window < 1:
            raise ConfigError(
                f"{self.path}: sliding_window is {window!r}, must be a whole number of at least 1 "
                "or null; fetch the file again"
            )
        if window >= self.get("max_position_embeddings", window + 1):
            return ()
        return tuple(window if each else None for each in slides)

    def _architecture(self) -> str:
        names = self.raw.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise ConfigError(
                f"{self.path}: architectures is {names!r}, must name the model's class; write that "
                f'of {self.raw.get("model_type", "the model")} there, such as ["LlamaForCausalLM"]'
            )
        return names[0]

    def _positive(self, name: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ConfigError(
                f"{self.path}: {name} is {value!r}, must be a number over 0; fetch the file again"
            )
        return value

    def _dtype(self) -> str:
        dtype = self.get("dtype", self.get("torch_dtype", "float32"))
        if dtype not in tuple(DTYPE_BYTES):
            raise ConfigError(
                f"{self.path}: dtype {dtype!r} is not supported; supported: "
                f"{', '.join(DTYPE_BYTES)}"
            )
        return dtype

    def _eos(self) -> tuple[int, ...]:
        """generation_config.json knows every id that ends a turn; config.json often only one. Ids
        beyond the vocabulary (a tokenizer may have more) are never sampled, so they are left out.
        """
        generation = self.path.with_name("generation_config.json")
        eos = _read_json(generation).get("eos_token_id") if generation.exists() else None
        if eos is None:
            eos = self.get("eos_token_id", [])
        ids = eos if isinstance(eos, list) else [eos]
        if any(type(each) is not int for each in ids):
            raise ConfigError(
                f"{self.path}: eos_token_id is {eos!r}, must be token ids; fetch the file again"
            )
        return tuple(each for each in ids if 0 <= each < self.count("vocab_size"))


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
