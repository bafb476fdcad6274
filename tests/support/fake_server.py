"""The HTTP server over a pipeline that is none: on a port of this machine, in a thread."""

import asyncio
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import uvloop
from fake_client import FakeClient

from pipeserve.errors import CapacityError, ConfigError, StageError
from pipeserve.server.app import make_app
from pipeserve.server.listening import bound_sockets, http_server, url_of
from pipeserve.server.metrics import Metrics
from pipeserve.server.options import ServerOptions
from pipeserve.server.pipeline import Pipeline
from pipeserve.server.service import Service
from pipeserve.wire import client


class FakePipeline(Pipeline):
    """Speaks to a FakeClient, and does as if that were a driver in another process: what the two
    say to each other is encoded and decoded. One look at the outputs every `step_s`."""

    def __init__(self, fake: FakeClient, step_s: float = 0.0) -> None:
        super().__init__(Metrics("fake"))
        self.fake, self.step_s = fake, step_s
        self.is_silent = False
        """The driver says nothing any more."""
        self.stages: list[client.StageFigures] = []
        """As it tells them."""
        self.trouble = ""
        """Why the stages take no steps now."""

    def open(self) -> None:
        """On the event loop."""
        fake = self.fake
        ids, folder = tuple(fake.eos_token_ids), str(fake.model_folder)
        self._hear(client.Opened(fake.config, fake.limits, folder, fake.vocab_size, ids))
        self._tell_status()
        self._running = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self.step_s)
            if self.is_silent:
                continue
            try:
                outputs = self.fake.outputs(0)
            except StageError as error:
                self._hear(client.Ended(str(error), False))
                return
            if outputs:
                self._hear(client.Came(outputs))
            self._tell_status()

    def _tell_status(self) -> None:
        num_running = self.fake.num_unfinished
        figures = {
            "num_running": num_running,
            "num_waiting": 0,
            "num_in_flight": 0,
            "num_blocks": 100,
            "num_free_blocks": 100 - num_running,
            "num_preemptions_total": 0,
            "num_prefix_queries_total": 0,
            "num_prefix_hits_total": 0,
            "num_wasted_decodes_total": 0,
            "window": 2,
        }
        losses = (0, int(bool(self.trouble)))
        where = [
            client.StageAt(stage, stage, "host", 100 + stage, lost)
            for stage, lost in enumerate(losses)
        ]
        self._hear(client.Status(0.0, self.trouble, where, figures, self.stages))

    def _hear(self, message: client.ToClient) -> None:
        self._take(client.decode_for_client(client.encode(message)))

    def _send(self, message: client.ToDriver) -> None:
        match client.decode_for_driver(client.encode(message)):
            case client.Submit(requests):
                try:
                    self.fake.submit(requests)
                except (CapacityError, ConfigError) as error:
                    ids = [request.id for request in requests]
                    self._hear(client.Refused(ids, str(error)))
            case client.Abort(request_id, reason):
                self.fake.abort(request_id, reason)

    async def close(self) -> None:
        self._running.cancel()


class Served:
    """A server that runs."""

    def __init__(self, url: str, pipeline: FakePipeline, service: Service) -> None:
        self.url, self.pipeline, self.service = url, pipeline, service
        self.fake = pipeline.fake
        self._loop = asyncio.get_running_loop()

    def num_tasks(self) -> int:
        """Of its event loop."""
        return len(asyncio.all_tasks(self._loop))


@contextmanager
def served(
    folder: Path,
    options: ServerOptions | None = None,
    *,
    names: tuple[str, ...] = ("fake",),
    keys: tuple[str, ...] = (),
    step_s: float = 0.0,
    **fake,
):
    """Keywords are FakeClient's; a StageError of it is the pipeline's end."""
    options = replace(options or ServerOptions(), port=0)
    started, box = threading.Event(), {}

    async def main() -> None:
        pipeline = FakePipeline(FakeClient(folder, **fake), step_s)
        pipeline.open()
        service = Service(pipeline, options)
        app = make_app(service, options, names, keys)
        server, sockets = http_server(app, options), bound_sockets(options)
        serving = asyncio.ensure_future(server.serve(sockets))
        while not server.started:
            await asyncio.sleep(0.005)
        url = url_of(options, sockets)
        box.update(server=server, served=Served(url, pipeline, service))
        started.set()
        await serving
        service.close()
        await pipeline.close()

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as `serve`
            runner.run(main())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield box["served"]
    finally:
        box["server"].should_exit = box["server"].force_exit = True
        thread.join(30)
        assert not thread.is_alive()
