"""Reading config.json: what families share, and one clear line for what is wrong in it."""

import json
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeserve.errors import ConfigError
from pipeserve.stages.config.model_config import DTYPE_BYTES, RopeConfig

_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_chunk_size": (None,),
    "configuration_files": (None, []),
    "decoder": (None,),
    "distributed_config": (None,),
    "fusion_config": (None,),
    "generator": (None,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "kv_sharing_modes": (None,),
    "per_layer_config": (None, {}),
    "text_config": (None,),
    "text_encoder": (None,),
    "transformers_weights": (None,),
}
"""Keys with which transformers computes something else in every family, and the values that change
nothing. What a family alone knows of is in its file; all other keys change nothing anywhere
(`tests/stages/test_config_keys.py` holds both against transformers)."""

_SLIDING = "sliding_attention"
_LAYER_KINDS = ("full_attention", _SLIDING)


class ConfigFile:
    """config.json of a model folder. Every method raises ConfigError, naming the file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.json"
        _check_is_model(folder)
        self.raw = _read_json(self.path)
        self.architecture = self._architecture()
        if self.raw.get("quantization_config") is not None:
            raise ConfigError(
                f"{folder}: quantised weights (quantization_config) are not supported; "
                "use a full checkpoint"
            )
        for name, values in _ONLY.items():
            if name in self.raw:
                self.only(name, *values)

    def check_model_type(self, model_type: str) -> None:
        """transformers goes by it, and not by the architecture."""
        if self.get("model_type", model_type) != model_type:
            raise ConfigError(
                f"{self.path}: model_type {self.raw['model_type']!r} is not that of "
                f"{self.architecture}, {model_type!r}; fetch the file again"
            )

    def value(self, name: str, default: Any = None) -> Any:
        """`default` where the key is missing; null stays None."""
        return self.raw.get(name, default)

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
        return self.positive(name, value)

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
        if value not in tuple(supported):
            raise self._unsupported(name, value, supported)
        return value

    def only(self, name: str, *values: Any) -> None:
        """Raises ConfigError where the key has another value, null counted as one. Equal numbers
        and truths are told apart: 1 is not true."""
        if name in self.raw and not any(
            self.raw[name] == value and type(self.raw[name]) is type(value) for value in values
        ):
            raise self._unsupported(name, self.raw[name], values)

    def _unsupported(self, name: str, value: Any, supported: Collection[Any]) -> ConfigError:
        return ConfigError(
            f"{self.path}: {name} {value!r} is not supported; supported: "
            f"{', '.join(map(json.dumps, supported))}"
        )

    def head_dim(self, default: int | None = None) -> int:
        """`default`, or an even share of the hidden size, where the file is silent."""
        return self.count("head_dim", default or self.share_of_head())

    def share_of_head(self) -> int:
        """Of the hidden size."""
        num_heads, hidden_size = self.count("num_attention_heads"), self.count("hidden_size")
        if self.get("head_dim") is None and hidden_size % num_heads:
            raise ConfigError(
                f"{self.path}: hidden_size {hidden_size} is no multiple of the {num_heads} "
                "attention heads (num_attention_heads); fetch the file again"
            )
        return hidden_size // num_heads

    def num_kv_heads(self, default: int | None) -> int:
        """`default` where the file is silent; None and null: as many as query heads."""
        if self.value("num_key_value_heads", default) is None:
            return self.count("num_attention_heads")
        return self.count("num_key_value_heads", default)

    def shared_fields(
        self,
        *,
        norm_eps: float,
        tied: bool,
        head_dim: int,
        ropes: Sequence[RopeConfig] = (),
        max_positions: int | None = None,
    ) -> dict[str, Any]:
        """Fields of `ModelConfig` that every family spells alike. `tied`, `max_positions`: what
        transformers takes where the file is silent. `ropes`: all that the model has."""
        longest = self.count("max_position_embeddings", max_positions)
        return {
            "architecture": self.architecture,
            "num_layers": self.count("num_hidden_layers"),
            "hidden_size": self.count("hidden_size"),
            "num_heads": self.count("num_attention_heads"),
            "head_dim": head_dim,
            "vocab_size": self.count("vocab_size"),
            "max_position_embeddings": int(min([longest, *(rope.max_positions for rope in ropes)])),
            "norm_eps": norm_eps,
            "tie_word_embeddings": self.flag("tie_word_embeddings", tied),
            "dtype": self._dtype(),
            "eos_token_ids": self._eos(),
        }

    def slides(self, otherwise: Iterable[bool]) -> tuple[bool, ...]:
        """For each layer whether it slides: as `layer_types` lists them, or `otherwise`."""
        kinds = self.get("layer_types")
        if kinds is None:
            return tuple(otherwise)
        num_layers = self.count("num_hidden_layers")
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise ConfigError(
                f"{self.path}: layer_types is {kinds!r}, must list as many layers as "
                f"num_hidden_layers, {num_layers}; fetch the file again"
            )
        for kind in kinds:
            if kind not in _LAYER_KINDS:
                raise ConfigError(
                    f"{self.path}: layer type {kind!r} (layer_types) is not supported; supported: "
                    f"{', '.join(_LAYER_KINDS)}"
                )
        return tuple(kind == _SLIDING for kind in kinds)

    def all_slide(self, window: int | None) -> tuple[int | None, ...]:
        """`windows` of a family whose layers all slide if there is a window, none if not. Its code
        does not look at `layer_types`, so they may not say otherwise."""
        slides = [window is not None] * self.count("num_hidden_layers")
        if self.slides(slides) != tuple(slides):
            raise ConfigError(
                f"{self.path}: layer_types and sliding_window {window} contradict each other in "
                f"{self.architecture}, whose layers are all of one kind; fetch the file again"
            )
        return self.windows(window, slides)

    def none_slides(self) -> None:
        """Raises ConfigError where the file speaks of windows, which the family does not have."""
        self.only("sliding_window", None)
        self.all_slide(None)

    def windows(self, window: int | None, slides: Collection[bool]) -> tuple[int | None, ...]:
        """For each layer `window` where it slides. One that no position can leave is none."""
        if window is None or not any(slides):
            return ()
        if type(window) is not int or window < 1:
            raise ConfigError(
                f"{self.path}: sliding_window is {window!r}, must be a whole number of at least 1 "
                "or null; fetch the file again"
            )
        if window >= self.get("max_position_embeddings", window + 1):
            return ()
        return tuple(window if each else None for each in slides)

    def whole(self, name: str, default: int) -> int:
        """A whole number of at least 0."""
        value = self.get(name, default)
        if type(value) is not int or value < 0:
            raise ConfigError(
                f"{self.path}: {name} is {value!r}, must be a whole number of at least 0; "
                "fetch the file again"
            )
        return value

    def _architecture(self) -> str:
        names = self.raw.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise ConfigError(
                f"{self.path}: architectures is {names!r}, must name the model's class; write that "
                f'of {self.raw.get("model_type", "the model")} there, such as ["LlamaForCausalLM"]'
            )
        return names[0]

    def positive(self, name: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
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
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; give a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; fetch it again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object; fetch it again")
    return content
