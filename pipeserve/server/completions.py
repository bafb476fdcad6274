"""POST /v1/completions: what is asked, and the answer, whole or as it comes.

A whole answer is its pieces joined, so that the two cannot say different things.
"""

import time
from collections.abc import AsyncIterator, Iterable, Iterator
from functools import partial
from typing import Any

from pipeserve.frontend.completion import Delta, PromptLogprobs
from pipeserve.server.openai.bodies import CompletionBody
from pipeserve.server.openai.errors import bad
from pipeserve.server.openai.logprobs import LegacyLogprobs, TokenNames, prompt_logprobs
from pipeserve.server.openai.sampling import completion_params, max_tokens_of
from pipeserve.server.openai.usage import Usage, wants_usage
from pipeserve.server.service import Asked, Service

_LOGPROB_LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class Completions:
    """One request."""

    def __init__(self, service: Service, body: CompletionBody, model: str, request_id: str) -> None:
        """`request_id`: unless the body has one of its own. Raises ApiError."""
        self._service, self._body = service, body
        self._scores_only = bool(body.echo) and max_tokens_of(body) == 0
        """The prompt alone is wanted: one token is made all the same, and not told."""
        if self._scores_only:
            body = body.model_copy(update={"max_tokens": 1, "max_completion_tokens": None})
        params = completion_params(body, service.maker.default_params)
        self._prompts = _prompts(body)
        self._asked = [
            Asked(partial(self._encoded, prompt), params, body.priority or 0)
            for prompt in self._prompts
        ]
        self._num_samples = params.n
        self._prompt_logprobs: dict[int, PromptLogprobs] = {}
        """Of each prompt, once they are known."""
        self._held: dict[int, list[Delta]] = {}
        """Of each prompt, deltas of samples that echo what is not known yet."""
        self._names = TokenNames(service.tokenizer, bool(body.return_tokens_as_token_ids))
        self._legacy: dict[tuple[int, int], LegacyLogprobs] = {}
        """Of each sample that has begun."""
        self._head = {
            "id": f"cmpl-{body.request_id or request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    async def whole(self) -> dict[str, Any]:
        choices: dict[int, dict[str, Any]] = {}
        async with self._service.running(self._asked) as (stream, prompts):
            usage = Usage(prompts)
            async for deltas in stream:
                for piece in self._pieces(deltas, usage):
                    whole = choices.setdefault(piece["index"], piece)
                    if whole is not piece:
                        _join(whole, piece)
        ordered = [choices[index] for index in sorted(choices)]
        return {**self._head, "choices": ordered, "usage": usage.told()}

    async def events(self) -> AsyncIterator[list[dict[str, Any]]]:
        """Those that there are, each time."""
        told, always = wants_usage(self._body)
        head = self._head
        async with self._service.running(self._asked) as (stream, prompts):
            usage = Usage(prompts)
            async for deltas in stream:
                yield [
                    {**head, "choices": [piece], **({"usage": usage.told()} if always else {})}
                    for piece in self._pieces(deltas, usage)
                ]
        if told:
            yield [{**head, "choices": [], "usage": usage.told()}]

    def _pieces(self, deltas: Iterable[Delta], usage: Usage) -> Iterator[dict[str, Any]]:
        """Of choices, in order. `usage` has what was used by the one that is given last."""
        for delta in deltas:
            usage.count(delta, has_output=not self._scores_only)
            for ready in self._in_order(delta):
                yield self._piece(ready)

    def _in_order(self, delta: Delta) -> Iterator[Delta]:
        """What a prompt's samples echo comes with the first of them; until then others wait."""
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs[delta.index] = delta.prompt_logprobs
        wanted = self._asked[delta.index].params.prompt_logprobs is not None
        if wanted and delta.index not in self._prompt_logprobs:
            self._held.setdefault(delta.index, []).append(delta)
            return
        yield delta
        yield from self._held.pop(delta.index, ())

    def _piece(self, delta: Delta) -> dict[str, Any]:
        body, tokenizer = self._body, self._service.tokenizer
        place = (delta.index, delta.sample)
        legacy = self._legacy.get(place)
        is_first = legacy is None
        if legacy is None:
            legacy = self._legacy[place] = LegacyLogprobs(self._names, body.logprobs or 0)
        text, token_ids, entries = delta.text, delta.token_ids, delta.logprobs or ()
        if self._scores_only:
            text, token_ids, entries = "", (), ()
        own_ids = token_ids
        if body.echo and is_first:
            text = self._text_of_prompt(delta) + text
            if body.logprobs is not None:
                scored = self._prompt_logprobs[delta.index]
                token_ids = (*delta.prompt_token_ids, *token_ids)
                entries = (*scored, *entries)
        piece: dict[str, Any] = {
            "index": delta.index * self._num_samples + delta.sample,
            "text": text,
            "logprobs": None if body.logprobs is None else legacy.of(token_ids, entries),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._scores_only:
            piece |= {"finish_reason": "length", "stop_reason": None}
        if body.return_token_ids:
            piece["token_ids"] = list(own_ids)
            if is_first:
                piece["prompt_token_ids"] = list(delta.prompt_token_ids)
        if body.prompt_logprobs is not None and is_first:
            scored = self._prompt_logprobs[delta.index]
            piece["prompt_logprobs"] = prompt_logprobs(tokenizer, delta.prompt_token_ids, scored)
        return piece

    def _encoded(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """On the text thread."""
        if "prompt" not in prompt or self._body.add_special_tokens is not False:
            return prompt
        ids = self._service.encode(prompt["prompt"], add_special_tokens=False)
        return {**prompt, "prompt": None, "prompt_token_ids": ids}

    def _text_of_prompt(self, delta: Delta) -> str:
        prompt = self._prompts[delta.index]
        if "prompt" in prompt:
            return prompt["prompt"]
        skips = self._asked[delta.index].params.skip_special_tokens
        return self._service.tokenizer.decode(delta.prompt_token_ids, skips)


def _join(whole: dict[str, Any], piece: dict[str, Any]) -> None:
    whole["text"] += piece["text"]
    whole["finish_reason"], whole["stop_reason"] = piece["finish_reason"], piece["stop_reason"]
    if piece["logprobs"] is not None:
        for name in _LOGPROB_LISTS:
            whole["logprobs"][name] += piece["logprobs"][name]
    if "token_ids" in piece:
        whole["token_ids"] += piece["token_ids"]


def _prompts(body: CompletionBody) -> list[dict[str, Any]]:
    """Each as a dict of `prompt` or `prompt_token_ids`. Raises ApiError."""
    if body.prompt is not None and body.prompt_token_ids is not None:
        raise bad("prompt and prompt_token_ids are both given; leave one out", "prompt")
    given = body.prompt if body.prompt is not None else body.prompt_token_ids
    if given is None:
        raise bad("there is no prompt; give text, token ids, or a list of them", "prompt")
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise bad("prompt is an empty list; give text, token ids, or a list of them", "prompt")
    salt = {"cache_salt": body.cache_salt} if body.cache_salt else {}
    return [
        {"prompt" if isinstance(each, str) else "prompt_token_ids": each, **salt} for each in given
    ]
