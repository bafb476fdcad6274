"""The border at which sampling parameters are checked, and given a seed.

What an option may be is declared with it (`pipeserve/sampling_params.py`). Here is how values of
each type are checked, and what options may not be together.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Number
from typing import Any

from pipeserve.configs.recipes import check_keys
from pipeserve.errors import ConfigError
from pipeserve.sampling_params import MAX_SEED, OPTIONS, REFUSED, Bounds, Option, SamplingParams

PARAM_NAMES = (*(option.name for option in OPTIONS), *REFUSED)
_MAX_DIGITS = 10  # of a token id, which is 31 bits at most


def params_from(values: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    """`defaults` with `values` (of a JSON object) in their place, checked. null is as if absent.

    Raises ConfigError for an unknown key (the nearest is named) and for what `check_params` does.
    """
    check_keys(values, list(PARAM_NAMES))
    given = {name: value for name, value in values.items() if value is not None}
    return check_params(replace(defaults, **given))


def check_params(params: SamplingParams, vocab_size: int | None = None) -> SamplingParams:
    """`params` with defaults for None, lists made tuples, a single stop string too, keys of
    `logit_bias` numbers, numpy's numbers Python's, and what vLLM writes as -1: a `top_k` of all is
    0, no seed None.

    Raises ConfigError (name, value, limit) for a wrong type, a value out of range, values that
    contradict each other, and what is not here at all. `vocab_size` bounds token ids, and is how
    many log-probabilities -1 asks for, where the model is known.
    """
    for name, why in REFUSED.items():
        if getattr(params, name) is not None:
            raise ConfigError(f"{name} is a parameter of vLLM that pipeserve does not take: {why}")
    changed = {}
    for option in OPTIONS:
        given = getattr(params, option.name)
        value = _checked(option, _in_our_words(option.name, given), vocab_size)
        if value is not given:
            changed[option.name] = value
    if changed:
        params = replace(params, **changed)
    _check_together(params)
    return params


def _in_our_words(name: str, value: Any) -> Any:
    if name == "top_k" and value == -1:
        return 0
    if name == "seed" and value == -1:
        return None
    return (value,) if name == "stop" and isinstance(value, str) else value


def check_priority(priority: Any, order: str | None = None) -> int:
    """A request's priority. Raises ConfigError for what is no whole number of 64 bits, the most
    that messages carry (vllm#37127), and for one that the order of the run, where it is known,
    would pass over in silence."""
    if type(priority) is not int or not -(2**63) <= priority < 2**63:
        raise ConfigError(f"priority is {priority!r}, must be a whole number of 64 bits")
    if priority and order not in (None, "priority"):
        raise ConfigError(
            f"priority is {priority}, and the order is {order}: start with --order priority "
            "(order='priority'), or leave it out"
        )
    return priority


def _checked(option: Option, value: Any, vocab_size: int | None) -> Any:
    """A value in the form that it has from here on."""
    if value is option.default or (value is None and option.may_be_none):
        return value
    value = option.default if value is None else _plain(value)
    return _CHECKS[option.type](option.name, value, option.limits, vocab_size)


def _plain(value: Any) -> Any:
    """A number of numpy as Python's."""
    return value.item() if isinstance(value, Number) and hasattr(value, "item") else value


def check_leaves_a_token(
    params: SamplingParams, stop_ids: Collection[int], bad_word_ids: Iterable[Sequence[int]]
) -> None:
    """Raises ConfigError when everything that is allowed is also banned for good, or banned until
    `min_tokens` are there."""
    banned = {ids[0] for ids in bad_word_ids if len(ids) == 1}
    allowed = set(params.allowed_token_ids or ())
    if allowed and allowed <= banned:
        raise ConfigError("every one of allowed_token_ids is in bad_words; allow another token")
    if allowed and params.min_tokens and allowed <= banned.union(stop_ids):
        raise ConfigError(
            f"every one of allowed_token_ids ends the text, and min_tokens is {params.min_tokens}; "
            "allow another token"
        )


def seeded(
    params: SamplingParams, run_seed: int, request_number: int, sample: int = 0
) -> SamplingParams:
    """`params` with a seed: its own and, as in vLLM, the sample's index added; or a pure function
    of the run's seed and the request."""
    if params.seed is not None:
        return replace(params, seed=(params.seed + sample) & MAX_SEED)
    digest = hashlib.blake2b(f"{run_seed}/{request_number}".encode(), digest_size=8).digest()
    return replace(params, seed=int.from_bytes(digest, "little") & MAX_SEED)


# ---- one value ----------------------------------------------------------------------------------


def _whole(name: str, value: Any, limits: Bounds, vocab_size: int | None) -> int:
    if type(value) is not int:
        raise ConfigError(f"{name} is {value!r}, must be a whole number")
    if limits.or_all and value == -1:
        return value if vocab_size is None else vocab_size
    if not limits.allow(value) and not (limits.or_all and value == vocab_size):
        raise ConfigError(f"{name} is {value}, must be {limits}")
    if limits.or_all and vocab_size is not None and value > vocab_size:
        raise ConfigError(f"{name} is {value}, the vocabulary has {vocab_size} tokens")
    return value


def _number(name: str, value: Any, limits: Bounds, vocab_size: int | None) -> float:
    if not _is_finite(value):
        raise ConfigError(f"{name} is {value!r}, must be a finite number")
    if not limits.allow(value):
        raise ConfigError(f"{name} is {value}, must be {limits}")
    return float(value)  # a message to the stages has no room for a whole number over 64 bits


def _yes_or_no(name: str, value: Any, limits: None, vocab_size: int | None) -> bool:
    if type(value) is not bool:
        raise ConfigError(f"{name} is {value!r}, must be true or false")
    return value


def _texts(name: str, value: Any, limits: None, vocab_size: int | None) -> tuple[str, ...]:
    texts = _tuple_of(str, name, value)
    if not all(map(is_text, texts)):
        raise ConfigError(f"{name} has half a surrogate pair, which is no text; leave it out")
    return texts


def _token_ids(name: str, value: Any, limits: None, vocab_size: int | None) -> tuple[int, ...]:
    ids = _tuple_of(int, name, value)
    _check_ids(name, ids, vocab_size)
    return ids


def _numbers_of_tokens(
    name: str, value: Any, limits: Bounds, vocab_size: int | None
) -> dict[int, float]:
    """JSON has no keys but text, so "123" is 123."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is {value!r}, must map token ids to numbers")
    numbers = {}
    for token, number in value.items():
        if isinstance(token, str) and token.isdecimal() and len(token) <= _MAX_DIGITS:
            token = int(token)
        token, number = _plain(token), _plain(number)
        if type(token) is not int:
            raise ConfigError(f"{name} has {token!r}, which is no token id")
        if not _is_finite(number) or not limits.allow(number):
            raise ConfigError(f"{name} of token {token} is {number!r}, must be {limits}")
        numbers[token] = float(number)
    _check_ids(name, numbers, vocab_size)
    return numbers


_CHECKS: dict[Any, Callable[..., Any]] = {
    int: _whole,
    float: _number,
    bool: _yes_or_no,
    tuple[str, ...]: _texts,
    tuple[int, ...]: _token_ids,
    Mapping[int, float]: _numbers_of_tokens,
}
"""By an option's type: `(name, value, limits, vocab_size)` to the value. Raises ConfigError."""


def _check_ids(name: str, ids: Iterable[int], vocab_size: int | None) -> None:
    for token in ids:
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            most = " or more" if vocab_size is None else f" to {vocab_size - 1}"
            raise ConfigError(f"{name} has {token}, token ids are 0{most}")


def _is_finite(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # a whole number over every float
        return False


def _tuple_of(kind: type, name: str, values: Any) -> tuple:
    plain = tuple(map(_plain, values)) if isinstance(values, (list, tuple)) else None
    if plain is None or any(type(value) is not kind for value in plain):
        what = "strings" if kind is str else "whole numbers"
        raise ConfigError(f"{name} is {values!r}, must be a list of {what}")
    return plain


def is_text(text: str) -> bool:
    """Whether UTF-8 can say it: a JSON escape or a file name may hold half a surrogate pair."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


# ---- values that do not go together -------------------------------------------------------------


def _check_together(params: SamplingParams) -> None:
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise ConfigError(
            f"min_tokens is {params.min_tokens}, over max_tokens {params.max_tokens}; "
            "lower the one or raise the other"
        )
    if params.stop and not params.detokenize:
        raise ConfigError(
            f"stop is {params.stop!r}, but detokenize is false: no text is made; use stop_token_ids"
        )
    if "" in params.stop:
        raise ConfigError("stop has an empty string, which ends every text at once; leave it out")
    if not all(word.strip() for word in params.bad_words):
        raise ConfigError("bad_words has an empty text; leave it out")
    if params.allowed_token_ids == ():
        raise ConfigError("allowed_token_ids is empty, which leaves no token; leave it out")
    if params.n > 1 and params.temperature == 0:
        raise ConfigError(
            f"n is {params.n} at temperature 0, which gives one text {params.n} times; "
            "raise the temperature or leave n out"
        )
