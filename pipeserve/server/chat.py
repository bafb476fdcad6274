"""POST /v1/chat/completions: what is asked, and the answer, whole or as it comes."""

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from pipeserve.errors import ConfigError
from pipeserve.frontend.completion import Delta
from pipeserve.frontend.prompt_forms import plain_messages
from pipeserve.server.openai.bodies import ChatBody
from pipeserve.server.openai.errors import bad
from pipeserve.server.openai.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from pipeserve.server.openai.sampling import chat_params
from pipeserve.server.openai.tools import ToolCalls, are_hidden, check_tools, uses_tools
from pipeserve.server.openai.usage import Usage, wants_usage
from pipeserve.server.service import Asked, Service


class Chat:
    """One request."""

    def __init__(self, service: Service, body: ChatBody, model: str, request_id: str) -> None:
        """`request_id`: unless the body has one of its own. Raises ApiError."""
        self._service, self._body = service, body
        if not body.messages:
            raise bad("messages is empty; give at least one message", "messages")
        check_tools(body, service.options.tool_call_parser)
        self._params = chat_params(body, service.maker.default_params)
        if uses_tools(body) and are_hidden(service.tokenizer):
            self._params = replace(self._params, skip_special_tokens=False)
        self._names = TokenNames(service.tokenizer, bool(body.return_tokens_as_token_ids))
        self._calls: dict[int, ToolCalls] = {}
        """Of each sample that has begun."""
        self._role = service.options.response_role
        last = body.messages[-1]
        if body.continue_final_message:
            self._role = last.get("role", self._role)
        self._echoed = _last_content(body) if body.echo and last.get("role") == self._role else ""
        self._model = model
        self._id = f"chatcmpl-{body.request_id or request_id}"
        self._created = int(time.time())

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    async def whole(self) -> dict[str, Any]:
        choices: dict[int, dict[str, Any]] = {}
        of_prompt: dict[str, Any] = {}
        async with self._service.running([self._asked()]) as (stream, prompts):
            usage = Usage(prompts)
            async for deltas in stream:
                for delta in deltas:
                    usage.count(delta)
                    of_prompt |= self._of_prompt(delta)
                    self._add(choices, delta)
        for choice in choices.values():
            choice["message"]["content"] = _content(choice["message"])
        ordered = [choices[sample] for sample in sorted(choices)]
        head = self._head("chat.completion")
        return {**head, "choices": ordered, "usage": usage.told(), **of_prompt}

    async def events(self) -> AsyncIterator[list[dict[str, Any]]]:
        """Those that there are, each time."""
        told, always = wants_usage(self._body)
        head = self._head("chat.completion.chunk")
        async with self._service.running([self._asked()]) as (stream, prompts):
            usage = Usage(prompts)
            async for deltas in stream:
                events = []
                for delta in deltas:
                    usage.count(delta)
                    beside = self._of_prompt(delta)
                    for each in self._chunks(delta):
                        so_far = {"usage": usage.told()} if always else {}
                        events.append({**head, "choices": [each], **so_far, **beside})
                        beside = {}
                yield events
        if told:
            yield [{**head, "choices": [], "usage": usage.told()}]

    def _asked(self) -> Asked:
        return Asked(self._encoded, self._params, self._body.priority or 0)

    def _encoded(self) -> dict[str, Any]:
        body = self._body
        ids = self._service.encode_chat(body)
        return {
            "prompt_token_ids": ids,
            **({"cache_salt": body.cache_salt} if body.cache_salt else {}),
        }

    # ---- whole ----------------------------------------------------------------------------------

    def _add(self, choices: dict[int, dict[str, Any]], delta: Delta) -> None:
        for chunk in self._chunks(delta):
            choice = choices.setdefault(
                delta.sample,
                {
                    "index": delta.sample,
                    "message": {"role": self._role, "content": "", "refusal": None},
                    "logprobs": None,
                    "finish_reason": None,
                    "stop_reason": None,
                },
            )
            message = choice["message"]
            message["content"] += chunk["delta"].get("content") or ""
            for call in chunk["delta"].get("tool_calls", ()):
                _join_call(message.setdefault("tool_calls", []), call)
            if chunk["logprobs"] is not None:
                whole = choice["logprobs"] or {"content": [], "refusal": None}
                whole["content"] += chunk["logprobs"]["content"]
                choice["logprobs"] = whole
            choice["finish_reason"] = chunk["finish_reason"]
            choice["stop_reason"] = chunk["stop_reason"]
            if "token_ids" in chunk:
                choice["token_ids"] = choice.get("token_ids", []) + chunk["token_ids"]

    # ---- as it comes ----------------------------------------------------------------------------

    def _of_prompt(self, delta: Delta) -> dict[str, Any]:
        """What a delta tells of the prompt, which is that of all choices."""
        told: dict[str, Any] = {}
        if self._body.return_token_ids and not self._calls:  # it is the first of all
            told["prompt_token_ids"] = list(delta.prompt_token_ids)
        if delta.prompt_logprobs is not None:
            told["prompt_logprobs"] = prompt_logprobs(
                self._service.tokenizer, delta.prompt_token_ids, delta.prompt_logprobs
            )
        return told

    def _chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """What a delta of a sample is on the wire."""
        body, chunks = self._body, []
        is_first = delta.sample not in self._calls
        if is_first:
            self._calls[delta.sample] = ToolCalls(body, self._service.options.tool_call_parser)
            first = {"role": self._role, "content": self._echoed}
            chunks.append(_chunk(delta.sample, first))
        calls = self._calls[delta.sample]
        parts = calls.push(delta.text)
        if delta.finish_reason is not None:
            parts += calls.flush()
        parts = parts or [{}]
        for part in parts:
            chunks.append(_chunk(delta.sample, part))
        last = chunks[-1]
        if body.logprobs and delta.logprobs is not None:
            last["logprobs"] = chat_logprobs(
                self._names, body.top_logprobs or 0, delta.token_ids, delta.logprobs
            )
        if body.return_token_ids:
            last["token_ids"] = list(delta.token_ids)
        if delta.finish_reason is not None:
            if last["delta"]:  # as OpenAI's: some clients read no text where a reason is
                chunks.append(last := _chunk(delta.sample, {}))
            last["finish_reason"], last["stop_reason"] = delta.finish_reason, delta.stop_reason
            if calls.num_calls and delta.finish_reason == "stop":
                last["finish_reason"] = "tool_calls"
        return chunks


def _last_content(body: ChatBody) -> str:
    """Of parts, too. Raises ApiError."""
    try:
        return plain_messages(body.messages)[-1]["content"] or ""
    except ConfigError as error:
        raise bad(str(error), "messages") from None


def _chunk(sample: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {
        "index": sample,
        "delta": delta,
        "logprobs": None,
        "finish_reason": None,
        "stop_reason": None,
    }


def _content(message: dict[str, Any]) -> str | None:
    """None, as OpenAI has it, where there is nothing but tool calls."""
    return message["content"] or (None if message.get("tool_calls") else "")


def _join_call(calls: list[dict[str, Any]], part: dict[str, Any]) -> None:
    if part["index"] == len(calls):
        calls.append(
            {"id": part["id"], "type": "function", "function": {"name": "", "arguments": ""}}
        )
    own = calls[part["index"]]["function"]
    own["name"] += part["function"].get("name") or ""
    own["arguments"] += part["function"].get("arguments") or ""
