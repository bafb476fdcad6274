"""From checked bodies to running requests: prompts made token ids off the event loop, a bounded
queue, a deadline, and numbers for the metrics.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeserve.configs import RunConfig
from pipeserve.core.nouns import Request
from pipeserve.core.view import Limits
from pipeserve.errors import CapacityError, ConfigError, PipeserveError, StageError
from pipeserve.frontend.completion import Generation
from pipeserve.frontend.params import check_priority
from pipeserve.frontend.prompt_forms import plain_messages
from pipeserve.frontend.request_maker import RequestMaker
from pipeserve.sampling_params import SamplingParams
from pipeserve.server.openai.bodies import ChatBody, TokenizeBody
from pipeserve.server.openai.errors import ApiError, bad, failed
from pipeserve.server.options import ServerOptions
from pipeserve.server.pipeline import Failed, Late, Pipeline, Stream

_RETRY_S = 1
_MOST_LETTERS = 1 << 16
"""Of a request's stop strings: what looks for them is as large."""
_NOT_OF_TEMPLATES = {
    *("self", "conversation", "messages", "tools", "documents", "chat_template"),
    *("add_generation_prompt", "continue_final_message", "sanitize_control_tokens"),
    *("tokenize", "tokenizer_kwargs", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
}
"""What transformers and we are told beside a template, in fields of their own or not at all: with
`chat_template` a request would bring a template where it may not."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt, and how it is to be gone on with."""

    prompt: Any
    """As `prompt_forms.py` takes it; or a function that makes it, on the text thread."""
    params: SamplingParams
    priority: int = 0


class _Client:
    """What `RequestMaker` has to know of the pipeline (`frontend/client.py`)."""

    def __init__(self, pipeline: Pipeline) -> None:
        opened = pipeline.opened
        self.config: RunConfig = opened.config
        self.limits: Limits = opened.limits
        self.model_folder = Path(opened.model_folder)
        self.vocab_size = opened.vocab_size
        self.eos_token_ids = opened.eos_token_ids


class Service:
    """The pipeline, as the routes use it."""

    def __init__(self, pipeline: Pipeline, options: ServerOptions) -> None:
        """Raises ConfigError for a generation_config.json, a tokenizer or a chat template that
        cannot be."""
        self.pipeline, self.options = pipeline, options
        self.client = _Client(pipeline)
        self.maker = RequestMaker(self.client)
        self.tokenizer = self.maker.tokenizer
        self.tokenizer.load()  # which takes seconds: the first request is not to wait for it
        self._chat_template = _read_template(options.chat_template)
        self.is_draining = False
        """It takes no more requests."""
        self.num_open = 0
        """Requests that are being answered."""
        self._num_made = 0
        """Samples whose prompts are being made token ids: they have a place in the queue."""
        self._text = ThreadPoolExecutor(1, "text")
        """One thread: a tokenizer is not made to be used by several at once."""

    async def off_loop(self, function: Any, *arguments: Any) -> Any:
        """A tokenizer's work on the text thread: other streams go on meanwhile. What is wrong with
        the text is the request's fault."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._text, function, *arguments)
        except CapacityError as error:
            longest = self.client.limits.max_model_len
            raise bad(  # in OpenAI's words, by which clients know it (litellm, LangChain)
                f"This model's maximum context length is {longest} tokens (max_model_len): {error}",
                code="context_length_exceeded",
            ) from None
        except ConfigError as error:
            told = str(error).replace(str(self.client.model_folder), "the model's folder")
            raise bad(told) from None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. On the text thread. Raises ConfigError and CapacityError."""
        self._check_text(text)
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def encode_chat(self, body: ChatBody | TokenizeBody) -> list[int]:
        """Token ids of a conversation. On the text thread. Raises ConfigError, CapacityError and
        ApiError."""
        messages = plain_messages(body.messages)
        text = self.tokenizer.chat_text(messages, **self._template_of(body))
        return self.encode(text, add_special_tokens=bool(body.add_special_tokens))

    def _check_text(self, text: str) -> None:
        """Not to cut into tokens, for minutes, what can never fit. Raises CapacityError."""
        longest = self.client.limits.max_model_len
        if len(text) > longest and len(text) > longest * self.tokenizer.longest_token:
            raise CapacityError(
                f"the text has {len(text)} letters, more than so many tokens can be; shorten it"
            )

    def _template_of(self, body: ChatBody | TokenizeBody) -> dict[str, Any]:
        """What the template is told beside the messages."""
        if body.chat_template is not None and not self.options.trust_request_chat_template:
            raise bad(
                "chat_template in a request is not allowed here; leave it out, or start the "
                "server with --trust-request-chat-template",
                "chat_template",
            )
        kwargs = {**_of_effort(body), **(body.chat_template_kwargs or {})}
        for name in kwargs:
            if name in _NOT_OF_TEMPLATES:
                raise bad(
                    f"chat_template_kwargs has {name}, which is nothing that a template is told; "
                    "leave it out",
                    "chat_template_kwargs",
                )
        template = body.chat_template or self._chat_template
        tools = body.tools if getattr(body, "tool_choice", None) != "none" else None
        return {
            **kwargs,
            **({"chat_template": template} if template else {}),
            **({"tools": tools} if tools else {}),
            **({"documents": body.documents} if getattr(body, "documents", None) else {}),
            "add_generation_prompt": _add_generation_prompt(body),
            "continue_final_message": bool(body.continue_final_message),
        }

    @asynccontextmanager
    async def running(self, asked: Sequence[Asked]) -> AsyncIterator[tuple[Stream, list[tuple]]]:
        """The stream of all samples of all prompts, and the ids of each prompt. What has not ended
        when it is left is ended.

        Raises ApiError: a prompt that cannot run, a queue that is full, a deadline that is over.
        """
        for each in asked:
            _check_limits(each.params, self.options)
        num_samples = sum(each.params.n for each in asked)
        self._check_room(num_samples)
        self.num_open += 1
        try:
            async with self._running(asked, num_samples) as running:
                yield running
        finally:
            self.num_open -= 1

    @asynccontextmanager
    async def _running(
        self, asked: Sequence[Asked], num_samples: int
    ) -> AsyncIterator[tuple[Stream, list[tuple]]]:
        self._num_made += num_samples
        try:
            generations, prompts = await self.off_loop(self._make, asked)
        finally:
            self._num_made -= num_samples
        try:
            with self.pipeline.submit(generations) as stream:
                if self.options.request_timeout:
                    stream.end_in(self.options.request_timeout)
                yield stream, prompts
        except Failed as error:
            raise failed(str(error)) from None
        except Late:
            raise ApiError(
                504,
                f"the request did not end within {self.options.request_timeout:g} s; ask for "
                "fewer tokens",
            ) from None
        except StageError:
            what = "server is shutting down" if self.is_draining else "pipeline has ended"
            raise ApiError(503, f"the {what}; try again later") from None
        except PipeserveError as error:
            raise bad(str(error)) from None

    def _make(self, asked: Sequence[Asked]) -> tuple[list[Generation], list[tuple]]:
        generations, prompts = [], []
        for index, each in enumerate(asked):
            try:
                priority = check_priority(each.priority, self.client.limits.order)
                prompt = each.prompt() if callable(each.prompt) else each.prompt
                self._check_prompt(prompt)
                first = self.maker.first(prompt, each.params, priority)
            except PipeserveError as error:
                where = f"prompt {index}: " if len(asked) > 1 else ""
                raise type(error)(f"{where}{error}") from None
            self._check_length(first, each.params.max_tokens)
            unfinished = set(range(first.params.n))
            prompts.append(first.prompt)
            generations += [
                Generation(index, sample, unfinished, request, self.tokenizer)
                for sample, request in enumerate(self.maker.samples(first))
            ]
        return generations, prompts

    def _check_prompt(self, prompt: dict[str, Any]) -> None:
        if prompt.get("prompt"):
            self._check_text(prompt["prompt"])
        if not (prompt.get("prompt") or prompt.get("prompt_token_ids")):
            raise ConfigError("the prompt is empty; give it a token")

    def _check_length(self, first: Request, max_tokens: int | None) -> None:
        """As OpenAI and vLLM: what is asked for has to fit, and is not cut. Raises
        CapacityError."""
        num_prompt = len(first.prompt)
        if max_tokens is not None and num_prompt + max_tokens > self.client.limits.max_model_len:
            raise CapacityError(
                f"the prompt has {num_prompt} tokens, and max_tokens is {max_tokens}; ask for fewer"
            )

    def _check_room(self, num_samples: int) -> None:
        options = self.options
        if num_samples > options.max_samples:
            raise bad(
                f"{num_samples} samples in one request, at most {options.max_samples} are allowed",
                "n",
            )
        if self.is_draining or self.pipeline.ended is not None:
            raise ApiError(503, "the server is shutting down", headers={"Retry-After": "10"})
        if self.pipeline.num_unfinished + self._num_made + num_samples > options.max_queue:
            raise ApiError(
                429,
                f"the queue is full ({options.max_queue} requests); try again later",
                code="queue_full",
                headers={"Retry-After": str(_RETRY_S)},
            )

    def close(self) -> None:
        """No text is made any more."""
        self._text.shutdown(wait=False, cancel_futures=True)


def _check_limits(params: SamplingParams, options: ServerOptions) -> None:
    """Of what one request may take of a server that many share. Raises ApiError."""
    if len(params.stop) > options.max_stop:
        raise bad(f"stop has {len(params.stop)} strings, at most {options.max_stop}", "stop")
    for name in ("stop", "bad_words"):
        if sum(map(len, getattr(params, name))) > _MOST_LETTERS:
            raise bad(f"{name} has over {_MOST_LETTERS} letters in all; shorten it", name)
    for name in ("logprobs", "prompt_logprobs"):
        asked, most = getattr(params, name), options.max_logprobs
        if asked is not None and most != -1 and (asked == -1 or asked > most):
            what = "all of the vocabulary" if asked == -1 else asked
            raise bad(f"{name} is {what}, at most {most} (the server's --max-logprobs)", name)


def _of_effort(body: ChatBody | TokenizeBody) -> dict[str, Any]:
    """`reasoning_effort`, by the names under which templates ask for it."""
    effort = getattr(body, "reasoning_effort", None)
    if effort is None:
        return {}
    return {"reasoning_effort": effort, "enable_thinking": effort != "none"}


def _add_generation_prompt(body: ChatBody | TokenizeBody) -> bool:
    """By default, unless the last message is to be gone on with. Raises ApiError."""
    if body.add_generation_prompt is None:
        return not body.continue_final_message
    if body.add_generation_prompt and body.continue_final_message:
        raise bad(
            "add_generation_prompt and continue_final_message contradict each other; give one",
            "continue_final_message",
        )
    return body.add_generation_prompt


def _read_template(path: str | None) -> str | None:
    """Of a file; one that is given itself is taken as it is. Raises ConfigError."""
    if path is None or "{{" in path or "{%" in path:
        return path
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise ConfigError(f"--chat-template {path}: {reason}") from None
