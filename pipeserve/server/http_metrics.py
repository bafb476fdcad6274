"""Metrics of HTTP requests, by the names, labels and buckets that vLLM's server has them by (those
of prometheus-fastapi-instrumentator).
"""

import time

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_UNCOUNTED = ("/metrics", "/health", "/ready", "/version")
"""What machines ask for again and again."""
_NO_ROUTE = "none"
_BUCKETS_S = (0.1, 0.5, 1)


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

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _UNCOUNTED:
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
            # The route's pattern: paths and methods are the client's words, and without end.
            route = scope.get("route")
            handler = getattr(route, "path", _NO_ROUTE)
            method = scope["method"] if route is not None else _NO_ROUTE
            self._metrics.requests.labels(method, f"{status // 100}xx", handler).inc()
            self._metrics.seconds.labels(method, handler).observe(time.monotonic() - began_s)
