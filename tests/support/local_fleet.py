"""A pipeline whose stages run in this process: all of the runtime but the processes. For the tests.

Driver, messages, links and stage workers are the real ones, over real sockets; what is missing is
the keepers, and that stages compute at the same time. A pipeline starts in a tenth of a second, so
every family can be taken through every number of stages.
"""

import time

import msgspec
import torch

from pipeserve import LLM
from pipeserve.configs import RunConfig, make_config
from pipeserve.core.topology import Topology
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.driver.events import Received
from pipeserve.driver.fleet import Fleet
from pipeserve.machine import boot_id, native_dtypes
from pipeserve.stage.loop import StageLoop
from pipeserve.stage.worker import ModelCompute
from pipeserve.wire import control
from pipeserve.wire.connecting import connect
from pipeserve.wire.listener import Listener
from pipeserve.wire.sources import Sources


class LocalFleet(Fleet):
    """Stages are made where a keeper would be told to, and work while the driver waits for them."""

    def __init__(self, topology: Topology, config: RunConfig) -> None:
        self.workers: dict[int, StageLoop] = {}
        super().__init__(topology, config)

    def _start_keepers(self, listener: Listener) -> None:
        for rank in range(self.topology.num_ranks):
            self.keepers[rank] = control.KeeperHello(
                rank,
                self.topology.num_ranks,
                host="here",
                address="127.0.0.1",
                pid=0,
                boot_id=boot_id(),
                native_dtypes=native_dtypes(),
            )

    def receive(self, timeout_s: float) -> list[Received]:
        deadline = time.monotonic() + timeout_s
        while True:
            for worker in list(self.workers.values()):
                self._work(worker)
            messages = super().receive(0)
            if messages or time.monotonic() > deadline:
                return messages

    @torch.inference_mode()
    def _work(self, worker: StageLoop) -> None:
        """All that it can do without waiting: it goes on as long as it has ended a microbatch."""
        worker.go_round(may_wait=False)
        while worker.untold is not None:
            worker.go_round(may_wait=False)

    def close(self) -> None:
        super().close()
        for worker in self.workers.values():
            worker.close()
        self.workers = {}

    def _tell_keeper(self, rank: int, job: control.StartStage) -> None:
        """A stage in place of the one that there may be."""
        if rank in self.workers:
            self.workers.pop(rank).close()
        sources = Sources(self.secret)
        job = msgspec.structs.replace(job, host="127.0.0.1")
        driver = connect(f"{self.address}{job.control}", sources, "stage")
        driver.send(control.encode(control.StageHello(rank), self.epoch))
        with torch.inference_mode():
            self.workers[rank] = StageLoop(job, self.epoch, sources, driver, ModelCompute, 0)


def local_llm(folder: str, layers: tuple[int, ...], **options) -> LLM:
    """An LLM in float32 whose stages hold so many layers each."""
    wanted = {
        "model": folder,
        "dtype": "float32",
        "pipeline_parallel_size": len(layers),
        "pipeline_layers": list(layers),
        **options,
    }
    return LLM.on(Driver(checkpoint_setup(make_config({}, wanted)), fleet=LocalFleet))
