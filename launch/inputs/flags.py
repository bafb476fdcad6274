"""Command-line flags made from dataclass fields, so that flags and Python keywords are one list."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from pipeserve.configs import RunConfig, load_recipe, make_config
from pipeserve.errors import ConfigError
from pipeserve.launch.job.options import JobOptions
from pipeserve.sampling_params import OPTIONS, SamplingParams
from pipeserve.server.options import ServerOptions


def run_flags() -> list[inspect.Parameter]:
    """A flag for each field of RunConfig but `model`, which is an argument."""
    return _flags_of(RunConfig, without="model", panel="Run")


def sampling_flags() -> list[inspect.Parameter]:
    """A flag for each field of SamplingParams that is not refused, but `seed`: `--seed` is the
    run's, from which each request's follows."""
    return _flags_of(SamplingParams, without="seed", panel="Sampling")


def server_flags() -> list[inspect.Parameter]:
    """A flag for each field of ServerOptions."""
    return _flags_of(ServerOptions, without="", panel="Server")


def job_flags() -> list[inspect.Parameter]:
    """A flag for each field of JobOptions."""
    return _flags_of(JobOptions, without="", panel="Launch")


def with_flags(*flags: inspect.Parameter) -> Callable[[Callable], Callable]:
    """Give a verb `flags` in place of its `**flags`, for typer to see. Unset ones come as None."""

    def decorate(verb: Callable) -> Callable:
        signature = inspect.signature(verb)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        verb.__signature__ = signature.replace(parameters=[*own, *flags])
        verb.__annotations__ = {p.name: p.annotation for p in [*own, *flags]}
        return verb

    return decorate


def given(noun: type, flags: Mapping[str, Any], without: str = "") -> dict[str, Any]:
    """Those of `flags` that are fields of `noun`, but for `without`, and were given."""
    names = {item.name for item in fields(noun)} - {without}
    return {
        name: value for name, value in flags.items() if name in names and value not in (None, [])
    }


def given_params(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `flags` that are sampling parameters and were given, read where they are text."""
    values = given(SamplingParams, flags, without="seed")
    for option in OPTIONS:
        name, value = option.name, values.get(option.name)
        if value is not None and option.type == Mapping[int, float]:
            values[name] = dict(_pair(name, text) for text in value)
        elif isinstance(value, str) and option.type == tuple[int, ...]:
            values[name] = _numbers(name, value)
    return values


def run_config_of(model: str | None, recipe: str | None, flags: dict[str, Any]) -> RunConfig:
    """What a verb is to run: flags over the recipe over defaults. Raises ConfigError."""
    overrides = given(RunConfig, flags)
    if model is not None:
        overrides["model"] = model
    return make_config(load_recipe(recipe) if recipe is not None else {}, overrides)


def check_terminal(live: bool, explain: bool) -> None:
    """Raises ConfigError where both would write to it."""
    if live and explain:
        raise ConfigError("--live and --explain both write to stderr; give one")


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{_flag_name(name)} {text} is no list of token ids, such as 16,14"
        ) from None


def _pair(name: str, text: str) -> tuple[str, float]:
    """What `--logit-bias 123=-5` says; whether 123 is a token id is checked later."""
    token, _, number = text.partition("=")
    try:
        return token, float(number)
    except ValueError:
        raise ConfigError(f"{_flag_name(name)} {text} is not ID=NUMBER, such as 123=-5") from None


def _flags_of(noun: type, *, without: str, panel: str) -> list[inspect.Parameter]:
    hints = get_type_hints(noun)
    return [
        _flag(item, hints[item.name], panel)
        for item in fields(noun)
        if item.name != without and "refused" not in item.metadata
    ]


def _flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def _flag(item: Field, hint: Any, panel: str) -> inspect.Parameter:
    name, help = _flag_name(item.name), item.metadata["help"]
    others = [item.metadata[name] for name in ("short", "also") if name in item.metadata]
    kind = _flag_type(hint)
    if kind is bool:
        name = f"{name}/--no-{name[2:]}"
    if item.default is not MISSING and item.default not in (None, ()):
        help = f"{help} \\[default: {item.default}]"  # escaped: rich takes [words] for styles
    option = typer.Option(name, *others, help=help, show_default=False, rich_help_panel=panel)
    return inspect.Parameter(
        item.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _flag_type(hint: Any) -> Any:
    """What typer parses for a field's type: a list for repeated flags, text for "16,14"."""
    if any(get_origin(kind) is tuple for kind in get_args(hint)):  # or None
        return str
    if hint == Mapping[int, float] | None:
        return list[str]
    if hint in (tuple[str, ...], tuple[int, ...]):
        return list[get_args(hint)[0]]
    return next(kind for kind in (get_args(hint) or (hint,)) if kind is not type(None))
