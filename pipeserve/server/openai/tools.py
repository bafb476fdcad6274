"""Tool calls: what of a model's text is one, by how the model writes them.

"hermes" (NousResearch's Hermes 2 Pro and later, Qwen 2.5 and 3, and many others):
`<tool_call>{"name": NAME, "arguments": {...}}</tool_call>`.
"""

import json
import re
import uuid
from typing import Any

from pipeserve.frontend.params import is_text
from pipeserve.frontend.tokenizer import Tokenizer
from pipeserve.server.openai.bodies import ChatBody
from pipeserve.server.openai.errors import bad

_BEGIN, _END = "<tool_call>", "</tool_call>"
_QUOTE = re.compile(r'\\.|"', re.DOTALL)
"""Of JSON: what begins or ends a text, and what is passed over in one."""


def check_tools(body: ChatBody, parser: str | None) -> None:
    """Raises ApiError for what is no tool, and for what the server cannot do with them."""
    if not body.tools:
        if body.tool_choice not in (None, "none", "auto"):
            raise bad("tool_choice names a tool, but there are no tools", "tool_choice")
        return
    for number, tool in enumerate(body.tools):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise bad(f"tool {number} is not of type 'function' with a 'function'", "tools")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise bad(f"the function of tool {number} has no name", "tools")
    if body.tool_choice not in (None, "none", "auto"):
        raise bad(
            "tool_choice 'required' or of one tool needs constrained output, which is not "
            "supported yet; use 'auto'",
            "tool_choice",
        )
    if body.tool_choice != "none" and parser is None:
        raise bad(
            "this server does not look for tool calls: start it with --tool-call-parser hermes, "
            "or send tool_choice 'none'",
            "tools",
        )


def uses_tools(body: ChatBody) -> bool:
    return bool(body.tools) and body.tool_choice != "none"


def are_hidden(tokenizer: Tokenizer) -> bool:
    """Whether text without special tokens has no calls: what marks them is such, as in Hermes 3."""
    added = tokenizer.added_tokens
    return any(added[token_id] in (_BEGIN, _END) for token_id in tokenizer.special_ids)


class ToolCalls:
    """One sample's text, cut into `delta`s of content and of tool calls as it grows."""

    def __init__(self, body: ChatBody, parser: str | None) -> None:
        self._looks = uses_tools(body) and parser is not None
        self._most = 1 if body.parallel_tool_calls is False else None
        self._held = ""
        self._num_read = 0
        """Letters of what is held that no call ends in."""
        self._is_in_text = False
        """Whether they break off within a text of the call's JSON."""
        self._space = ""
        """Behind a call: said, unless it is all that there is up to the next one, or to the end."""
        self.num_calls = 0

    def push(self, text: str) -> list[dict[str, Any]]:
        """What is sure of it by now."""
        if not self._looks:
            return [{"content": text}] if text else []
        self._held += text
        parts: list[dict[str, Any]] = []
        while self._held:
            start = self._held.find(_BEGIN)
            if start < 0:
                kept = _length_of_beginning(self._held)
                self._say(parts, self._take(len(self._held) - kept))
                break
            self._say(parts, self._take(start))
            stop = self._end_of_call()
            if stop < 0:
                break
            self._call(parts, stop)
        return parts

    def flush(self) -> list[dict[str, Any]]:
        """The rest, at the end of the text; a model may stop before it closes its last call."""
        parts: list[dict[str, Any]] = []
        while self._held.startswith(_BEGIN):
            self._call(parts, len(self._held))
            parts += self.push("")
        self._say(parts, self._take(len(self._held)))
        return parts

    def _take(self, num_letters: int) -> str:
        taken, self._held = self._held[:num_letters], self._held[num_letters:]
        self._num_read, self._is_in_text = 0, False
        return taken

    def _end_of_call(self) -> int:
        """Where what is held, which begins with a call, has the mark of its end; -1: not yet. One
        that is within a text of the call is none, as where a model writes code about tool calls."""
        held = self._held
        while (stop := held.find(_END, self._num_read)) >= 0:
            for quote in _QUOTE.finditer(held, self._num_read, stop):
                self._is_in_text ^= quote[0] == '"'
            if not self._is_in_text:
                return stop
            self._num_read = stop + len(_END)
        return -1

    def _say(self, parts: list[dict[str, Any]], text: str) -> None:
        text = self._space + text
        self._space = text if self.num_calls and text.isspace() else ""
        if text and not self._space:
            parts.append({"content": text})

    def _call(self, parts: list[dict[str, Any]], stop: int) -> None:
        """What is held up to `stop` is a call; or text, where it is none: up to the first mark of
        an end, for that was one if the call was broken off."""
        call = _call_of(self._held[len(_BEGIN) : stop])
        if call is None:
            first = self._held.find(_END)
            self._say(parts, self._take(stop if first < 0 else first + len(_END)))
            return
        self._take(stop + len(_END))
        self._space = ""
        if self._most is not None and self.num_calls >= self._most:
            return
        parts.append(
            {
                "tool_calls": [
                    {
                        "index": self.num_calls,
                        "id": f"call_{uuid.uuid4().hex}",
                        "type": "function",
                        "function": call,
                    }
                ]
            }
        )
        self.num_calls += 1


def _call_of(written: str) -> dict[str, str] | None:
    """Name and arguments, an object as text; None where it is no call: whoever sent it back as one
    would be refused."""
    try:
        call = json.loads(written, parse_constant=_refuse)
        name, arguments = call["name"], call.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = json.loads(arguments, parse_constant=_refuse)
        if not isinstance(arguments, dict) or not isinstance(name, str) or not is_text(name):
            return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    told = json.dumps(arguments, ensure_ascii=False)
    # Half a surrogate pair, which JSON can write and no answer can say, is replaced.
    return {"name": name, "arguments": told.encode("utf-8", "replace").decode()}


def _refuse(constant: str) -> None:
    """NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(constant)


def _length_of_beginning(text: str) -> int:
    """Of the longest end of `text` that a call may begin with."""
    for length in range(min(len(_BEGIN) - 1, len(text)), 0, -1):
        if _BEGIN.startswith(text[-length:]):
            return length
    return 0
