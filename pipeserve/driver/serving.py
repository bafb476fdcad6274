"""A driver in a process of its own: it serves a client that speaks to it over a socket
(`wire/client.py`), and ends when that client does.

The client's socket is waited for together with those of the stages: what arrives wakes the driver.
"""

import time
from collections.abc import Callable
from types import TracebackType

from pipeserve.core.nouns import RequestId
from pipeserve.driver.driver import Driver
from pipeserve.errors import ConfigError, PipeserveError, StageError
from pipeserve.wire import client, connecting
from pipeserve.wire.sources import Sources

_STATUS_S = 0.5
_LAST_WORD_S = 2.0

StagesNow = Callable[[], list[client.StageFigures]]
"""What `Status.stages` is to say now."""


class ClientDoor:
    """The driver's end of the socket."""

    def __init__(self, address: str, secret: bytes) -> None:
        """Calls the client, which listens at `address`. Raises ConnectionError."""
        self._sources = Sources(secret)
        self._connection = connecting.connected(address, self._sources, client.PURPOSE)
        self._told_s, self._told_trouble = 0.0, ""

    def progress(self, text: str) -> None:
        """How far the stages are with starting."""
        self._send(client.Progress(text))

    def failed(self, error: PipeserveError) -> None:
        """The last word of a driver that could not start, or whose pipeline has ended."""
        self._send(client.Ended(str(error), isinstance(error, ConfigError)))

    def serve(self, driver: Driver, stages_now: StagesNow) -> None:
        """Until the client hangs up. Raises StageError when the pipeline has ended."""
        driver.wake_on(self._sources.fileno())
        self._send(_opened(driver))
        self._tell_status(driver, stages_now)
        while self._obey(driver):
            outputs = driver.outputs(_STATUS_S)
            if outputs:
                self._send(client.Came(outputs))
            is_late = time.monotonic() - self._told_s > _STATUS_S
            if is_late or driver.losses.trouble != self._told_trouble:
                self._tell_status(driver, stages_now)

    def close(self) -> None:
        """What was sent is received, if the client is there."""
        self._connection.close(wait_s=_LAST_WORD_S)
        self._sources.close()

    def __enter__(self) -> "ClientDoor":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if isinstance(error, PipeserveError):
            self.failed(error)
        self.close()

    def _send(self, message: client.ToClient) -> None:
        self._connection.send(client.encode(message))

    def _obey(self, driver: Driver) -> bool:
        """Do what the client asks for; False once it has hung up."""
        for source in self._sources.ready(0):
            for payload in source.receive():
                match client.decode_for_driver(payload):
                    case client.Submit(requests):
                        self._submit(driver, requests)
                    case client.Abort(request_id, reason):
                        driver.abort(RequestId(request_id), reason)
        return not self._connection.has_ended

    def _submit(self, driver: Driver, requests: list) -> None:
        try:
            driver.submit(requests)
        except StageError:
            raise
        except PipeserveError as error:  # which the client could not know of
            self._send(client.Refused([request.id for request in requests], str(error)))

    def _tell_status(self, driver: Driver, stages_now: StagesNow) -> None:
        self._told_s, self._told_trouble = time.monotonic(), driver.losses.trouble
        stalled_s = driver.stalled_s(self._told_s)
        where = [
            client.StageAt(
                each.stage, each.rank, each.host, each.pid, driver.losses.counts[each.stage]
            )
            for each in driver.stages
        ]
        figures = _figures(driver)
        self._send(client.Status(stalled_s, driver.losses.trouble, where, figures, stages_now()))


def _opened(driver: Driver) -> client.Opened:
    return client.Opened(
        config=driver.config,
        limits=driver.limits,
        model_folder=str(driver.model_folder),
        vocab_size=driver.vocab_size,
        eos_token_ids=tuple(driver.eos_token_ids),
    )


def _figures(driver: Driver) -> dict[str, float]:
    """Of the engine: what there is now, and what there was in all (`num_..._total`)."""
    engine, stats = driver.engine, driver.engine.stats
    return {
        "num_running": engine.num_running,
        "num_waiting": engine.num_waiting,
        "num_in_flight": engine.num_outstanding,
        "window": engine.window,
        "num_blocks": driver.limits.num_blocks,
        "num_free_blocks": engine.num_free_blocks,
        "num_preemptions_total": stats.preemptions,
        "num_prefix_queries_total": stats.prefix_queries,
        "num_prefix_hits_total": stats.prefix_hits,
        "num_wasted_decodes_total": stats.wasted_decodes,
    }
