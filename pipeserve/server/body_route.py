"""A request's body: JSON, as the type that its route takes; what is wrong with it, in one line.

FastAPI only describes it (/openapi.json): its own way from bytes to that type takes several times
as long, and it is the event loop's time, for which all streams stand still.
"""

import itertools
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from pipeserve.server.openai.errors import ApiError, bad

Body = TypeVar("Body", bound=BaseModel)
_MARK = b"\xef\xbb\xbf"  # that some editors write in front of UTF-8
_BEHIND = b" " * 6  # up to which msgspec looks for the other half of a surrogate pair
_MOST_FIELDS = 1000
"""Those that nobody knows are passed over, one by one."""

_decode = msgspec.json.Decoder().decode


class BodyRoute(APIRoute):
    """Of an endpoint `(body, request)`, the first of which is such a type; others are FastAPI's."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint, kind = self.endpoint, self.endpoint.__annotations__.get("body")
        if kind is None:
            return super().get_route_handler()

        async def handle(request: Request) -> Response:
            content_type = request.headers.get("content-type", "")
            return await endpoint(read_body(kind, content_type, await request.body()), request)

        return handle


def read_body(kind: type[Body], content_type: str, data: bytes) -> Body:
    """Raises ApiError."""
    if not _is_json(content_type):
        told = f"Content-Type is {content_type!r}" if content_type else "there is no Content-Type"
        raise ApiError(415, f"{told}; send JSON, and 'Content-Type: application/json'")
    try:
        said = _decode(data.removeprefix(_MARK) + _BEHIND)
        if isinstance(said, dict) and len(said) > _MOST_FIELDS:
            raise bad(f"the body has {len(said)} fields, at most {_MOST_FIELDS} are read")
        return kind.model_validate(said)
    except ValidationError as error:
        raise _in_words(error) from None
    except (ValueError, RecursionError) as error:  # msgspec's errors, too, are such
        raise bad(f"the body is not JSON: {error}") from None


def _is_json(content_type: str) -> bool:
    kind, _, _ = content_type.partition(";")
    main, _, sub = kind.strip().lower().partition("/")
    return main == "application" and (sub == "json" or sub.endswith("+json"))


def _in_words(error: ValidationError) -> ApiError:
    """The first thing that is wrong."""
    wrong = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if wrong["loc"][:1] == ("prompt",):  # of which there are four forms, and none fits
        return bad("prompt must be text, token ids, or a list of either", "prompt")
    place = list(itertools.takewhile(_is_of_body, map(str, wrong["loc"])))
    name = ".".join(place) or None
    return bad(f"{name or 'the body'}: {wrong['msg']}", name)


def _is_of_body(part: str) -> bool:
    """And not of a union: which of its types did not fit."""
    return part not in ("str", "int", "float", "bool") and "[" not in part
