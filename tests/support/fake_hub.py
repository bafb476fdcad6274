"""A model hub of one process: just enough of its protocol for `snapshot_download`."""

import contextlib
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER = COMMIT[::-1]
REVISIONS = ("main", "v1", COMMIT, LATER)


@dataclass
class FakeHub:
    """One repository, `org/tiny`, whose commits all hold the same."""

    files: dict[str, bytes]
    token: str | None = None
    """That one must show to see the repository."""
    gated: bool = False
    broken: str | None = None
    """A file whose data cannot be had."""
    stalls: str | None = None
    """A file of which only the first half is sent, until `go_on` is set."""
    head: str = COMMIT
    moves: bool = False
    """Someone pushes a commit as soon as the head was asked for."""
    go_on: threading.Event = field(default_factory=threading.Event)
    half_sent: threading.Event = field(default_factory=threading.Event)
    fetched: list[str] = field(default_factory=list)
    """The file of every GET of one."""
    num_requests: int = 0

    @contextlib.contextmanager
    def running(self):
        """The endpoint's URL, while it answers."""
        hub = self

        class Handler(_Handler):
            def reply(self):
                hub.num_requests += 1
                _answer(hub, self)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            self.go_on.set()
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass

    def start(self, status, length, **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": length}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def send(self, status, body=b"", **headers):
        self.start(status, len(body), **headers)
        if self.command == "GET":
            self.wfile.write(body)


def _answer(hub: FakeHub, request: _Handler) -> None:
    path = urlsplit(request.path).path
    if "/org/tiny" not in path:
        return request.send(404, X_Error_Code="RepoNotFound")
    if hub.token and request.headers["Authorization"] != f"Bearer {hub.token}":
        return request.send(401, X_Error_Code="GatedRepo" if hub.gated else "RepoNotFound")
    parts = path.partition("/org/tiny")[2].strip("/").split("/")
    kind, revision = [*parts, "main"][:2] if parts[0] else ("revision", "main")
    if revision not in REVISIONS:
        return request.send(404, X_Error_Code="RevisionNotFound")
    if kind == "tree":
        listing = [
            {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
            for name, data in hub.files.items()
        ]
        return request.send(200, json.dumps(listing).encode())
    if kind == "revision":
        info = {"id": "org/tiny", "sha": hub.head, "siblings": []}
        hub.head = LATER if hub.moves else hub.head
        return request.send(200, json.dumps(info).encode())
    return _send_file(hub, request, revision, "/".join(parts[2:]))


def _send_file(hub: FakeHub, request: _Handler, commit: str, name: str) -> None:
    data = hub.files.get(name)
    if data is None:
        return request.send(404, X_Error_Code="EntryNotFound")
    headers = {"ETag": f'"{_etag(data)}"', "X_Repo_Commit": commit}
    if request.command == "HEAD":
        return request.start(200, len(data), **headers)
    hub.fetched.append(name)
    if name == hub.broken:
        return request.send(500)
    request.start(200, len(data), **headers)
    half = len(data) // 2 if name == hub.stalls and not hub.go_on.is_set() else 0
    request.wfile.write(data[:half])
    if half:
        request.wfile.flush()
        hub.half_sent.set()
        hub.go_on.wait(60)
    with contextlib.suppress(OSError):  # whoever asked may be gone
        request.wfile.write(data[half:])


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
