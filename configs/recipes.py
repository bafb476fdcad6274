"""Recipes: YAML files whose keys are RunConfig's fields. Shipped ones are named by their stem."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from pipeserve.configs.layer_lists import parse_layers
from pipeserve.configs.run_config import RunConfig
from pipeserve.core.policies import POLICIES
from pipeserve.errors import ConfigError

_FOLDER = Path(__file__).parent
_KV_SIZES = ("kv_cache_memory_bytes", "num_gpu_blocks_override")


def recipe_names() -> list[str]:
    """Names of the recipes that are shipped."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_recipe(name_or_file: str) -> dict[str, Any]:
    """The keys and values of a shipped recipe (by name) or of a YAML file (by path).

    Keys may be spelt with `-` or `_`. Raises ConfigError: no such recipe, not readable, not a
    mapping, unknown key.
    """
    path = _find(name_or_file)
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise ConfigError(f"{path}{line}: not YAML: {problem}") from None
    if not isinstance(recipe, dict):
        raise ConfigError(f"{path}: a recipe is `key: value` lines, such as `model: smollm2-135m`")
    recipe = {str(key).replace("-", "_"): value for key, value in recipe.items()}
    try:
        check_keys(recipe, [item.name for item in fields(RunConfig)])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return recipe


def write_recipe(config: RunConfig, always: Collection[str], comment: str) -> str:
    """The text of a recipe that makes this config: `comment`, what is not at its default, and
    `always` these fields, where they are set."""
    values = {item.name: getattr(config, item.name) for item in fields(RunConfig)}
    kept = {
        item.name: values[item.name]
        for item in fields(RunConfig)
        if values[item.name] != item.default or item.name in always
        if values[item.name] is not None
    }
    kept = {
        name: ",".join(map(str, value)) if isinstance(value, tuple) else value
        for name, value in kept.items()
    }
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    return lines + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def make_config(recipe: Mapping[str, Any], overrides: Mapping[str, Any]) -> RunConfig:
    """A RunConfig of `recipe`'s values with those of `overrides` in their place.

    Does not modify either. `pipeline_layers` may be a list or text (`layer_lists.py`). What the
    recipe says of stages or of a policy that `overrides` replaces is left out where the new one
    cannot take it. Raises ConfigError.
    """
    values = {**_still_meant(recipe, overrides), **overrides}
    check_keys(values, [item.name for item in fields(RunConfig)])
    if values.get("model") is None:
        raise ConfigError("no model: give MODEL (a folder or an alias), or a recipe that names one")
    values["model"] = str(values["model"])
    if "pipeline_layers" in values:
        values["pipeline_layers"] = parse_layers(values["pipeline_layers"])
    if "stage_slowdown" in values:
        values["stage_slowdown"] = _parse_numbers(values["stage_slowdown"])
    return RunConfig(**values)


def _still_meant(recipe: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`recipe` without what it says for values that `overrides` replaces: the budget of whole
    prompts where they are cut now, or the other way round; layers of another number of stages; the
    KV pool in the other measure."""
    kept = dict(recipe)
    if _runs_whole_prompts(recipe) != _runs_whole_prompts({**recipe, **overrides}):
        kept.pop("max_num_batched_tokens", None)
    num_stages = overrides.get("pipeline_parallel_size")
    if num_stages is not None and num_stages != recipe.get("pipeline_parallel_size"):
        kept.pop("pipeline_layers", None)
        kept.pop("stage_slowdown", None)
    for one, other in (_KV_SIZES, _KV_SIZES[::-1]):
        if overrides.get(one) is not None:
            kept.pop(other, None)
    return kept


def _runs_whole_prompts(values: Mapping[str, Any]) -> bool:
    """Whether their policy does. RunConfig's default, where they name none, does not."""
    policy = POLICIES.get(str(values.get("policy")))
    return policy is not None and policy.traits.whole_prompts


def check_keys(values: Mapping[str, Any], known: list[str]) -> None:
    """Raise ConfigError for a key that is not in `known`, naming the nearest that is."""
    for key in values:
        if key not in known:
            nearest = get_close_matches(key, known, n=1, cutoff=0.5)
            remedy = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"
            raise ConfigError(f"unknown key {key!r}; {remedy}")


def _find(name_or_file: str) -> Path:
    path = Path(name_or_file)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    if name_or_file in recipe_names():
        return _FOLDER / f"{name_or_file}.yaml"
    nearest = get_close_matches(name_or_file, recipe_names(), n=1)
    remedy = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(recipe_names())}"
    raise ConfigError(f"no recipe {name_or_file!r}; {remedy} A file is named with its .yaml")


def _parse_numbers(numbers: Any) -> Any:
    """ "1,1.5" or [1, 1.5] as (1.0, 1.5); what is neither is left for RunConfig to refuse."""
    if isinstance(numbers, str):
        try:
            return tuple(float(part) for part in numbers.split(","))
        except ValueError:
            return numbers
    return tuple(numbers) if isinstance(numbers, list) else numbers
