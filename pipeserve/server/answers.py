"""How an answer goes out while its client may go away: whole, or event by event."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pipeserve.errors import PipeserveError
from pipeserve.server.openai.errors import ApiError

T = TypeVar("T")
Event = dict[str, Any]
_BEAT_S = 15.0
"""At most twice of it a stream is silent: what is between it and its client hangs up on who says
nothing, for the most part after 60 s."""
SEND = "send"
"""In the `state` of a request's scope: what sends messages of its answer the short way."""

encode_json = msgspec.json.Encoder().encode
"""Strict: a NaN is null."""


class Gone(Exception):
    """The client has hung up: nobody reads what is said."""


async def unless_gone(request: Request, answer: Awaitable[T]) -> T:
    """What `answer` gives; it is cancelled when the client hangs up. Raises Gone then."""
    answering = asyncio.ensure_future(answer)
    watching = asyncio.ensure_future(_hung_up(request.receive))
    try:
        await asyncio.wait((answering, watching), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise Gone
        return answering.result()
    finally:
        for task in (answering, watching):
            if not task.done():
                task.cancel()
        await asyncio.gather(answering, watching, return_exceptions=True)


class JsonAnswer(Response):
    """A whole answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode_json(content)


class EventStream(Response):
    """Server-sent events: one JSON object each, and `[DONE]` behind the last.

    `events` gives those that there are, which go out in one piece; it is closed as soon as the
    client hangs up. What goes wrong in the middle is an event with "error", behind which nothing
    comes but the end. Where there is none for long, a comment is sent, which clients pass over.
    """

    media_type = "text/event-stream"

    def __init__(
        self, first: asyncio.Future[list[Event]], events: AsyncIterator[list[Event]]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._first, self._events = first, events
        self._has_spoken = first.done()
        """Since somebody looked last."""

    @classmethod
    async def begun(cls, request: Request, events: AsyncIterator[list[Event]]) -> "EventStream":
        """Once its first event is there, or has not come for long: until then what goes wrong is
        an error of its own, with a status. Raises Gone."""
        first = asyncio.ensure_future(anext(events))
        try:
            await unless_gone(request, asyncio.wait((first,), timeout=_BEAT_S))
            if first.done():
                first.result()
            return cls(first, events)
        except BaseException:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            await events.aclose()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        # The rest goes past the framework's layers, which have nothing to do with it, and would
        # each take their time of each event.
        shortly = scope["state"][SEND]
        sending = asyncio.ensure_future(self._send_all(shortly))
        watching = asyncio.ensure_future(_hung_up(receive))
        beating = asyncio.ensure_future(self._beat(shortly))
        try:
            await asyncio.wait((sending, watching), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, watching, beating):
                if not task.done():
                    task.cancel()
            await asyncio.gather(sending, watching, beating, return_exceptions=True)

    async def _beat(self, send: Send) -> None:
        while True:
            if not self._has_spoken:
                await send({"type": "http.response.body", "body": b": \n\n", "more_body": True})
            self._has_spoken = False
            await asyncio.sleep(_BEAT_S)

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            try:
                await _send_events(send, await self._first)
                async for those in events:
                    self._has_spoken = True
                    await _send_events(send, those)
            except (ApiError, PipeserveError) as error:
                told = error if isinstance(error, ApiError) else ApiError(500, str(error))
                await _send_events(send, [told.body()])
        body = b"data: [DONE]\n\n"
        await send({"type": "http.response.body", "body": body, "more_body": False})


async def _send_events(send: Send, events: Iterable[Event]) -> None:
    body = b"".join([b"data: %b\n\n" % encode_json(event) for event in events])
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
