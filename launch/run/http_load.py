"""A workload through any server that speaks OpenAI's API, timed where a client stands.

Requests come when they are due, whatever the server does: a slow server is not asked less.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp
import msgspec

from pipeserve.errors import ConfigError, one_line
from pipeserve.profiling.simulation.workloads import WorkItem

_CONNECT_S = 10.0


class Server(NamedTuple):
    """Whom to ask."""

    base: str
    """The address that /v1/... follows."""
    model: str | None
    """What it calls the model; None: the first that it lists."""
    api_key: str | None


@dataclass(slots=True)
class Answer:
    """What came of one request. Times in seconds of the monotonic clock."""

    due_s: float
    num_prompt_tokens: int
    event_times_s: list[float] = field(default_factory=list)
    """Of each event that brought text."""
    num_output_tokens: int = 0
    """As the server counts them; where it does not, its events."""
    error: str = ""
    """Why it failed; a status or what went wrong with the connection."""


def run_load(
    server: Server, items: Sequence[WorkItem], on_answer: Callable[[], None] = lambda: None
) -> list[Answer]:
    """Send each item when it is due, greedy and with `ignore_eos`; parallel to `items`.

    Raises ConfigError where nobody answers at all.
    """
    return asyncio.run(_run_all(server, items, on_answer))


async def _run_all(
    server: Server, items: Sequence[WorkItem], on_answer: Callable[[], None]
) -> list[Answer]:
    headers = {"Authorization": f"Bearer {server.api_key}"} if server.api_key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S)
    async with aiohttp.ClientSession(
        headers=headers,
        timeout=timeout,
        connector=aiohttp.TCPConnector(limit=0),
    ) as session:
        model = server.model or await _first_model(session, server)
        start_s = time.monotonic()

        async def one(item: WorkItem) -> Answer:
            answer = Answer(start_s + item.arrival_s, len(item.prompt))
            await asyncio.sleep(max(0.0, answer.due_s - time.monotonic()))
            await _ask(session, server, model, item, answer)
            on_answer()
            return answer

        return list(await asyncio.gather(*map(one, items)))


async def _first_model(session: aiohttp.ClientSession, server: Server) -> str:
    try:
        async with session.get(f"{server.base}/v1/models") as response:
            if response.status != 200:
                raise ConfigError(
                    f"{server.base}/v1/models answers {response.status}; is it a server of "
                    "OpenAI's API, and does it take the --api-key?"
                )
            return (await response.json())["data"][0]["id"]
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise ConfigError(f"{server.base} does not answer: {one_line(error)}") from None
    except (ValueError, LookupError, TypeError):
        raise ConfigError(f"{server.base}/v1/models lists no model") from None


async def _ask(
    session: aiohttp.ClientSession, server: Server, model: str, item: WorkItem, answer: Answer
) -> None:
    body = {
        "model": model,
        "prompt": item.prompt if isinstance(item.prompt, str) else list(item.prompt),
        "max_tokens": item.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        async with session.post(f"{server.base}/v1/completions", json=body) as response:
            if response.status != 200:
                answer.error = f"HTTP {response.status}"
                return
            rest = b""
            async for came in response.content.iter_any():
                now_s = time.monotonic()
                *lines, rest = (rest + came).split(b"\n")
                if not all(_take(line, now_s, answer) for line in lines):
                    break
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        answer.error = one_line(error)
    if not answer.error and not answer.event_times_s:
        answer.error = "no token came"


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Event(msgspec.Struct):
    """What counts of one; the rest is passed over, for thousands come in a second."""

    choices: list[msgspec.Raw] | None = None
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


def _take(line: bytes, now_s: float, answer: Answer) -> bool:
    """One line of a stream; False where nothing that counts comes behind it."""
    if not line.startswith(b"data:"):
        return True
    data = line.removeprefix(b"data:").strip()
    if data == b"[DONE]":
        return False
    event = _decode(data)
    if event.error is not None:
        told = event.error.get("message") if isinstance(event.error, dict) else event.error
        answer.error = one_line(Exception(str(told or "error")))
        return False
    if event.choices:  # a token may be half a character: its text is empty, and it counts
        answer.event_times_s.append(now_s)
        answer.num_output_tokens = max(answer.num_output_tokens, len(answer.event_times_s))
    if event.usage is not None:
        answer.num_output_tokens = event.usage.completion_tokens
    return True


def error_counts(answers: Sequence[Answer]) -> dict[str, int]:
    return dict(Counter(answer.error for answer in answers if answer.error))
