"""From a request's body to `SamplingParams`, by vLLM's rules where it has one."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from pipeserve.errors import ConfigError
from pipeserve.frontend.params import check_params
from pipeserve.sampling_params import REFUSED, SamplingParams
from pipeserve.server.openai.bodies import ChatBody, CompletionBody, Sampling
from pipeserve.server.openai.errors import bad

_SAME_NAME = {item.name for item in fields(SamplingParams)} - {"logprobs", "max_tokens", *REFUSED}
_LATER = (
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"),
    *("prompt_embeds", "audio", "modalities", "web_search_options"),
)
"""Fields of vLLM and OpenAI that would change the answer, and are not ignored."""
_NEUTRAL = {
    "length_penalty": 1,
    "modalities": ["text"],
    "routed_experts_prompt_start": 0,
    "stream_interval": 1,
    "thinking_token_budget": -1,
}
"""What fields that are not here may say all the same: it is what happens without them."""
_DEFAULT_MAX_TOKENS = 16  # of a completion: OpenAI's and vLLM's


def completion_params(body: CompletionBody, defaults: SamplingParams) -> SamplingParams:
    """Raises ApiError."""
    if body.suffix:
        raise bad("suffix is not supported; leave it out", "suffix")
    prompt_logprobs = body.prompt_logprobs
    if body.echo and body.logprobs is not None and prompt_logprobs is None:
        prompt_logprobs = body.logprobs
    return _params(body, defaults, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs)


def chat_params(body: ChatBody, defaults: SamplingParams) -> SamplingParams:
    """Raises ApiError."""
    if body.top_logprobs and not body.logprobs:
        raise bad("top_logprobs asks for logprobs: true", "top_logprobs")
    if body.top_logprobs is not None and body.top_logprobs < -1:
        raise bad(f"top_logprobs is {body.top_logprobs}, must be 0 or more", "top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _params(body, defaults, logprobs=logprobs, prompt_logprobs=body.prompt_logprobs)


def max_tokens_of(body: Sampling) -> int | None:
    """OpenAI's newer name goes before its older one."""
    newer = body.max_completion_tokens
    return newer if newer is not None else body.max_tokens


def _params(body: Sampling, defaults: SamplingParams, **values: Any) -> SamplingParams:
    _check_offered(body)
    given = {name: value for name in _SAME_NAME if (value := getattr(body, name, None)) is not None}
    given |= {name: value for name, value in values.items() if value is not None}
    max_tokens = max_tokens_of(body)
    if max_tokens is not None:
        given["max_tokens"] = max_tokens
    elif isinstance(body, ChatBody):
        given["max_tokens"] = (
            None if defaults.max_tokens == _DEFAULT_MAX_TOKENS else defaults.max_tokens
        )
    given |= {name: value for name, value in _said_beside(body) if name in REFUSED}
    try:
        return check_params(replace(defaults, **given))
    except ConfigError as error:
        raise bad(str(error), _param_of(str(error))) from None


def _check_offered(body: Sampling) -> None:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise bad("best_of is not supported; leave it out and use n", "best_of")
    for name, _ in _said_beside(body):
        if name in _LATER:
            raise bad(f"{name} is not supported yet; leave it out", name)
        if name == "functions":
            raise bad("functions is the old name of tools; give them as tools", name)
    kind = (body.response_format or {}).get("type", "text")
    if kind != "text":
        raise bad(
            f"response_format of type {kind!r} is not supported yet; leave it out",
            "response_format",
        )


def _said_beside(body: Sampling) -> Iterator[tuple[str, Any]]:
    """Fields that nobody reads, but for what would be so without them."""
    for name, value in (body.model_extra or {}).items():
        is_empty = value is None or value is False or value in ("", [])
        if not is_empty and value != _NEUTRAL.get(name):
            yield name, value


def _param_of(message: str) -> str | None:
    """The field that a message of `check_params` begins with."""
    word = message.split(" ", 1)[0]
    return word if word in Sampling.model_fields or word == "logprobs" else None
