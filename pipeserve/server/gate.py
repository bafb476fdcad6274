"""What every HTTP request passes first: its size, its key, its id; and how errors look."""

import asyncio
import hmac
import json
import logging
import re
import uuid
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeserve.server.answers import SEND
from pipeserve.server.openai.errors import ApiError

_OPEN_PATHS = ("/health", "/ready")
_BODY_S = 30.0
"""Within which a body has to come: a client that sends a byte now and then is gone."""
_ID = re.compile(r"[\x21-\x7e]{1,128}")

log = logging.getLogger("pipeserve.server")


class Gate:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, *, api_keys: Collection[str], max_body_bytes: int) -> None:
        self._app = app
        self._keys = [key.encode().strip() for key in api_keys]
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        has_begun = has_ended = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_begun, has_ended
            if message["type"] == "http.response.start":
                has_begun = True
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            else:
                has_ended = not message.get("more_body", False)
            await send(message)

        scope = _plain(scope)
        scope["state"][SEND] = send_with_id
        try:
            self._check_key(scope["path"], headers)
            _check_encoding(headers)
            body = await self._body(headers, receive)
            if body is None:
                return  # the client has gone
            await self._app(scope, _then(body, receive), send_with_id)
        except ApiError as error:
            await error_response(error)(scope, receive, send_with_id)
        except Exception:
            log.exception("request %s", request_id)
            if has_begun and not has_ended:
                raise  # the connection is cut: half an answer must not look whole
            if not has_begun:
                await failure_response()(scope, receive, send_with_id)

    def _check_key(self, path: str, headers: Headers) -> None:
        if not self._keys or path in _OPEN_PATHS:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        told = given.encode("latin-1").strip()  # the bytes that came: UTF-8, for the most part
        # Each of them, whichever fits: how long it takes says nothing.
        fits = [hmac.compare_digest(key, told) for key in self._keys]
        if not any(fits):
            raise ApiError(
                401,
                "no valid API key; send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """All of it, within limits; None where the client is gone before."""
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._max_body_bytes:
            raise self._too_large()
        parts, num_bytes = [], 0
        try:
            async with asyncio.timeout(_BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    num_bytes += len(parts[-1])
                    if num_bytes > self._max_body_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not come within {_BODY_S:g} s", headers={"Connection": "close"}
            ) from None

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is over {self._max_body_bytes} bytes; send less, or raise --max-body-bytes",
            headers={"Connection": "close"},
        )


_FAILED = ApiError(500, "the server failed at this request; its log says why")


def error_response(error: ApiError) -> Response:
    # In ASCII: a message may repeat half a surrogate pair, which UTF-8 cannot say.
    body = json.dumps(error.body())
    return Response(body, error.status, error.headers, media_type="application/json")


def failure_response() -> Response:
    """To what is wrong with the server itself."""
    return error_response(_FAILED)


def _plain(scope: Scope) -> Scope:
    """HEAD, by which balancers ask, is GET, whose body the server leaves out."""
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "method": method}


def _check_encoding(headers: Headers) -> None:
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise ApiError(415, f"the body's Content-Encoding is {encoding!r}; send it as it is")


def _request_id(given: str | None) -> str:
    """The client's own where it is one that a log can take."""
    return given if given and _ID.fullmatch(given) else uuid.uuid4().hex


def _then(body: bytes, receive: Receive) -> Receive:
    """The body that was read already, and what comes behind it: that the client has gone."""
    is_given = False

    async def give() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return give
