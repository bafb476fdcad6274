"""A fleet whose ranks are forks of this process: real ones but for the keeper, which is in the same
process as its stage. For the tests of what takes seconds to import in each process.
"""

import os
import signal
import time
import traceback
from collections.abc import Callable

import torch
from local_fleet import LocalKeeper

from pipeserve.configs import RunConfig
from pipeserve.core.topology import Topology
from pipeserve.driver.fleet import Fleet
from pipeserve.driver.spawned_keepers import OwnRanks
from pipeserve.machine import boot_id, native_dtypes
from pipeserve.stage.worker import ModelCompute
from pipeserve.wire import control

_REST_S = 0.0005


class ForkedKeepers:
    """The `SpawnedKeepers` of such a fleet."""

    def __init__(self, machine_of: Callable[[int], str]) -> None:
        self._machine_of = machine_of
        self._pids: list[int] = []

    def start(self, own: OwnRanks, address: str, secret: bytes) -> None:
        for rank in own.ranks:
            pid = os.fork()
            if pid == 0:
                _serve(rank, own.num_ranks, address, secret, self._machine_of(rank))
            self._pids.append(pid)

    def start_again(self, rank: int) -> None: ...

    def ended(self) -> list:
        return []

    def end(self) -> None:
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._pids = []


class ForkedFleet(Fleet):
    def machine_of(self, rank: int) -> str:
        """As its keeper says."""
        return boot_id()

    def __init__(self, topology: Topology, config: RunConfig) -> None:
        super().__init__(topology, config, ForkedKeepers(self.machine_of))


def _serve(rank: int, num_ranks: int, address: str, secret: bytes, machine: str) -> None:
    """Until it is killed, or left alone. Does not return to what the fork was made in."""
    parent = os.getppid()
    hello = control.KeeperHello(
        rank, num_ranks, "here", "10.0.0.1", os.getpid(), machine, native_dtypes()
    )
    try:
        keeper = LocalKeeper(hello, address, secret, ModelCompute)
        with torch.inference_mode():
            while os.getppid() == parent:
                keeper.works()
                time.sleep(_REST_S)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
