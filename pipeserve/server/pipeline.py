"""The pipeline as the server sees it: requests in, and text out as it comes, on one event loop.

The driver is a process of its own (`driver/serving.py`), which is started here and reached over a
local socket; all text is made on this side of it.
"""

import asyncio
import contextlib
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from pipeserve.configs import RunConfig
from pipeserve.core.nouns import Output, RequestId
from pipeserve.core.view import Limits
from pipeserve.errors import ConfigError, PipeserveError, StageError
from pipeserve.frontend.completion import Delta, Generation
from pipeserve.server.metrics import Metrics
from pipeserve.wire import client
from pipeserve.wire.connection import Connection
from pipeserve.wire.listener import Listener
from pipeserve.wire.sources import Sources

_END_S = 10.0
_SWEEP_S = 1.0

_encode = msgspec.msgpack.Encoder().encode


class DriverJob(msgspec.Struct, frozen=True):
    """What the driver's process is told on its standard input: it holds a secret."""

    config: RunConfig
    address: str
    secret: bytes


@contextlib.contextmanager
def _endings_blocked() -> Iterator[None]:
    """What is started meanwhile, and what that starts, is not ended by these signals, from its
    first moment on. A terminal's Ctrl-C and a supervisor's SIGTERM come to all processes, and it is
    the server that they are meant for: the others are there until it has drained."""
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    )
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Late(Exception):
    """A stream's time is over."""


class Failed(Exception):
    """One of a stream's requests alone could not be gone on with."""


class Stream:
    """Deltas of some requests as they come, in order, in lists: all that came since its reader
    looked last. Whoever has one closes it: what has not ended by then is ended."""

    def __init__(self, pipeline: "Pipeline", generations: Sequence[Generation]) -> None:
        self.running = {generation.request.id: generation for generation in generations}
        self._pipeline = pipeline
        self._inbox: list[Delta] = []
        self._error: Exception | None = None
        """What comes behind them."""
        self._arrival: asyncio.Future | None = None
        """Of what its reader waits for."""
        self._deadline: asyncio.TimerHandle | None = None

    def end_in(self, seconds: float) -> None:
        """What has not ended by then raises Late."""
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(seconds, self._end_late)

    def _end_late(self) -> None:
        if self.running:
            self.close("timeout")
            self.fail(Late())

    def put(self, delta: Delta) -> None:
        self._inbox.append(delta)
        self._wake()

    def fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> list[Delta]:
        """Raises StageError when the pipeline has ended, ConfigError for what it would not run,
        Failed and Late."""
        while not self._inbox:
            if self._error is not None:
                raise self._error
            if not self.running:
                raise StopAsyncIteration
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        deltas, self._inbox = self._inbox, []
        return deltas

    def close(self, reason: str = "abort") -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        for request_id in tuple(self.running):
            self._pipeline.abort(request_id, reason)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Pipeline:
    """One driver's process, and the requests that it runs for this one."""

    def __init__(
        self, metrics: Metrics, on_progress: Callable[[str], None] = lambda text: None
    ) -> None:
        self.opened: client.Opened | None = None
        """What the driver said of the pipeline when it was up."""
        self.status: client.Status | None = None
        self.status_s = 0.0
        """When it was told."""
        self.ended: PipeserveError | None = None
        """Why the pipeline takes nothing more."""
        self.metrics = metrics
        self._on_progress = on_progress
        self._streams: dict[RequestId, Stream] = {}
        self._sources = Sources(secrets.token_bytes(32))
        self._connection: Connection | None = None
        self._process: subprocess.Popen | None = None
        self._tasks: list[asyncio.Task] = []
        self._changed = asyncio.Event()
        """Of `opened` or `ended`."""

    # ---- starting -------------------------------------------------------------------------------

    async def start(self, config: RunConfig, program: Sequence[str]) -> None:
        """Start the driver's process, and wait until the pipeline is up.

        Raises ConfigError and StageError, as `Driver` does.
        """
        listener = Listener("127.0.0.1", self._sources, (client.PURPOSE,), once=True)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._sources.fileno(), self._read)
        job = _encode(DriverJob(config, listener.address, self._sources.secret))
        with _endings_blocked():
            self._process = subprocess.Popen(program, stdin=subprocess.PIPE)
        self._process.stdin.write(job)
        self._process.stdin.close()
        self._tasks = [loop.create_task(self._sweep()), loop.create_task(self._wait_for_end())]
        await self._changed.wait()
        if self.opened is None:
            raise self.ended

    async def _sweep(self) -> None:
        """What the sources do by the clock: they hang up on strangers."""
        while self._process is not None:
            self._read()
            await asyncio.sleep(_SWEEP_S)

    async def _wait_for_end(self) -> None:
        exit_code = await asyncio.to_thread(self._process.wait)
        self._read()  # its last word
        self._end(StageError(f"the driver's process has ended (exit code {exit_code})"))

    # ---- requests -------------------------------------------------------------------------------

    @property
    def limits(self) -> Limits:
        return self.opened.limits

    @property
    def num_unfinished(self) -> int:
        return len(self._streams)

    def submit(self, generations: Sequence[Generation]) -> Stream:
        """Run requests, together. Raises StageError when the pipeline has ended."""
        if self.ended is not None:
            raise self.ended
        stream = Stream(self, generations)
        self._streams.update(dict.fromkeys(stream.running, stream))
        self.metrics.requests.submitted(generations)
        self._send(client.Submit([generation.request for generation in generations]))
        return stream

    def abort(self, request_id: RequestId, reason: str = "abort") -> None:
        """Nothing more is said of it. Unknown ids are ignored."""
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.running.pop(request_id, None)
            self.metrics.requests.ended(request_id, reason)
            self._send(client.Abort(request_id, reason))

    # ---- what the driver says -------------------------------------------------------------------

    def _read(self) -> None:
        for source in self._sources.ready(0):
            for payload in source.receive():
                self._connection = source
                self._take(client.decode_for_client(payload))

    def _take(self, message: client.ToClient) -> None:
        match message:
            case client.Came(outputs):
                for output in outputs:
                    self._make_text(output)
            case client.Status():
                self.status, self.status_s = message, time.monotonic()
                self.metrics.pipeline.status = message
            case client.Refused(request_ids, reason):
                for request_id in request_ids:
                    stream = self._streams.pop(request_id, None)
                    if stream is not None:
                        stream.running.pop(request_id, None)
                        self.metrics.requests.ended(request_id, "error")
                        stream.fail(ConfigError(reason))
            case client.Progress(text):
                self._on_progress(text)
            case client.Opened():
                self.opened = message
                self.metrics.opened(message)
                self._changed.set()
            case client.Ended(reason, is_user_error):
                self._end(ConfigError(reason) if is_user_error else StageError(reason))

    def _make_text(self, output: Output) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            return  # it was aborted
        delta = stream.running[output.request_id].take(output)
        self.metrics.requests.came(output, delta)
        if delta.finish_reason is not None:
            del self._streams[output.request_id], stream.running[output.request_id]
            if output.finish_reason is None:  # its text ended it
                self._send(client.Abort(output.request_id, delta.finish_reason))
        if delta.error is not None:
            stream.fail(Failed(delta.error))
        else:
            stream.put(delta)

    def end_all(self, reason: str) -> None:
        """Whatever runs is told so, and nothing is taken any more."""
        self._end(StageError(reason))

    def _send(self, message: client.ToDriver) -> None:
        self._connection.send(client.encode(message))

    def _end(self, error: PipeserveError) -> None:
        if self.ended is not None:
            return
        self.ended = error
        for stream in set(self._streams.values()):
            stream.running.clear()
            stream.fail(error)
        self._streams.clear()
        self._changed.set()

    # ---- the end --------------------------------------------------------------------------------

    async def close(self) -> None:
        """End the driver's process, which ends the stages'. Safe to call twice."""
        process, self._process = self._process, None
        if process is None:
            return
        if self._connection is not None:
            self._connection.close()
        try:
            await asyncio.to_thread(process.wait, _END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop().remove_reader(self._sources.fileno())
        self._sources.close()
