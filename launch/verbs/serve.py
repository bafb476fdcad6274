"""`pipeserve serve`: the HTTP server over one pipeline, from its start to its graceful end."""

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop

from pipeserve.configs import RunConfig
from pipeserve.errors import ConfigError
from pipeserve.launch.run.driver_process import MODULE
from pipeserve.launch.run.phases import status
from pipeserve.server.app import make_app
from pipeserve.server.listening import bound_sockets, check_certificate, http_server, url_of
from pipeserve.server.metrics import Metrics
from pipeserve.server.options import ServerOptions
from pipeserve.server.pipeline import Pipeline
from pipeserve.server.service import Service
from pipeserve.wire.listener import is_loopback

_KEY_VARIABLE = "PIPESERVE_API_KEY"
_LOOK_S = 0.05
_OBJECTS = 50_000
"""Made since the last collection of garbage, for the next one. At Python's 700 a body of a million
small lists is three times as long in the reading."""
_ONE_PRESS_S = 1.0
"""Two signals within are one: what runs the server may hand on what reached both of them."""
_LAST_WORDS_S = 5.0
"""In which answers that are made have to be read, at the end."""


def serve(run_config: RunConfig, options: ServerOptions) -> int:
    """Until a signal ends it. Returns the exit code; raises ConfigError and StageError."""
    keys = api_keys(options)
    _warn(options, keys)
    _allow_open_files()
    check_certificate(options)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    with contextlib.ExitStack() as closing:
        sockets = [closing.enter_context(each) for each in bound_sockets(options)]
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(run_config, options, keys, sockets))


def _allow_open_files() -> None:
    """As many as the process may: each client is one, and where there is no room for one more, it
    is hung up on. The usual limit, 1,024, is for programs that are older than poll(2)."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class _Signals:
    """Ctrl-C, SIGTERM and a terminal that closes: the first asks for a graceful end, the second
    does not wait for it."""

    def __init__(self) -> None:
        self.ending, self.at_once = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._asked_s = 0.0
        """When the first came."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                self._loop.add_signal_handler(number, self._came)

    def _came(self) -> None:
        if not self.ending.is_set():
            self._asked_s = self._loop.time()
        elif self._loop.time() - self._asked_s > _ONE_PRESS_S:
            self.at_once.set()
        self.ending.set()


async def _serve(
    run_config: RunConfig,
    options: ServerOptions,
    keys: Sequence[str],
    sockets: list[socket.socket],
) -> int:
    names = options.served_model_name or (run_config.model,)
    signals = _Signals()
    with status("looking for the model") as say:
        pipeline = Pipeline(Metrics(names[0]), say)
        starting = asyncio.ensure_future(pipeline.start(run_config, [sys.executable, "-m", MODULE]))
        try:
            await _first_of(starting, signals.ending)
            if not starting.done():  # ended before it was up
                starting.cancel()
                return 0
            starting.result()
        finally:
            if not starting.done() or starting.cancelled() or starting.exception():
                await pipeline.close()
    service = None
    try:
        service = Service(pipeline, options)
        gc.collect()
        gc.freeze()  # what there is now stays: to walk through all of it would stop every stream
        gc.set_threshold(_OBJECTS)
        return await _listen(service, options, names, keys, sockets, signals)
    finally:
        if service is not None:
            service.close()
        await pipeline.close()


async def _listen(
    service: Service,
    options: ServerOptions,
    names: Sequence[str],
    keys: Sequence[str],
    sockets: list[socket.socket],
    signals: _Signals,
) -> int:
    """Answers requests until a signal or the pipeline's end."""
    server = http_server(make_app(service, options, tuple(names), tuple(keys)), options)
    url = url_of(options, sockets)
    serving = asyncio.ensure_future(server.serve(sockets))
    while not (server.started or serving.done()):
        await asyncio.sleep(_LOOK_S)
    if serving.done():
        try:
            serving.result()
        except OSError as error:  # somebody else was bound to the port too, and listened first
            raise ConfigError(f"{url}: {error.strerror}; give another --port") from None
        return 1
    print(f"serving {names[0]} at {url}/v1", file=sys.stderr, flush=True)
    exit_code = 0
    while not signals.ending.is_set() and service.pipeline.ended is None:
        await asyncio.sleep(_LOOK_S)
    if service.pipeline.ended is not None:
        exit_code = 1
        print(f"error: {service.pipeline.ended}", file=sys.stderr)
    else:
        await _drain(service, options, signals)
    server.end(_LAST_WORDS_S)
    await _first_of(serving, signals.at_once)
    server.end(0.0)
    await serving
    return exit_code


async def _drain(service: Service, options: ServerOptions, signals: _Signals) -> None:
    """Take nothing new, and let what runs finish, within its time; the rest is told that it is
    ended."""
    service.is_draining = True
    loop = asyncio.get_running_loop()
    until_s = loop.time() + options.shutdown_timeout
    while service.num_open and service.pipeline.ended is None:
        if signals.at_once.is_set() or loop.time() >= until_s:
            service.pipeline.end_all("the server is shutting down")
        await asyncio.sleep(_LOOK_S)


async def _first_of(future: asyncio.Future, event: asyncio.Event) -> None:
    waiting = asyncio.ensure_future(event.wait())
    await asyncio.wait((future, waiting), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


# ---- who may call -------------------------------------------------------------------------------


def api_keys(options: ServerOptions) -> tuple[str, ...]:
    """Of the flags, the file and the environment. Raises ConfigError."""
    keys = [*options.api_key]
    if options.api_key_file is not None:
        try:
            lines = Path(options.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "is not UTF-8"
            raise ConfigError(f"--api-key-file {options.api_key_file}: {reason}") from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ConfigError(f"--api-key-file {options.api_key_file} has no key")
        keys += found
    if os.environ.get(_KEY_VARIABLE):
        keys.append(os.environ[_KEY_VARIABLE])
    if any(not key.strip() for key in keys):
        raise ConfigError("an API key is empty, which lets everybody in; leave it out instead")
    return tuple(keys)


def _warn(options: ServerOptions, keys: Sequence[str]) -> None:
    try:
        is_near = is_loopback(options.host)
    except OSError as error:
        raise ConfigError(f"--host {options.host}: {error.strerror}") from None
    if not keys and not is_near:
        print(
            f"warning: {options.host} can be reached from other machines, and whoever does may "
            "use the model; give an --api-key",
            file=sys.stderr,
        )
