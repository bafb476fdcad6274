"""Tool calls: what of a model's text is one, by how the model writes them.

"hermes" (NousResearch's Hermes 2 Pro and later, Qwen 2.5 and 3, and many others):
`<tool_call>{"name": NAME, "arguments": {...}}</tool_call>`.
"""

import json
import uuid
from typing import Any

from pipeserve.frontend.params import is_text
from pipeserve.server.openai.bodies import ChatBody
from pipeserve.server.openai.errors import bad

_BEGIN, _END = "<tool_call>", "</tool_call>"


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


class ToolCalls:
    """One sample's text, cut into `delta`s of content and of tool calls as it grows."""

    def __init__(self, body: ChatBody, parser: str | None) -> None:
        self._looks = uses_tools(body) and parser is not None
        self._most = 1 if body.parallel_tool_calls is False else None
        self._held = ""
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
                self._say(parts, self._held[: len(self._held) - kept])
                self._held = self._held[len(self._held) - kept :]
                break
            self._say(parts, self._held[:start])
            self._held = self._held[start:]
            stop = self._held.find(_END)
            if stop < 0:
                break
            self._call(parts, self._held[len(_BEGIN) : stop], self._held[: stop + len(_END)])
            self._held = self._held[stop + len(_END) :]
        return parts

    def flush(self) -> list[dict[str, Any]]:
        """The rest, at the end of the text; a model may stop before it closes its last call."""
        parts: list[dict[str, Any]] = []
        held, self._held = self._held, ""
        if held.startswith(_BEGIN):
            self._call(parts, held[len(_BEGIN) :], held)
        else:
            self._say(parts, held)
        return parts

    def _say(self, parts: list[dict[str, Any]], text: str) -> None:
        if text and not (self.num_calls and text.isspace()):  # between two calls
            parts.append({"content": text})

    def _call(self, parts: list[dict[str, Any]], written: str, text: str) -> None:
        """A call; as text, where it is none."""
        try:
            call = json.loads(written, parse_constant=_refuse)
            name, arguments = call["name"], call.get("arguments", {})
            if not isinstance(name, str) or not is_text(name):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._say(parts, text)
            return
        if self._most is not None and self.num_calls >= self._most:
            return
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        # Half a surrogate pair, which JSON can write and no answer can say, is replaced.
        arguments = arguments.encode("utf-8", "replace").decode()
        parts.append(
            {
                "tool_calls": [
                    {
                        "index": self.num_calls,
                        "id": f"call_{uuid.uuid4().hex}",
                        "type": "function",
                        "function": {"name": name, "arguments": arguments},
                    }
                ]
            }
        )
        self.num_calls += 1


def _refuse(constant: str) -> None:
    """NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(constant)


def _length_of_beginning(text: str) -> int:
    """Of the longest end of `text` that a call may begin with."""
    for length in range(min(len(_BEGIN) - 1, len(text)), 0, -1):
        if _BEGIN.startswith(text[-length:]):
            return length
    return 0
