"""Dataclasses from YAML and back: keys are field names, and every value has its field's type.

For device profiles and model shapes, where every number is a quantity: whole numbers are at least
1, rates (`..._per_s`) are above 0, other numbers are not negative. What breaks that is a
ConfigError of one line that names the file, the key and the remedy.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from math import isfinite
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from pipeserve.configs.recipes import check_keys
from pipeserve.errors import ConfigError


def read_yaml(kind: type, path: Path) -> Any:
    """An instance of the dataclass `kind`. Raises ConfigError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not YAML") from None
    try:
        return _build(kind, values, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def write_yaml(value: Any) -> str:
    """The text that `read_yaml` makes `value` of; fields at their default are left out. Fractions
    keep five digits: they are measurements."""
    return yaml.dump(
        _plain(value),
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        width=100,
        allow_unicode=True,
    )


class _Dumper(yaml.SafeDumper):
    """Numbers as `2.359e+14`, texts one a line."""

    def represent_data(self, data: Any) -> yaml.Node:
        if isinstance(data, float):
            mantissa, e, exponent = f"{data:.5g}".partition("e")
            mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
            return self.represent_scalar("tag:yaml.org,2002:float", f"{mantissa}{e}{exponent}")
        node = super().represent_data(data)
        if isinstance(data, dict) and all(isinstance(text, str) for text in data.values()):
            node.flow_style = False
        return node


def _build(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'the file'} must be `key: value` lines")
    prefix = f"{where}." if where else ""
    hints = get_type_hints(kind)
    try:
        check_keys({str(key): None for key in values}, list(hints))
    except ConfigError as error:
        raise ConfigError(f"{prefix and prefix[:-1] + ': '}{error}") from None
    for item in fields(kind):
        if item.name not in values and item.default is item.default_factory is MISSING:
            raise ConfigError(f"{prefix}{item.name} is missing")
    return kind(**{k: _value(hints[k], v, f"{prefix}{k}") for k, v in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as what the type hint says; raises ConfigError naming `where`."""
    if isinstance(hint, UnionType):  # X | None
        return None if value is None else _value(get_args(hint)[0], value, where)
    if is_dataclass(hint):
        return _build(hint, value, where)
    if get_origin(hint) is tuple:
        return _tuple(get_args(hint), value, where)
    if get_origin(hint) is Mapping:
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise ConfigError(f"{where} must be `key: text` lines")
        return value
    if hint is float or hint is int:
        return _number(hint, value, where)
    if type(value) is not hint:
        expected = {bool: "true or false", str: "text"}[hint]
        raise ConfigError(f"{where} is {value!r}, must be {expected}")
    return value


def _tuple(items: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ConfigError(f"{where} must be a list")
    if items[-1] is Ellipsis:
        items = items[:1] * len(value)
    if len(items) != len(value):
        raise ConfigError(f"{where} has {len(value)} values, must have {len(items)}")
    return tuple(
        _value(hint, item, f"{where}[{index}]")
        for index, (hint, item) in enumerate(zip(items, value, strict=True))
    )


def _number(hint: type, value: Any, where: str) -> int | float:
    if hint is float and isinstance(value, str):  # YAML reads 5e-6 as text
        with suppress(ValueError):
            value = float(value)
    if type(value) not in ((int, float) if hint is float else (int,)):
        expected = "a number" if hint is float else "a whole number"
        raise ConfigError(f"{where} is {value!r}, must be {expected}")
    value = hint(value)
    if hint is int and value < 1:
        raise ConfigError(f"{where} is {value}, must be at least 1")
    least = 1 if where.endswith("_per_s") else 0
    if not isfinite(value) or value < least:
        raise ConfigError(f"{where} is {value}, must be finite and {least} or more")
    return value


def _plain(value: Any) -> Any:
    """Dataclasses as mappings, tuples as lists."""
    if is_dataclass(value):
        kept = [item for item in fields(value) if getattr(value, item.name) != item.default]
        return {item.name: _plain(getattr(value, item.name)) for item in kept}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value
