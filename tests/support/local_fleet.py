"""A pipeline whose stages run in this process: all of the runtime but the processes. For the tests.

Driver, messages, links and stage workers are the real ones, over real sockets, and keepers join as
real ones do; what is missing is that stages are processes, and compute at the same time. A pipeline
starts in a tenth of a second, so every family can be taken through every number of stages.
"""

import time
from collections.abc import Callable, Mapping

import msgspec
import torch

from pipeserve import LLM
from pipeserve.configs import RunConfig, make_config
from pipeserve.core.topology import Topology
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.driver.events import Received
from pipeserve.driver.fleet import Fleet
from pipeserve.driver.spawned_keepers import OwnRanks
from pipeserve.machine import boot_id, native_dtypes
from pipeserve.stage.compute import Compute, Tell
from pipeserve.stage.loop import StageLoop
from pipeserve.stage.vital_signs import VitalSigns
from pipeserve.stage.worker import ModelCompute
from pipeserve.wire import control
from pipeserve.wire.connecting import connect
from pipeserve.wire.sources import Sources
from pipeserve.wire.stage_job import StartStage

MakeCompute = Callable[[StartStage, Tell], Compute]


class Dies(Exception):
    """Raised by a stage's compute: its process is killed."""


class LocalKeeper:
    """Makes a stage where a real one would start a process, and lets it work when it is told to."""

    def __init__(
        self, hello: control.KeeperHello, address: str, secret: bytes, compute_of: MakeCompute
    ) -> None:
        self._rank, self._address, self._secret = hello.rank, address, secret
        self._compute_of = compute_of
        self._sources = Sources(secret)
        self._driver = connect(address, self._sources, "keeper")
        self._epoch = 0
        self._tell(hello)
        self.stage: StageLoop | None = None

    def works(self) -> None:
        """All that its stage can do without waiting: it goes on as long as it has ended a
        microbatch."""
        for source in self._sources.ready(0):
            for message in source.receive():
                self._obey(*control.decode_for_keeper(message))
        if self.stage is None:
            return
        try:
            self.stage.go_round(may_wait=False)
            while self.stage.ended_s is not None:
                self.stage.go_round(may_wait=False)
        except (Dies, SystemExit):
            self._end_stage()
            self._tell(control.StageExited(0, -9))

    def close(self) -> None:
        self._end_stage()
        self._sources.close()

    def _obey(self, epoch: int, message: control.ToKeeper) -> None:
        match message:
            case StartStage():
                self._start(message, epoch)
            case control.Heartbeat(sent_s):
                now = time.monotonic()
                self._tell(control.HeartbeatAnswer(sent_s, now, *VitalSigns()))

    def _start(self, job: StartStage, epoch: int) -> None:
        """In place of the stage that there may be."""
        self._end_stage()
        self._epoch = epoch
        sources = Sources(self._secret)
        job = msgspec.structs.replace(job, host="127.0.0.1")
        driver = connect(f"{self._address}{job.control}", sources, "stage")
        driver.send(control.encode(control.StageHello(self._rank), epoch))
        self.stage = StageLoop(job, epoch, sources, driver, self._compute_of, 0)

    def _end_stage(self) -> None:
        if self.stage is not None:
            self.stage.close()
            self.stage = None

    def _tell(self, message: control.ToDriver) -> None:
        self._driver.send(control.encode(message, self._epoch))


class LocalKeepers:
    """The `SpawnedKeepers` of a fleet all of which is here."""

    def __init__(self, compute_of: MakeCompute, boot_ids: Mapping[int, str]) -> None:
        self._compute_of, self._boot_ids = compute_of, boot_ids
        self.all: list[LocalKeeper] = []

    def start(self, own: OwnRanks, address: str, secret: bytes) -> None:
        for rank in own.ranks:
            hello = control.KeeperHello(
                rank,
                own.num_ranks,
                host="here",
                address="10.0.0.1" if rank in self._boot_ids else "127.0.0.1",
                pid=0,
                boot_id=self._boot_ids.get(rank, boot_id()),
                native_dtypes=native_dtypes(),
                device=f"device {rank}",
            )
            self.all.append(LocalKeeper(hello, address, secret, self._compute_of))

    def start_again(self, rank: int) -> None:
        raise AssertionError("a keeper that is here does not go")

    def ended(self) -> list:
        return []

    def end(self) -> None:
        for keeper in self.all:
            keeper.close()
        self.all = []


class NoKeepers:
    """The `SpawnedKeepers` of a fleet whose keepers the test itself plays, or has none."""

    def start(self, own: OwnRanks, address: str, secret: bytes) -> None: ...

    def start_again(self, rank: int) -> None: ...

    def ended(self) -> list:
        return []

    def end(self) -> None: ...


class LocalFleet(Fleet):
    """Stages work while the driver waits for them."""

    boot_ids: Mapping[int, str] = {}
    """Of the machines that keepers say they are on, where that is not this one."""

    def __init__(self, topology: Topology, config: RunConfig) -> None:
        self._here = LocalKeepers(self.compute_of, self.boot_ids)
        super().__init__(topology, config, self._here)

    @property
    def workers(self) -> list[StageLoop]:
        return [keeper.stage for keeper in self._here.all if keeper.stage is not None]

    def compute_of(self, job: StartStage, tell: Tell) -> Compute:
        return ModelCompute(job, tell)

    @torch.inference_mode()
    def receive(self, timeout_s: float, for_result: bool = False) -> list[Received]:
        deadline = time.monotonic() + timeout_s
        while True:
            for keeper in self._here.all:
                keeper.works()
            messages = super().receive(0)
            if messages or time.monotonic() > deadline:
                return messages


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
