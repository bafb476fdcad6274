"""`pipeserve serve`: the HTTP server over one pipeline, from its start to its graceful end."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from pipeserve.configs import RunConfig
from pipeserve.errors import ConfigError
from pipeserve.launch.run.driver_process import MODULE
from pipeserve.launch.run.starting import status
from pipeserve.server.app import make_app
from pipeserve.server.metrics import Metrics
from pipeserve.server.options import ServerOptions
from pipeserve.server.pipeline import Pipeline
from pipeserve.server.service import Service
from pipeserve.wire.listener import is_loopback

_KEY_VARIABLE = "PIPESERVE_API_KEY"
_LOOK_S = 0.05


def serve(run_config: RunConfig, options: ServerOptions) -> int:
    """Until a signal ends it. Returns the exit code; raises ConfigError and StageError."""
    keys = api_keys(options)
    _warn(options, keys)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    return asyncio.run(_serve(run_config, options, keys))


async def _serve(run_config: RunConfig, options: ServerOptions, keys: Sequence[str]) -> int:
    names = options.served_model_name or (run_config.model,)
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ending.set)
    with status("looking for the model") as say:
        pipeline = Pipeline(Metrics(names[0]), say)
        starting = asyncio.ensure_future(pipeline.start(run_config, [sys.executable, "-m", MODULE]))
        try:
            await _first_of(starting, ending)
            if not starting.done():  # ended before it was up
                starting.cancel()
                return 0
            starting.result()
        finally:
            if not starting.done() or starting.cancelled() or starting.exception():
                await pipeline.close()
    service = Service(pipeline, options)
    try:
        return await _listen(service, options, names, keys, ending)
    finally:
        service.close()
        await pipeline.close()


async def _listen(
    service: Service,
    options: ServerOptions,
    names: Sequence[str],
    keys: Sequence[str],
    ending: asyncio.Event,
) -> int:
    """Answers requests until `ending` or the pipeline's end."""
    app = make_app(service, options, tuple(names), tuple(keys))
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=75,
        server_header=False,
        lifespan="off",
    )
    server = _Server(config)
    serving = asyncio.ensure_future(server.serve())
    while not (server.started or serving.done()):
        await asyncio.sleep(_LOOK_S)
    if serving.done():
        serving.result()
        return 1
    port = server.servers[0].sockets[0].getsockname()[1]
    scheme = "https" if options.ssl_certfile else "http"
    print(f"serving {names[0]} at {scheme}://{options.host}:{port}/v1", file=sys.stderr, flush=True)
    exit_code = 0
    while not ending.is_set() and service.pipeline.ended is None:
        await asyncio.sleep(_LOOK_S)
    if service.pipeline.ended is not None:
        exit_code = 1
        print(f"error: {service.pipeline.ended}", file=sys.stderr)
    else:
        await _drain(service, options)
    server.should_exit = server.force_exit = True
    await serving
    return exit_code


async def _drain(service: Service, options: ServerOptions) -> None:
    """Take nothing new, and let what runs finish, within its time."""
    service.is_draining = True
    loop = asyncio.get_running_loop()
    until_s = loop.time() + options.shutdown_timeout
    while service.num_open and loop.time() < until_s and service.pipeline.ended is None:
        await asyncio.sleep(_LOOK_S)


class _Server(uvicorn.Server):
    """Whose signals are ours."""

    def install_signal_handlers(self) -> None: ...

    def capture_signals(self):  # as a context manager
        from contextlib import nullcontext

        return nullcontext()


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
