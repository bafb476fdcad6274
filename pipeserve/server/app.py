"""The routes: OpenAI's API, and what operators ask."""

import time
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp

import pipeserve
from pipeserve.server.answers import EventStream, Gone, JsonAnswer, unless_gone
from pipeserve.server.body_route import BodyRoute
from pipeserve.server.chat import Chat
from pipeserve.server.completions import Completions
from pipeserve.server.gate import Gate, error_response, failure_response
from pipeserve.server.http_metrics import Counted
from pipeserve.server.openai.bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from pipeserve.server.openai.errors import ApiError, bad
from pipeserve.server.options import ServerOptions
from pipeserve.server.service import Service

_STATUS_S = 5.0
"""After which the driver's silence is a failure: it says how it does twice a second."""


def make_app(
    service: Service, options: ServerOptions, names: tuple[str, ...], keys: tuple[str, ...]
) -> ASGIApp:
    """`names`: what clients may call the model, the first being its own; `keys`: those that are
    let in, all where there are none."""
    app = FastAPI(
        title="pipeserve",
        version=pipeserve.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.router.route_class = BodyRoute
    _add_error_handlers(app)
    _add_openai_routes(app, service, names)
    _add_text_routes(app, service, names)
    _add_operators_routes(app, service)
    gated: ASGIApp = Gate(app, api_keys=keys, max_body_bytes=options.max_body_bytes)
    gated = Counted(gated, app.routes, service.pipeline.metrics.http, options.log_requests)
    if options.allowed_origins:  # outside of the gate: a browser asks first without a key
        gated = CORSMiddleware(
            gated,
            allow_origins=list(options.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return gated


def _add_openai_routes(app: FastAPI, service: Service, names: tuple[str, ...]) -> None:
    created = int(time.time())

    async def answer(request: Request, asked: Completions | Chat, streams: bool | None) -> Response:
        if not streams:
            return JsonAnswer(await unless_gone(request, asked.whole()))
        # The first event is waited for, so that what cannot run has a status of its own.
        return await EventStream.begun(request, asked.events())

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        asked = Completions(service, body, _model_of(body.model, names), _id_of(request))
        return await answer(request, asked, body.stream)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        asked = Chat(service, body, _model_of(body.model, names), _id_of(request))
        return await answer(request, asked, body.stream)

    def model_card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "pipeserve",
            "root": names[0],
            "parent": None,
            "max_model_len": service.client.limits.max_model_len,
        }

    @app.get("/v1/models")
    async def models() -> Response:
        return JsonAnswer({"object": "list", "data": [model_card(name) for name in names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JsonAnswer(model_card(_model_of(name, names)))


def _add_text_routes(app: FastAPI, service: Service, names: tuple[str, ...]) -> None:
    tokenizer = service.tokenizer

    def tokens_of(body: TokenizeBody) -> dict[str, Any]:
        if body.messages is not None:
            ids = service.encode_chat(body)
        else:
            adds = body.add_special_tokens is not False
            ids = service.encode(body.prompt, add_special_tokens=adds)
        texts = map(tokenizer.token_text, ids) if body.return_token_strs else None
        return {
            "count": len(ids),
            "max_model_len": service.client.limits.max_model_len,
            "tokens": ids,
            "token_strs": None if texts is None else list(texts),
        }

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody, request: Request) -> Response:
        _model_of(body.model, names)
        if (body.prompt is None) == (body.messages is None):
            raise bad("give one of prompt and messages")
        return JsonAnswer(await service.off_loop(tokens_of, body))

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody, request: Request) -> Response:
        _model_of(body.model, names)
        vocab_size = service.client.vocab_size
        for token_id in body.tokens:
            if not 0 <= token_id < vocab_size:
                raise bad(f"{token_id} is no token id; they are 0 to {vocab_size - 1}", "tokens")
        text = await service.off_loop(tokenizer.decode, body.tokens, False)
        return JsonAnswer({"prompt": text})

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        return JsonAnswer(await service.off_loop(lambda: tokenizer.information))


def _add_operators_routes(app: FastAPI, service: Service) -> None:
    pipeline = service.pipeline

    @app.get("/health")
    async def health() -> Response:
        """200 while the pipeline makes progress."""
        why = _why_unwell(service)
        if why:
            raise ApiError(503, why)
        return Response(status_code=200)

    @app.get("/ready")
    async def ready() -> Response:
        """200 while the pipeline is up and runs requests. While it re-forms after a loss it takes
        them, and they wait."""
        if pipeline.ended is not None or service.is_draining:
            raise ApiError(503, "the pipeline takes no requests")
        if pipeline.status.trouble:
            raise ApiError(503, f"the pipeline re-forms: {pipeline.status.trouble}")
        stages = [
            {"stage": each.stage, "rank": each.rank, "host": each.host, "pid": each.pid}
            for each in pipeline.status.where
        ]
        return JsonAnswer({"stages": stages})

    @app.get("/version")
    async def version() -> Response:
        return JsonAnswer({"version": pipeserve.__version__})

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return PlainTextResponse(pipeline.metrics.text(), media_type=pipeline.metrics.content_type)


def _why_unwell(service: Service) -> str:
    """'' where the pipeline makes progress."""
    pipeline, options = service.pipeline, service.options
    if pipeline.ended is not None:
        return "the pipeline has ended"
    silent_s = time.monotonic() - pipeline.status_s
    if silent_s > _STATUS_S:
        return f"the driver has said nothing for {silent_s:.0f} s"
    stalled_s = pipeline.status.stalled_s
    if stalled_s > options.stall_timeout:
        return f"the stages have owed a result for {stalled_s:.0f} s"
    return ""


def _id_of(request: Request) -> str:
    """As its answer's X-Request-Id has it."""
    return request.state.request_id


def _model_of(given: str | None, names: tuple[str, ...]) -> str:
    """Raises ApiError for a model that is not served here."""
    if not given:
        return names[0]
    if given not in names:
        raise ApiError(
            404,
            f"the model {given[:200]!r} is not served here; use {names[0]!r}",
            code="model_not_found",
            param="model",
        )
    return given


# ---- errors -------------------------------------------------------------------------------------


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(Gone)
    async def gone(request: Request, error: Gone) -> Response:
        return Response(status_code=499)  # nobody reads it; nginx's number, for the log

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return failure_response()

    @app.exception_handler(HTTPException)
    async def wrong_request(request: Request, error: HTTPException) -> Response:
        headers, told = dict(error.headers or {}), str(error.detail)
        path = request.url.path[:200]
        if error.status_code == 404:
            told = f"there is no {path!r} here; /openapi.json says what there is"
        elif error.status_code == 405:
            told = f"{path} does not take {request.method}; use {headers.get('Allow', 'another')}"
        return error_response(ApiError(error.status_code, told, headers=headers))
