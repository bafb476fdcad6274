"""The border at which sampling parameters are checked, and given a seed."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from pipeserve.configs.recipes import check_keys
from pipeserve.core.nouns import SamplingParams
from pipeserve.errors import ConfigError

PARAM_NAMES = tuple(item.name for item in fields(SamplingParams))
_MAX_SEED = 2**63 - 1  # what a 64-bit field of a message carries
_MAX_COUNT = 2**31 - 1


def params_from(values: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    """`defaults` with `values` (of a JSON object) in their place, checked.

    Raises ConfigError for an unknown key (the nearest is named) and for what `check_params` does.
    """
    check_keys(values, list(PARAM_NAMES))
    return check_params(replace(defaults, **values))


def check_params(params: SamplingParams, vocab_size: int | None = None) -> SamplingParams:
    """`params` with lists made tuples, a single stop string too.

    Raises ConfigError (name, value, limit) for a wrong type, a value out of range, and values that
    contradict each other. `vocab_size` bounds token ids, where the model is known.
    """
    stop = (params.stop,) if isinstance(params.stop, str) else params.stop
    params = replace(
        params,
        stop=_tuple_of(str, "stop", stop),
        stop_token_ids=_tuple_of(int, "stop_token_ids", params.stop_token_ids),
    )
    _check_counts(params)
    _check_shares(params)
    if type(params.ignore_eos) is not bool:
        raise ConfigError(f"ignore_eos is {params.ignore_eos!r}, must be true or false")
    if "" in params.stop:
        raise ConfigError("stop has an empty string, which ends every text at once; leave it out")
    _check_token_ids(params, vocab_size)
    return params


def seeded(params: SamplingParams, run_seed: int, request_number: int) -> SamplingParams:
    """`params` with a seed: its own, or a pure function of the run's seed and the request."""
    if params.seed is not None:
        return params
    digest = hashlib.blake2b(f"{run_seed}/{request_number}".encode(), digest_size=8).digest()
    return replace(params, seed=int.from_bytes(digest, "little") & _MAX_SEED)


def _check_counts(params: SamplingParams) -> None:
    limits = {
        "max_tokens": (1, _MAX_COUNT),
        "min_tokens": (0, _MAX_COUNT),
        "top_k": (0, _MAX_COUNT),
        "seed": (0, _MAX_SEED),
        "logprobs": (0, _MAX_COUNT),
    }
    for name, (least, most) in limits.items():
        value = getattr(params, name)
        if value is None and name in ("seed", "logprobs"):
            continue
        if type(value) is not int:
            raise ConfigError(f"{name} is {value!r}, must be a whole number")
        if not least <= value <= most:
            raise ConfigError(f"{name} is {value}, must be {least} to {most}")
    if params.min_tokens > params.max_tokens:
        raise ConfigError(
            f"min_tokens is {params.min_tokens}, over max_tokens {params.max_tokens}; "
            "lower the one or raise the other"
        )


def _check_shares(params: SamplingParams) -> None:
    for name in ("temperature", "top_p"):
        value = getattr(params, name)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ConfigError(f"{name} is {value!r}, must be a finite number")
    if params.temperature < 0:
        raise ConfigError(f"temperature is {params.temperature}, must be 0 (greedy) or more")
    if not 0 < params.top_p <= 1:
        raise ConfigError(f"top_p is {params.top_p}, must be over 0 and at most 1 (keep all)")


def _check_token_ids(params: SamplingParams, vocab_size: int | None) -> None:
    for token in params.stop_token_ids:
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            most = "" if vocab_size is None else f" to {vocab_size - 1}"
            raise ConfigError(f"stop_token_ids has {token}, token ids are 0{most}")
    if vocab_size is not None and params.logprobs is not None and params.logprobs > vocab_size:
        raise ConfigError(f"logprobs is {params.logprobs}, the vocabulary has {vocab_size} tokens")


def _tuple_of(kind: type, name: str, values: Any) -> tuple:
    if not isinstance(values, (list, tuple)) or any(type(value) is not kind for value in values):
        what = "strings" if kind is str else "whole numbers"
        raise ConfigError(f"{name} is {values!r}, must be a list of {what}")
    return tuple(values)
