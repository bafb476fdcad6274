"""The border at which sampling parameters are checked, and given a seed."""

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from numbers import Number
from typing import Any

from pipeserve.configs.recipes import check_keys
from pipeserve.core.nouns import SamplingParams
from pipeserve.errors import ConfigError

PARAM_NAMES = tuple(item.name for item in fields(SamplingParams))
REFUSED = {item.name: item.metadata["refused"] for item in fields(SamplingParams) if item.metadata}
"""Of vLLM's parameters those that are not here, and why."""
_DEFAULTS = {item.name: item.default for item in fields(SamplingParams)}
_FRACTIONS = tuple(name for name, default in _DEFAULTS.items() if type(default) is float)
_MAY_BE_NONE = ("max_tokens", "seed", "logprobs", "prompt_logprobs")
_MAX_SEED = 2**63 - 1  # what a 64-bit field of a message carries
_MAX_COUNT = 2**31 - 1
_MAX_SAMPLES = 16384  # as vLLM's VLLM_MAX_N_SEQUENCES
_MAX_LOGPROBS = 256  # of each position, all of which the driver holds until the request ends
_MAX_DIGITS = 10  # of a token id, which is 31 bits at most
_MAX_BIAS = 100  # as OpenAI's; what is to be banned, or alone allowed, has fields of its own


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
    params = _without_none(params)
    params = replace(params, **{name: _plain(getattr(params, name)) for name in PARAM_NAMES})
    stop = (params.stop,) if isinstance(params.stop, str) else params.stop
    allowed = params.allowed_token_ids
    params = replace(
        params,
        top_k=0 if params.top_k == -1 else params.top_k,
        seed=None if params.seed == -1 else params.seed,
        logprobs=_all_of(params.logprobs, vocab_size),
        prompt_logprobs=_all_of(params.prompt_logprobs, vocab_size),
        stop=_tuple_of(str, "stop", stop),
        stop_token_ids=_tuple_of(int, "stop_token_ids", params.stop_token_ids),
        bad_words=_tuple_of(str, "bad_words", params.bad_words),
        allowed_token_ids=None if allowed is None else _tuple_of(int, "allowed_token_ids", allowed),
        logit_bias=_bias_of(params.logit_bias),
    )
    _check_counts(params, vocab_size)
    _check_numbers(params)
    _check_texts(params)
    _check_token_ids(params, vocab_size)
    if params.n > 1 and params.temperature == 0:
        raise ConfigError(
            f"n is {params.n} at temperature 0, which gives one text {params.n} times; "
            "raise the temperature or leave n out"
        )
    return _with_fractions(params)


def _without_none(params: SamplingParams) -> SamplingParams:
    """Raises ConfigError for a parameter that is refused by its name."""
    for name, why in REFUSED.items():
        if getattr(params, name) is not None:
            raise ConfigError(f"{name} is a parameter of vLLM that pipeserve does not take: {why}")
    unset = [name for name in PARAM_NAMES if getattr(params, name) is None]
    unset = {name: _DEFAULTS[name] for name in unset if name not in _MAY_BE_NONE}
    return replace(params, **unset)


def _with_fractions(params: SamplingParams) -> SamplingParams:
    """What may have a fraction as a float, since a message to the stages has no room for a whole
    number of more than 64 bits."""
    bias = params.logit_bias
    return replace(
        params,
        **{name: float(getattr(params, name)) for name in _FRACTIONS},
        logit_bias=None if bias is None else {token: float(add) for token, add in bias.items()},
    )


def _plain(value: Any) -> Any:
    """A number of numpy as Python's."""
    return value.item() if isinstance(value, Number) and hasattr(value, "item") else value


def _all_of(count: Any, vocab_size: int | None) -> Any:
    return vocab_size if count == -1 and vocab_size is not None else count


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
        return replace(params, seed=(params.seed + sample) & _MAX_SEED)
    digest = hashlib.blake2b(f"{run_seed}/{request_number}".encode(), digest_size=8).digest()
    return replace(params, seed=int.from_bytes(digest, "little") & _MAX_SEED)


def _check_counts(params: SamplingParams, vocab_size: int | None) -> None:
    limits = {
        "n": (1, _MAX_SAMPLES),
        "max_tokens": (1, _MAX_COUNT),
        "min_tokens": (0, _MAX_COUNT),
        "top_k": (0, _MAX_COUNT),
        "seed": (0, _MAX_SEED),
        "logprobs": (0, _MAX_LOGPROBS),
        "prompt_logprobs": (0, _MAX_LOGPROBS),
    }
    for name, (least, most) in limits.items():
        value = getattr(params, name)
        if value is None and name in _MAY_BE_NONE:
            continue
        if type(value) is not int:
            raise ConfigError(f"{name} is {value!r}, must be a whole number")
        if most == _MAX_LOGPROBS and value in (-1, vocab_size):
            continue
        if not least <= value <= most:
            also = "; or -1, all" if most == _MAX_LOGPROBS else ""
            raise ConfigError(f"{name} is {value}, must be {least} to {most}{also}")
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise ConfigError(
            f"min_tokens is {params.min_tokens}, over max_tokens {params.max_tokens}; "
            "lower the one or raise the other"
        )


def _check_numbers(params: SamplingParams) -> None:
    limits: dict[str, tuple[Callable[[float], bool], str]] = {
        "temperature": (lambda value: value >= 0, "0 (greedy) or more"),
        "top_p": (lambda value: 0 < value <= 1, "over 0 and at most 1 (keep all)"),
        "min_p": (lambda value: 0 <= value <= 1, "0 (keep all) to 1"),
        "repetition_penalty": (lambda value: value > 0, "over 0; 1 is none"),
        "presence_penalty": (lambda value: -2 <= value <= 2, "-2 to 2; 0 is none"),
        "frequency_penalty": (lambda value: -2 <= value <= 2, "-2 to 2; 0 is none"),
    }
    for name, (is_good, limit) in limits.items():
        value = getattr(params, name)
        if not _is_finite(value):
            raise ConfigError(f"{name} is {value!r}, must be a finite number")
        if not is_good(value):
            raise ConfigError(f"{name} is {value}, must be {limit}")
    for token, bias in (params.logit_bias or {}).items():
        if not _is_finite(bias) or abs(bias) > _MAX_BIAS:
            raise ConfigError(
                f"logit_bias of token {token} is {bias!r}, must be {-_MAX_BIAS} to {_MAX_BIAS}"
            )


def _check_texts(params: SamplingParams) -> None:
    for item in fields(SamplingParams):
        value = getattr(params, item.name)
        if type(item.default) is bool and type(value) is not bool:
            raise ConfigError(f"{item.name} is {value!r}, must be true or false")
    if params.stop and not params.detokenize:
        raise ConfigError(
            f"stop is {params.stop!r}, but detokenize is false: no text is made; use stop_token_ids"
        )
    for name in ("stop", "bad_words"):
        if not all(map(is_text, getattr(params, name))):
            raise ConfigError(f"{name} has half a surrogate pair, which is no text; leave it out")
    if "" in params.stop:
        raise ConfigError("stop has an empty string, which ends every text at once; leave it out")
    if not all(word.strip() for word in params.bad_words):
        raise ConfigError("bad_words has an empty text; leave it out")


def _check_token_ids(params: SamplingParams, vocab_size: int | None) -> None:
    if params.allowed_token_ids == ():
        raise ConfigError("allowed_token_ids is empty, which leaves no token; leave it out")
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        for token in getattr(params, name) or ():
            if token < 0 or (vocab_size is not None and token >= vocab_size):
                most = " or more" if vocab_size is None else f" to {vocab_size - 1}"
                raise ConfigError(f"{name} has {token}, token ids are 0{most}")
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(params, name)
        if vocab_size is not None and count is not None and count > vocab_size:
            raise ConfigError(f"{name} is {count}, the vocabulary has {vocab_size} tokens")


def is_text(text: str) -> bool:
    """Whether UTF-8 can say it: a JSON escape or a file name may hold half a surrogate pair."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _is_finite(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # a whole number over every float
        return False


def _bias_of(given: Any) -> dict[int, float] | None:
    """JSON has no keys but text, so "123" is 123."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ConfigError(f"logit_bias is {given!r}, must map token ids to numbers")
    bias = {}
    for token, value in given.items():
        if isinstance(token, str) and token.isdecimal() and len(token) <= _MAX_DIGITS:
            token = int(token)
        token = _plain(token)
        if type(token) is not int:
            raise ConfigError(f"logit_bias has {token!r}, which is no token id")
        bias[token] = _plain(value)
    return bias


def _tuple_of(kind: type, name: str, values: Any) -> tuple:
    plain = tuple(map(_plain, values)) if isinstance(values, (list, tuple)) else None
    if plain is None or any(type(value) is not kind for value in plain):
        what = "strings" if kind is str else "whole numbers"
        raise ConfigError(f"{name} is {values!r}, must be a list of {what}")
    return plain
