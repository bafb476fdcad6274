"""`pipeserve chat`: a conversation in the terminal, with a model of one's own or with a server."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import httpx

from pipeserve.errors import ConfigError, PipeserveError, StageError, one_line
from pipeserve.frontend.llm import LLM
from pipeserve.sampling_params import SamplingParams

Messages = list[dict[str, Any]]
Answer = Callable[[Messages], Iterator[str]]
"""The pieces of what is said to a conversation."""

_HELP = "an empty line does nothing; /reset begins anew; /quit or Ctrl-D ends"


def talk(answer: Answer, system: str | None) -> int:
    """Reads what the user says from standard input, line by line, until its end. Returns the exit
    code. Ctrl-C ends an answer, not the conversation."""
    is_person = sys.stdin.isatty()
    if is_person:
        print(f"({_HELP})", file=sys.stderr)
    beginning: Messages = [{"role": "system", "content": system}] if system else []
    messages = list(beginning)
    while True:
        try:
            said = input("> " if is_person else "")
        except (EOFError, KeyboardInterrupt):
            return 0
        if said.strip() == "/quit":
            return 0
        if said.strip() == "/reset":
            messages = list(beginning)
        elif said.strip():
            messages.append({"role": "user", "content": said})
            heard = _hear(answer, messages)
            if heard is None:
                messages.pop()  # it is as if it had not been said
            else:
                messages.append({"role": "assistant", "content": heard})


def _hear(answer: Answer, messages: Messages) -> str | None:
    """Print an answer as it comes. None: there is none."""
    pieces: list[str] = []
    try:
        with closing(answer(messages)) as coming:
            for piece in coming:
                pieces.append(piece)
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    except StageError:
        raise
    except PipeserveError as error:
        print(f"error: {error}", file=sys.stderr)
        return None
    print(flush=True)
    return "".join(pieces)


def of_pipeline(llm: LLM, params: SamplingParams) -> Answer:
    """Of a pipeline in this process."""

    def answer(messages: Messages) -> Iterator[str]:
        with closing(llm.stream([messages], params)) as deltas:
            for delta in deltas:
                if delta.error is not None:
                    raise ConfigError(delta.error)
                yield delta.text

    return answer


def of_server(url: str, api_key: str | None, options: dict[str, Any]) -> Answer:
    """Of a server of OpenAI's API. Raises ConfigError when it does not answer."""
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        listed = httpx.get(f"{base}/v1/models", headers=headers)
        model = listed.raise_for_status().json()["data"][0]["id"]
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise ConfigError(f"{base} is no server that answers: {one_line(error)}") from None

    def answer(messages: Messages) -> Iterator[str]:
        body = {"model": model, "messages": messages, "stream": True, **options}
        address = f"{base}/v1/chat/completions"
        try:
            with httpx.stream("POST", address, json=body, headers=headers, timeout=None) as told:
                if told.status_code != 200:
                    raise ConfigError(one_line(Exception(told.read().decode(errors="replace"))))
                yield from _pieces(told.iter_lines())
        except httpx.HTTPError as error:
            raise ConfigError(f"{base}: {one_line(error)}") from None

    return answer


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise ConfigError(event["error"]["message"])
        for choice in event["choices"]:
            yield choice["delta"].get("content") or ""
