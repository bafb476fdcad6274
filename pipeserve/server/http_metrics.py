"""Metrics of HTTP requests, by the names, labels and buckets that vLLM's server has them by (those
of prometheus-fastapi-instrumentator); and a line of the log for each.
"""

import logging
import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_UNCOUNTED = ("/metrics", "/health", "/ready", "/version")
"""What machines ask for again and again."""
_NO_ROUTE = "none"
_BUCKETS_S = (0.1, 0.5, 1)


log = logging.getLogger("pipeserve.server")


class HttpMetrics:
    """Of one server."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("method", "status", "handler")
        self.requests = Counter(
            "http_requests", "Answers, by kind of status and by route.", labels, registry=registry
        )
        self.seconds = Histogram(
            "http_request_duration_seconds",
            "From a request to the last byte of its answer.",
            ("method", "handler"),
            registry=registry,
            buckets=_BUCKETS_S,
        )


class Counted:
    """ASGI middleware: counts what goes through."""

    def __init__(
        self, app: ASGIApp, routes: Sequence[BaseRoute], metrics: HttpMetrics, logs: bool
    ) -> None:
        self._app, self._routes, self._metrics, self._logs = app, routes, metrics, logs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (handler := self._handler(scope)) in _UNCOUNTED:
            await self._app(scope, receive, send)
            return
        began_s, status = time.monotonic(), 499  # of a client that goes before it is answered

        async def send_and_look(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_look)
        finally:
            method, metrics, took_s = scope["method"], self._metrics, time.monotonic() - began_s
            metrics.requests.labels(method, f"{status // 100}xx", handler).inc()
            metrics.seconds.labels(method, handler).observe(took_s)
            if self._logs:
                client = (scope.get("client") or ("?",))[0]
                number = scope["state"]["request_id"]
                log.info("%s %s %s %s: %d, %.3f s", number, client, method, handler, status, took_s)

    def _handler(self, scope: Scope) -> str:
        """The route's pattern: paths are the client's words, and without end."""
        for route in self._routes:
            if route.matches(scope)[0] != Match.NONE:
                return getattr(route, "path", _NO_ROUTE)
        return _NO_ROUTE
