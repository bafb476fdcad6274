"""How config.json says that positions are rotated, read with transformers' own precedence.

Source: transformers, `RotaryEmbeddingConfigMixin` of `modeling_rope_utils.py` (5.24). A
`rope_scaling` takes the place of all of `rope_parameters`, its base included.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pipeserve.errors import ConfigError
from pipeserve.stages.config.model_config import RopeConfig

if TYPE_CHECKING:
    from pipeserve.stages.config.config_file import ConfigFile

Rope = dict[str, Any]

_FACTORS = {
    "default": (),
    "dynamic": ("factor",),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
    "proportional": (),
    "yarn": ("factor",),
}
"""What each type cannot do without."""

_TRAINED = "original_max_position_embeddings"
_KNOW_TRAINED = ("llama3", "longrope", "yarn")


def read_rope(
    file: "ConfigFile",
    head_dim: int,
    *,
    theta: float = 10000.0,
    trained: int | None = None,
    rotates_part: bool = False,
    other_names: Mapping[str, str] = MappingProxyType({}),
) -> RopeConfig:
    """One rope for all layers. `theta`, `trained`: transformers' defaults for `rope_theta` and
    `original_max_position_embeddings`. `rotates_part`: whether the family's code can rotate less
    than a head (`partial_rotary_factor`). `other_names` of rope types in the family's files.
    Raises ConfigError.
    """
    rope = file.mapping("rope_scaling") or file.mapping("rope_parameters")
    for key, value in rope.items():
        if isinstance(value, dict):
            raise ConfigError(
                f"{file.path}: rope_parameters has {key!r}, a rope for a kind of layer, which "
                f"{file.architecture} does not have; give one rope for all layers"
            )
    rope = {"rope_theta": file.value("rope_theta", theta), **rope}
    for kind, meant in other_names.items():
        if _kind_of(rope) == kind:
            rope["rope_type"] = meant
    trained = file.value(_TRAINED, trained)
    if trained is not None:  # what stands outside wins
        rope[_TRAINED] = trained
    return rope_from(file, rope, head_dim, rotates_part=rotates_part)


def rope_from(
    file: "ConfigFile", rope: Rope, head_dim: int, *, rotates_part: bool = False
) -> RopeConfig:
    """As `rope` says, which has its "rope_theta". Raises ConfigError."""
    kind = _kind_of(rope)
    if kind not in tuple(_FACTORS):
        raise ConfigError(
            f"{file.path}: rope type {kind!r} (rope_parameters, rope_scaling) is not supported; "
            f"supported: {', '.join(_FACTORS)}"
        )
    missing = [name for name in _FACTORS[kind] if name not in rope]
    if missing:
        raise ConfigError(
            f"{file.path}: rope type {kind!r} has no {missing[0]!r} (rope_parameters, "
            "rope_scaling); fetch the file again"
        )
    longest = file.value("max_position_embeddings", 0)
    theta = file.positive("rope_theta", rope["rope_theta"])
    if kind == "yarn" and theta == 1:  # whose logarithm is divided by
        raise ConfigError(
            f"{file.path}: rope_theta is 1, must be another number with yarn; fetch the file again"
        )
    part = _part(file, rope, kind, head_dim, rotates_part)
    fields: Rope = {"part": part}
    if kind in _KNOW_TRAINED:
        fields[_TRAINED] = file.positive(_TRAINED, rope.get(_TRAINED, longest))
    read = _READERS.get(kind)
    if read is not None:
        fields |= read(file, rope, fields, longest)
    pairs = fields.get("pair_factors")
    if pairs is not None and len(pairs) != int(head_dim * part) // 2:
        raise ConfigError(
            f"{file.path}: short_factor lists {len(pairs)} numbers, must list one for each of "
            f"{int(head_dim * part) // 2} pairs of dimensions; fetch the file again"
        )
    return RopeConfig(
        theta=theta,
        # Dynamic scaling begins beyond max_position_embeddings, where no request gets.
        kind="default" if kind == "dynamic" else kind,
        **fields,
    )


def _kind_of(rope: Rope) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _part(file: "ConfigFile", rope: Rope, kind: str, head_dim: int, rotates_part: bool) -> float:
    name = "partial_rotary_factor"
    part = file.positive(name, rope.get(name, file.value(name, 1.0)))
    if part == 1 or (kind == "proportional" and part < 1):
        return part
    size = int(head_dim * part)
    if not rotates_part or part > 1 or size % 2:
        supported = f"1.0, or less that makes an even part of {head_dim} dimensions"
        raise ConfigError(
            f"{file.path}: {name} {part} is not supported; supported: "
            f"{supported if rotates_part else '1.0'}"
        )
    return part


def _linear(file: "ConfigFile", rope: Rope, fields: Rope, longest: int) -> Rope:
    return {"factor": file.positive("factor", rope["factor"])}


def _proportional(file: "ConfigFile", rope: Rope, fields: Rope, longest: int) -> Rope:
    return {"factor": file.positive("factor", rope.get("factor", 1.0))}


def _llama3(file: "ConfigFile", rope: Rope, fields: Rope, longest: int) -> Rope:
    factors = {name: file.positive(name, rope[name]) for name in _FACTORS["llama3"]}
    if factors["high_freq_factor"] <= factors["low_freq_factor"]:
        raise ConfigError(
            f"{file.path}: high_freq_factor {factors['high_freq_factor']} must be over "
            f"low_freq_factor {factors['low_freq_factor']}; fetch the file again"
        )
    return factors


def _yarn(file: "ConfigFile", rope: Rope, fields: Rope, longest: int) -> Rope:
    """An `attention_factor` that is not given grows with the logarithm of `factor`."""
    factor = rope["factor"]
    if factor is None:
        factor = longest / fields[_TRAINED]
    factor = file.positive("factor", factor)
    scale, scale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    attention = rope.get("attention_factor")
    if attention is None and scale and scale_all:
        scale = file.positive("mscale", scale)
        scale_all = file.positive("mscale_all_dim", scale_all)
        attention = _growth(factor, scale) / _growth(factor, scale_all)
    elif attention is None:
        attention = _growth(factor, 1)
    truncate = rope.get("truncate", True)
    if type(truncate) is not bool:
        raise ConfigError(
            f"{file.path}: truncate is {truncate!r}, must be true or false; fetch the file again"
        )
    return {
        "factor": factor,
        "attention_factor": file.positive("attention_factor", attention),
        "beta_fast": file.positive("beta_fast", rope.get("beta_fast") or 32),
        "beta_slow": file.positive("beta_slow", rope.get("beta_slow") or 1),
        "truncate": truncate,
    }


def _growth(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(file: "ConfigFile", rope: Rope, fields: Rope, longest: int) -> Rope:
    """Up to the trained context, where the short factors hold. Beyond, the long ones rotate every
    position anew, so `RopeConfig.max_positions` ends there."""
    factors = rope["short_factor"]
    if not isinstance(factors, list):
        raise ConfigError(
            f"{file.path}: short_factor is {factors!r}, must be a list of numbers; "
            "fetch the file again"
        )
    trained = fields[_TRAINED]
    factor = rope.get("factor")
    factor = file.positive("factor", longest / trained if factor is None else factor)
    attention = rope.get("attention_factor")
    if attention is None:
        if trained <= 1:  # whose logarithm is divided by
            raise ConfigError(
                f"{file.path}: {_TRAINED} is {trained!r}, must be over 1; fetch the file again"
            )
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    return {
        "pair_factors": tuple(file.positive("short_factor", each) for each in factors),
        "attention_factor": file.positive("attention_factor", attention),
    }


_READERS = {
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
    "proportional": _proportional,
    "yarn": _yarn,
}
