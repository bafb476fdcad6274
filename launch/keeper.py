"""Keeper: the small process that a launcher starts for each rank, and the parent of its stage.

    python -m pipeserve.launch.keeper --control HOST:PORT                    (RANK, WORLD_SIZE set)
    torchrun --nproc-per-node 2 -m pipeserve.launch.keeper --control HOST:PORT

torchrun and its kind end every rank when one dies, so what they see is this process, which loads no
torch and cannot run out of memory. It starts the stage when the driver says so, with a parent-death
signal, reports how the stage ended, and ends when the driver says so or is gone.
"""

import argparse
import contextlib
import ctypes
import functools
import os
import signal
import socket
import subprocess
import sys
import time

import zmq
from zmq.utils.monitor import parse_monitor_message

from pipeserve import control
from pipeserve.control import Ping, StartStage, Stop
from pipeserve.machine import boot_id, native_dtypes

_HEARTBEAT_S = 1.0
_PR_SET_PDEATHSIG = 1
_STDIN = 0


class Keeper:
    """Starts, watches and ends one stage process."""

    def __init__(
        self,
        endpoint: str,
        rank: int,
        world_size: int,
        join_timeout_s: float,
        until_stdin_closes: bool,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.join_timeout_s = join_timeout_s
        self.deadline = time.monotonic() + join_timeout_s
        self.is_connected = False
        self.exit_code: int | None = None
        self.stage: subprocess.Popen | None = None
        self.stage_exited: int | None = None  # a pidfd: readable once the stage has ended
        self.context = zmq.Context()
        self.driver = self.context.socket(zmq.DEALER)
        self.driver.identity = control.keeper_identity(rank)
        self.driver.set_hwm(0)
        self.driver.linger = 2000
        if not until_stdin_closes:
            # A driver whose machine vanished closes no connection: ZeroMQ's heartbeats notice.
            self.driver.heartbeat_ivl = 2000
            self.driver.heartbeat_timeout = 20_000
        self.connection = self.driver.get_monitor_socket(
            zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED
        )
        self.driver.connect(endpoint)
        self.endpoint = endpoint
        self.poller = zmq.Poller()
        self.poller.register(self.driver, zmq.POLLIN)
        self.poller.register(self.connection, zmq.POLLIN)
        if until_stdin_closes:
            self.poller.register(_STDIN, zmq.POLLIN)

    def run(self) -> int:
        """Until the driver says stop (0), or is gone or cannot be reached (1)."""
        self._tell(self._hello())
        try:
            while self.exit_code is None:
                ready = dict(self.poller.poll(int(_HEARTBEAT_S * 1000)))
                # One thing a turn, what the driver said before that it went.
                if self.driver in ready:
                    self._obey(control.decode_for_keeper(self.driver.recv()))
                elif self.stage_exited in ready:
                    self._report_exit()
                elif self.connection in ready:
                    self._note_connection()
                elif _STDIN in ready:
                    self.exit_code = 1  # the driver is gone; perhaps before it ever answered
                elif not self.is_connected and time.monotonic() > self.deadline:
                    self._give_up()
                self._tell(control.Heartbeat(self.rank))
        finally:
            self._end_stage()
            self.context.destroy(linger=0 if self.exit_code == 1 else None)
        return self.exit_code

    def _obey(self, message: control.ToKeeper) -> None:
        match message:
            case StartStage():
                self._start(message)
            case Stop():
                self.exit_code = 0
            case Ping():
                self._tell(control.Pong(self.rank, message.sent_s, time.monotonic()))

    def _note_connection(self) -> None:
        event = parse_monitor_message(self.connection.recv_multipart())["event"]
        self.is_connected = event == zmq.EVENT_CONNECTED
        if not self.is_connected:  # the driver is gone
            self.exit_code = 1

    def _give_up(self) -> None:
        print(
            f"error: keeper of rank {self.rank}: no driver at {self.endpoint} within "
            f"{self.join_timeout_s:g} s; start it with --launcher external",
            file=sys.stderr,
        )
        self.exit_code = 1

    def _hello(self) -> control.KeeperHello:
        return control.KeeperHello(
            rank=self.rank,
            world_size=self.world_size,
            host=socket.gethostname(),
            address=_address_towards(self.endpoint),
            pid=os.getpid(),
            boot_id=boot_id(),
            native_dtypes=native_dtypes(),
        )

    def _start(self, job: StartStage) -> None:
        cpus, num_threads = stage_cpus(sorted(os.sched_getaffinity(0)), *_local_place(self.rank))
        self.stage = subprocess.Popen(
            [sys.executable, "-m", job.module],
            stdin=subprocess.PIPE,
            env=_stage_environment(self.rank, num_threads),
            preexec_fn=functools.partial(_before_stage, os.getpid(), cpus),
        )
        self.stage_exited = os.pidfd_open(self.stage.pid)
        self.poller.register(self.stage_exited, zmq.POLLIN)
        with contextlib.suppress(BrokenPipeError):  # it ended at once: the pidfd tells
            self.stage.stdin.write(control.encode(job))
            self.stage.stdin.close()

    def _report_exit(self) -> None:
        code = self.stage.wait()
        self.poller.unregister(self.stage_exited)
        os.close(self.stage_exited)
        self.stage_exited = None
        self._tell(control.StageExited(self.rank, self.stage.pid, code))

    def _end_stage(self) -> None:
        """A stage has nothing to save, so it is killed and not asked."""
        if self.stage is not None and self.stage.poll() is None:
            self.stage.kill()
            self.stage.wait()

    def _tell(self, message: control.ToDriver) -> None:
        self.driver.send(control.encode(message))


def stage_cpus(
    available: list[int], local_rank: int, local_world_size: int
) -> tuple[list[int], int]:
    """The cores that one of `local_world_size` stages on this machine gets, and its threads.

    Shares are equal and disjoint. With more stages than cores there is nothing to pin: each stage
    may run on any core, with one thread.
    """
    share = len(available) // local_world_size
    if share == 0:
        return available, 1
    return available[local_rank * share : (local_rank + 1) * share], share


def _local_place(rank: int) -> tuple[int, int]:
    """This rank's number among those of its machine, and how many they are."""
    local_world_size = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    return int(os.environ.get("LOCAL_RANK", rank)), int(local_world_size)


def _stage_environment(rank: int, num_threads: int) -> dict[str, str]:
    """What has to be set before the stage's interpreter starts.

    Huge pages for large allocations (glibc 2.35 and newer; others ignore it): gathering KV touches
    many pages; one pair of runs of the mix in docs/bench.md took 25.4 s with and 27.0 s without.
    """
    return {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        **os.environ,
        "RANK": str(rank),
        "OMP_NUM_THREADS": str(num_threads),
    }


def _address_towards(endpoint: str) -> str:
    """The address of the interface that leads to `endpoint` (tcp://HOST:PORT); sends nothing."""
    host, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        return probe.getsockname()[0]


def _before_stage(keeper_pid: int, cpus: list[int]) -> None:
    """In the child, before it becomes the stage: take its cores; end when the keeper ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != keeper_pid:  # it ended before the line above
        os._exit(1)
    os.sched_setaffinity(0, cpus)


def _end_on_signal(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeserve.launch.keeper", description=__doc__)
    parser.add_argument(
        "--control",
        default=os.environ.get("PIPESERVE_CONTROL"),
        help="HOST:PORT of the driver (default: $PIPESERVE_CONTROL)",
    )
    parser.add_argument("--rank", type=int, default=os.environ.get("RANK"))
    parser.add_argument("--world-size", type=int, default=os.environ.get("WORLD_SIZE"))
    parser.add_argument(
        "--join-timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="how long to look for the driver (default: 120)",
    )
    parser.add_argument(
        "--until-stdin-closes",
        action="store_true",
        help="end when standard input does: the driver holds its other end",
    )
    arguments = parser.parse_args()
    for name in ("control", "rank", "world_size"):
        if getattr(arguments, name) is None:
            parser.error(f"--{name.replace('_', '-')} is needed where the launcher does not set it")
    signal.signal(signal.SIGTERM, _end_on_signal)
    signal.signal(signal.SIGINT, _end_on_signal)
    keeper = Keeper(
        f"tcp://{arguments.control}",
        int(arguments.rank),
        int(arguments.world_size),
        arguments.join_timeout,
        arguments.until_stdin_closes,
    )
    exit_code = keeper.run()
    for ending in (signal.SIGTERM, signal.SIGINT):  # it ends already
        signal.signal(ending, signal.SIG_IGN)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
