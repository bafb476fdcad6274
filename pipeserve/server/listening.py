"""The server's sockets, uvicorn over them, and how long one connection may keep it waiting."""

import asyncio
import contextlib
import errno
import math
import re
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from pipeserve.errors import ConfigError, one_line
from pipeserve.server.options import ServerOptions

_HEAD_S = 30.0
"""Within which the head of a request has to come: uvicorn would wait for ever."""
_MOST_BYTES = 1 << 18
"""Of a request beside its body, which `Gate` limits: its head, and what is between the chunks of a
body and behind them. uvicorn would take it without end."""
_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"Connection: close\r\nContent-Length: 0\r\n\r\n"
)
_UNREAD_S = 60.0
"""For which a client may leave unread what was sent to it. Meanwhile what comes for it is kept."""
_LEAST_READ = 1 << 14
"""Bytes that one reads in that time who reads at all: a long answer to a slow client takes long."""
_KEEP_ALIVE_S = 75
_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)
_SLASHES = re.compile(rb"/+")


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    _hurry: asyncio.TimerHandle | None = None
    """Runs while a head is due."""
    _unread: asyncio.TimerHandle | None = None
    """Runs while its client does not read."""
    _is_amid = False
    """Of a request, its body included."""
    _num_beside = 0
    """Bytes of it that are none of its body, but for those that came with its first ones."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if not self._is_amid:
            data = _without_upgrade(data)
            self._await_head()
        self._num_beside += len(data)
        super().data_received(data)
        if self._num_beside > _MOST_BYTES and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        self._is_amid = True
        self._num_beside = 0
        self._await_head()
        super().on_message_begin()

    def on_body(self, body: bytes) -> None:
        self._num_beside -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_amid = False
        super().on_message_complete()

    def on_headers_complete(self) -> None:
        self._hurry = _stopped(self._hurry)
        self.url = _plain_url(self.url)
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            self.cycle.send = _Unchunked(self.cycle)

    def _await_head(self) -> None:
        if self._hurry is None:
            self._hurry = self.loop.call_later(_HEAD_S, self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reading()

    def _await_reading(self, before: float = math.inf) -> None:
        """`before`: bytes that were unread when it was looked for last."""
        unread = self.transport.get_write_buffer_size()
        if unread > before - _LEAST_READ:
            self.transport.abort()
        else:
            self._unread = self.loop.call_later(_UNREAD_S, self._await_reading, unread)

    def resume_writing(self) -> None:
        self._unread = _stopped(self._unread)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._hurry, self._unread = _stopped(self._hurry), _stopped(self._unread)
        self._unset_keepalive_if_required()  # uvicorn does not where the client breaks off
        super().connection_lost(exc)


class _Unchunked:
    """`send` for a client of HTTP/1.0, which knows no chunks: an answer whose length nobody knows
    ends with its connection. uvicorn would send it chunks all the same (uvicorn#1360)."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._is_measured = True

    async def __call__(self, message: ASGISendEvent) -> None:
        cycle = self._cycle
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", ())}
            self._is_measured = b"content-length" in names
            if not self._is_measured:
                cycle.chunked_encoding = False
        elif not self._is_measured:
            cycle.expected_content_length = len(message.get("body", b""))
        await RequestResponseCycle.send(cycle, message)


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def _without_upgrade(data: bytes) -> bytes:
    """A head that offers another protocol, as Java's client offers HTTP/2 in each of its requests.
    Nobody has to take it up, but uvicorn would lose the body (uvicorn#2722)."""
    head, blank, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"", head) + blank + rest


def _plain_url(url: bytes) -> bytes:
    """Without a slash at the end of its path, and without two in a row: clients join addresses as
    they like. uvicorn would take `//v1` for the name of a host."""
    path, mark, query = url.partition(b"?")
    if path.startswith(b"/"):  # and not a whole address, as a proxy may send it
        path = _SLASHES.sub(b"/", path).rstrip(b"/") or b"/"
    return path + mark + query


class HttpServer(uvicorn.Server):
    """Whose signals are the caller's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def end(self, within_s: float) -> None:
        """Take no more connections, and let what is answered go out."""
        self.should_exit = True
        asyncio.get_running_loop().call_later(within_s, setattr, self, "force_exit", True)


def http_server(app: ASGIApp, options: ServerOptions) -> HttpServer:
    return HttpServer(
        uvicorn.Config(
            app,
            http=HttpProtocol,
            ws="none",
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            server_header=False,
            lifespan="off",
        )
    )


def bound_sockets(options: ServerOptions) -> list[socket.socket]:
    """One for each address that the host has; nobody can connect before they are served.

    Bound before the model is loaded, so that a port that is taken is known at once. Raises
    ConfigError.
    """
    where = f"--host {options.host} --port {options.port}"
    try:
        found = socket.getaddrinfo(
            options.host or None, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
        sockets: list[socket.socket] = []
        for family, address in addresses:
            port = sockets[0].getsockname()[1] if sockets else options.port
            with contextlib.suppress(_NotHere):
                sockets.append(_bound(family, (address[0], port, *address[2:]), len(addresses) > 1))
    except OSError as error:
        raise ConfigError(
            f"{where}: {error.strerror}; give another, or --port 0 for a free one"
        ) from None
    if not sockets:
        raise ConfigError(f"{where}: this machine has no such address")
    return sockets


class _NotHere(Exception):
    """An address that the machine does not have, as ::1 of localhost where there is no IPv6."""


def _bound(family: int, address: tuple, is_one_of_several: bool) -> socket.socket:
    try:
        own = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:
            raise _NotHere from None
        raise
    try:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and is_one_of_several:
            own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        own.bind(address)
    except OSError as error:
        own.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise _NotHere from None
        raise
    return own


def check_certificate(options: ServerOptions) -> None:
    """Raises ConfigError for what cannot be read, or does not go together."""
    if options.ssl_certfile is None or options.ssl_keyfile is None:
        return
    names = f"--ssl-certfile {options.ssl_certfile} --ssl-keyfile {options.ssl_keyfile}"
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # An empty password: a key that has one is refused, and nobody is asked for it.
        context.load_cert_chain(options.ssl_certfile, options.ssl_keyfile, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ConfigError(f"{names}: {reason}; give a certificate and its key, as PEM") from None


def url_of(options: ServerOptions, sockets: list[socket.socket]) -> str:
    host = f"[{options.host}]" if ":" in options.host else options.host
    scheme = "https" if options.ssl_certfile else "http"
    return f"{scheme}://{host}:{sockets[0].getsockname()[1]}"
