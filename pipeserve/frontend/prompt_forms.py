"""What a prompt may be: vLLM's forms, and conversations. Everything else is refused by its type.

One prompt is text; a list of token ids; `{"prompt": text}` or `{"prompt_token_ids": ids}`, with a
`cache_salt` if wanted; a conversation, which is a list of messages (dicts with a `role`); or what a
tokenizer returns, a mapping with `input_ids`. Many prompts are a list of these.
"""

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeserve.errors import ConfigError
from pipeserve.frontend.params import is_text

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Mapping[str, Any]

_FORMS = "text, a list of token ids, a conversation, or a dict of prompt or prompt_token_ids"
_DICT_KEYS = ("prompt", "prompt_token_ids", "messages", "cache_salt")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")  # of OpenAI's two APIs
_MANY = (list, tuple)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainPrompt:
    """A prompt of any form: one of these three, and the salt of its prefix blocks."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    cache_salt: str = ""


def as_prompts(prompts: Any) -> list[Any]:
    """One prompt or many, as many. Raises ConfigError for what is neither."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping):
        return _of_tokenizer(prompts) if "input_ids" in prompts else [prompts]
    if not isinstance(prompts, _MANY):
        raise _wrong_type(prompts, "prompts are")
    if prompts and (_is_number(prompts[0]) or all(map(_is_message, prompts))):
        return [prompts]
    return list(prompts)


def as_conversations(messages: Any) -> list[Any]:
    """One conversation or many, as many. Raises ConfigError for what is neither."""
    conversations = as_prompts(messages)
    for index, each in enumerate(conversations):
        if not (isinstance(each, _MANY) and each and isinstance(each[0], Mapping)):
            raise ConfigError(
                f"conversation {index} is {_type_of(each)}, must be a list of messages, each with "
                "role and content; generate takes prompts of other kinds"
            )
    return conversations


def plain_prompt(prompt: Any) -> PlainPrompt:
    """One prompt of any form. Raises ConfigError, which names the type, for what is none."""
    if isinstance(prompt, str):
        return PlainPrompt(text=_checked_text(prompt, "the prompt"))
    if isinstance(prompt, Mapping):
        return _of_dict(prompt)
    if not isinstance(prompt, _MANY):
        raise _wrong_type(prompt, "the prompt is")
    if prompt and all(isinstance(part, Mapping) for part in prompt):
        return PlainPrompt(messages=plain_messages(prompt))
    return PlainPrompt(token_ids=tuple(map(_token_id, prompt)))


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """A conversation as templates expect it, by vLLM's rules (`entrypoints/chat_utils.py`): every
    content is text, of several parts joined by newlines; arguments of a tool call are an object,
    which OpenAI's form writes as text. Raises ConfigError for parts of other kinds, by name."""
    return tuple(_plain_message(number, message) for number, message in enumerate(messages))


def _of_tokenizer(encoding: Mapping[str, Any]) -> list[Any]:
    """Of a BatchEncoding, one prompt or many. What its attention mask leaves out is padding."""
    rows, masks = _listed(encoding["input_ids"]), _listed(encoding.get("attention_mask"))
    if not isinstance(rows, _MANY):
        raise _wrong_type(rows, "input_ids are")
    if not rows or not isinstance(rows[0], _MANY):
        rows, masks = [rows], None if masks is None else [masks]
    if masks is None:
        return list(rows)
    return [
        [token for token, is_there in zip(row, mask, strict=True) if is_there]
        for row, mask in zip(rows, masks, strict=True)
    ]


def _listed(values: Any) -> Any:
    return values.tolist() if hasattr(values, "tolist") else values  # a tensor or an array


def _of_dict(prompt: Mapping[str, Any]) -> PlainPrompt:
    if "role" in prompt:
        raise ConfigError("the prompt is one message; give a conversation, a list of messages")
    if "input_ids" in prompt:
        encoded = _of_tokenizer(prompt)
        if len(encoded) != 1:
            raise ConfigError(
                f"the prompt has input_ids of {len(encoded)} prompts; give them as prompts of "
                "their own"
            )
        return plain_prompt(encoded[0])
    given = {key: value for key, value in prompt.items() if value is not None}
    unknown = [key for key in given if key not in _DICT_KEYS]
    if unknown:
        raise ConfigError(f"the prompt has {', '.join(map(repr, unknown))}; a prompt is {_FORMS}")
    salt = given.pop("cache_salt", "")
    if not isinstance(salt, str) or not is_text(salt):
        raise ConfigError(f"cache_salt is {salt!r}, must be text")
    for key, kind in (("prompt_token_ids", _MANY), ("messages", _MANY), ("prompt", str)):
        value = given.get(key)  # in vLLM ids win over the text that they were made of
        if isinstance(value, kind):
            plain = plain_prompt(value)
            return PlainPrompt(
                text=plain.text,
                token_ids=plain.token_ids,
                messages=plain.messages,
                cache_salt=salt,
            )
        if value is not None:
            what = "text" if kind is str else "a list"
            raise ConfigError(f"{key} is {_type_of(value)}, must be {what}")
    raise ConfigError(f"the prompt is a dict without any of {', '.join(_DICT_KEYS[:3])}")


def _plain_message(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str):
        raise ConfigError(f"message {number} has no role; give user, assistant or system")
    _checked_text(role, f"the role of message {number}")
    content = message.get("content")
    if isinstance(content, _MANY):
        content = "\n".join(_text_of(part, f"message {number}") for part in content)
    elif content is not None and not isinstance(content, str):
        raise ConfigError(
            f"the content of message {number} is {_type_of(content)}, must be text or a list of "
            "parts"
        )
    if content is not None:
        _checked_text(content, f"message {number}")
    plain = dict(message)
    if plain.get("tool_calls"):
        if not isinstance(plain["tool_calls"], _MANY):
            what = _type_of(plain["tool_calls"])
            raise ConfigError(f"the tool_calls of message {number} are {what}, must be a list")
        plain["tool_calls"] = [_plain_call(number, call) for call in plain["tool_calls"]]
    else:
        plain.pop("tool_calls", None)  # an empty list would take a template's other branch
        content = content or ""  # many templates write None out
    return {**plain, "content": content}


def _plain_call(number: int, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ConfigError(f"message {number} has a tool call without function; give its name")
    arguments = function.get("arguments") or {}
    given = arguments
    if isinstance(given, str):
        try:
            arguments = json.loads(given) or {}
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise ConfigError(
            f"message {number} has a tool call whose arguments are no JSON object: "
            f"{str(given)[:60]!r}"
        )
    return {**call, "function": {**function, "arguments": arguments}}


def _text_of(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ConfigError(f"{place} has a part that is {_type_of(part)}, must be a dict")
    kind = part.get("type", "text")
    text = part.get("refusal" if kind == "refusal" else "text")
    if kind not in _TEXT_PARTS:
        raise ConfigError(f"{place} has a part of type {kind!r}; only text is taken")
    if not isinstance(text, str):
        raise ConfigError(f"{place} has a part of type {kind!r} without text")
    return text


def _checked_text(text: str, place: str) -> str:
    if not is_text(text):
        raise ConfigError(f"{place} has half a surrogate pair, which is no text; leave it out")
    return text


def _token_id(value: Any) -> int:
    """numpy's whole numbers too; true and false are none."""
    if type(value) is int:
        return value
    if _is_number(value):
        return operator.index(value)
    if isinstance(value, (str, float)):
        raise ConfigError(f"{value!r} is no token id; a prompt is {_FORMS}")
    raise _wrong_type(value, "a token id is")


def _is_number(value: Any) -> bool:
    """A whole number, and not an array of one."""
    return (
        hasattr(value, "__index__")
        and not isinstance(value, bool)
        and type(value).__name__ != "bool"
        and not getattr(value, "shape", ())
        and not hasattr(value, "requires_grad")
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value


def _type_of(value: Any) -> str:
    return f"of type {type(value).__name__}"


def _wrong_type(value: Any, what: str) -> ConfigError:
    remedy = "; give its tolist()" if hasattr(value, "tolist") else ""
    return ConfigError(f"{what} {_type_of(value)}; a prompt is {_FORMS}{remedy}")
