"""A conversation made text by a model's chat template, word for word as transformers does it
(`apply_chat_template`), without its import, which takes seconds.

A template is a stranger's program: it runs in Jinja's sandbox, and sees plain data alone.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""What a message's reasoning is called, the name that most templates read first."""
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
"""At the end of a message that is to be gone on with. It ends in a space, to see whether the
template takes spaces away."""
_MOST_COMPILED = 32


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """Raises ValueError and Jinja's TemplateError, and what a template's own mistakes raise."""
    seen = [_message(message) for message in messages]
    last = _mark_end(seen, template) if continue_final_message else None
    text = _compiled(template).render(
        messages=seen,
        tools=_plain(tools),
        documents=_plain(documents),
        add_generation_prompt=add_generation_prompt,
        **_plain(variables),
    )
    return text if last is None else _up_to_mark(text, last)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """As templates see it. What is null is not there: many write out None."""
    plain = {key: _plain(value) for key, value in message.items() if value is not None}
    reasoning = next((plain[name] for name in _REASONING if name in plain), None)
    if reasoning is None:
        return plain
    return {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _mark_end(messages: list[dict[str, Any]], template: str) -> str:
    """The content of the last message, which then has the mark behind it."""
    content = messages[-1].get("content") if messages else None
    if not isinstance(content, str):
        raise ValueError("continue_final_message: the last message has no content to go on with")
    if "content" not in template:
        raise ValueError("continue_final_message: the template shows no content")
    messages[-1]["content"] = content + _MARK
    return content


def _up_to_mark(text: str, last: str) -> str:
    bare = _MARK.strip()
    if last.strip() not in text or bare not in text:
        raise ValueError(
            "continue_final_message: the template does not show the last message as it is"
        )
    end = text.rindex(bare)
    shown = text[:end]
    return shown if text.startswith(_MARK, end) else shown.rstrip()


def _plain(value: Any) -> Any:
    """Of JSON's types; of anything else its type's name, for its methods could do anything."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    for kind, bare in _BARE.items():
        if isinstance(value, kind):
            return bare(value)
    return f"<{type(value).__name__}>"


_BARE = {str: str.__str__, int: int.__int__, float: float.__float__}
"""What a kind of these, such as an enumeration's member, is without its own methods."""


# ---- what templates are written in --------------------------------------------------------------


@lru_cache(_MOST_COMPILED)
def _compiled(template: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment.from_string(template)


class _Generation(Extension):
    """`{% generation %}` marks what the model says, for who trains; here it is as its inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Any) -> str:
        return caller()


class _Dict:
    """`dict(...)`, without a way to Python's class."""

    def __call__(self, *arguments: Any, **named: Any) -> dict:
        return dict(*arguments, **named)

    def fromkeys(self, *arguments: Any) -> dict:
        return dict.fromkeys(*arguments)


class _Namespace(Namespace):
    """`namespace(...)`, which takes no name that Python could mean something by."""

    def __init__(*arguments: Any, **named: Any) -> None:  # `self` may be a name of the template's
        attributes = dict(*arguments[1:], **named)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(arguments[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name that begins with '_', as {name!r} does")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would write <, >, & and ' for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
