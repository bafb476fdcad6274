"""Command-line flags made from dataclass fields, so that flags and Python keywords are one list."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from types import MappingProxyType
from typing import Annotated, Any, get_args, get_type_hints

import typer

from pipeserve.configs import RunConfig
from pipeserve.core.nouns import SamplingParams
from pipeserve.errors import ConfigError

# SamplingParams is one of the engine's nouns and carries no help for a command line.
_SAMPLING_HELP = MappingProxyType(
    {
        "n": "Samples of each prompt, whose blocks they share.",
        "max_tokens": "Most output tokens of a sample.",
        "min_tokens": "Output tokens before which nothing but max_tokens ends a sample.",
        "temperature": "0 is greedy.",
        "top_k": "Sample from the k most likely tokens; 0 from all.",
        "top_p": "Sample from the most likely tokens that together have this probability.",
        "min_p": "Sample from tokens at least this share as probable as the likeliest.",
        "repetition_penalty": "Over 1, tokens of prompt and output become less likely.",
        "presence_penalty": "Taken off the logits of tokens that the output has: -2 to 2.",
        "frequency_penalty": "Likewise, for each time that it has them: -2 to 2.",
        "logit_bias": "ID=NUMBER: added to the logit of a token id; may be given several times.",
        "bad_words": "Never generate this text; may be given several times.",
        "allowed_token_ids": "Sample only these token ids, such as 16,14.",
        "stop": "End before this text; may be given several times.",
        "stop_token_ids": "End at this token id; may be given several times.",
        "include_stop_str_in_output": "Keep the stop string, or the stop token's text.",
        "ignore_eos": "Go on after the model's end-of-sequence token.",
        "logprobs": "Report, in JSON, this many log-probabilities at each position; 0: the "
        "sampled one's; -1: all.",
        "prompt_logprobs": "The same for each token of the prompt but the first.",
        "detokenize": "Make text of tokens.",
        "skip_special_tokens": "Leave special tokens out of the text.",
        "spaces_between_special_tokens": "Keep what the tokenizer puts between added tokens.",
        "skip_reading_prefix_cache": "Compute the prompt though the cache has its beginning.",
    }
)


def run_flags() -> list[inspect.Parameter]:
    """A flag for each field of RunConfig but `model`, which is an argument."""
    help_of = {item.name: item.metadata["help"] for item in fields(RunConfig)}
    return _flags_of(RunConfig, help_of, without="model", panel="Run")


def sampling_flags() -> list[inspect.Parameter]:
    """A flag for each field of SamplingParams that is not refused, but `seed`: `--seed` is the
    run's, from which each request's follows."""
    return _flags_of(SamplingParams, _SAMPLING_HELP, without="seed", panel="Sampling")


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
    values = {
        name: value for name, value in flags.items() if name in names and value not in (None, [])
    }
    if "logit_bias" in values:
        values["logit_bias"] = dict(map(_pair, values["logit_bias"]))
    if "allowed_token_ids" in values:
        values["allowed_token_ids"] = _numbers(values["allowed_token_ids"])
    return values


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--allowed-token-ids {text} is no list of token ids, such as 16,14"
        ) from None


def _pair(text: str) -> tuple[str, float]:
    """What `--logit-bias 123=-5` says; whether 123 is a token id is checked later."""
    token, _, number = text.partition("=")
    try:
        return token, float(number)
    except ValueError:
        raise ConfigError(f"--logit-bias {text} is not ID=NUMBER, such as 123=-5") from None


def _flags_of(
    noun: type, help_of: Mapping[str, str], *, without: str, panel: str
) -> list[inspect.Parameter]:
    hints = get_type_hints(noun)
    return [
        _flag(item, hints[item.name], help_of[item.name], panel)
        for item in fields(noun)
        if item.name != without and "refused" not in item.metadata
    ]


def _flag(item: Field, hint: Any, help: str, panel: str) -> inspect.Parameter:
    name = "--" + item.name.replace("_", "-")
    short = [item.metadata["short"]] if "short" in item.metadata else []
    kind = _flag_type(hint)
    if kind is bool:
        name = f"{name}/--no-{name[2:]}"
    if item.default is not MISSING and item.default not in (None, ()):
        help = f"{help} \\[default: {item.default}]"  # escaped: rich takes [words] for styles
    option = typer.Option(*short, name, help=help, show_default=False, rich_help_panel=panel)
    return inspect.Parameter(
        item.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _flag_type(hint: Any) -> Any:
    """What typer parses for a field's type: a list for repeated flags, text for "16,14"."""
    if hint == tuple[int, ...] | None:
        return str
    if hint == Mapping[int, float] | None:
        return list[str]
    if hint in (tuple[str, ...], tuple[int, ...]):
        return list[get_args(hint)[0]]
    return next(kind for kind in (get_args(hint) or (hint,)) if kind is not type(None))
