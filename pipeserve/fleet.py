"""The processes of one pipeline as the driver sees them: keepers over one ZeroMQ socket, stages
each over a connection of its own.

Keepers are started here (`spawn`) or by torchrun and its kind (`external`); after that the two are
the same. A stage that fails or dies becomes one `StageError` that says which and why, raised from
whatever the driver was doing. `close` leaves no process behind.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from math import inf
from typing import NamedTuple

import zmq

from pipeserve import control
from pipeserve.connection import Connection, FromZmq, Listener, Sources
from pipeserve.errors import ConfigError, StageError
from pipeserve.machine import boot_id

_JOIN_TIMEOUT_S = 120.0
_KEEPER_SILENCE_S = 30.0
_LAST_WORD_S = 2.0
_CLOSE_S = 5.0
_AT_ONCE_S = 0.001
_CHECK_S = 0.05


class Received(NamedTuple):
    """What a stage or a keeper said, and when it was received."""

    message: control.ToDriver
    at_s: float


class Fleet:
    """P keepers, each with one stage. Single-threaded: nothing happens but inside its methods."""

    def __init__(self, num_ranks: int, launcher: str, address: str | None) -> None:
        """Listen for keepers at `address` (HOST:PORT) and for stages on a free port of the same
        host; with `launcher="spawn"`, start the keepers.

        Raises ConfigError when `address` is malformed or busy.
        """
        self.num_ranks = num_ranks
        self.keepers: dict[int, control.KeeperHello] = {}
        self.waiting_s = 0.0
        """Since when the driver only waits; a result from before then waited for the driver.
        Taking a message up at once does not end the waiting (or a stage's timing that comes just
        ahead of a result would make the driver look busy), `broadcast` does."""
        self._returned_s = -inf
        self._next_check_s = -inf
        self.lost_stage: int | None = None
        """Of the process whose end was raised."""
        self._boot_id = boot_id()
        self._last_heard: dict[int, float] = {}
        self._hung_up_s: dict[int, float] = {}
        """When a stage was found to have ended its connection."""
        self._loading: dict[int, control.Loading] = {}
        self._unread: list[Received] = []
        self._exited: control.StageExited | None = None
        self._processes: list[subprocess.Popen] = []
        self._sources = Sources()
        self._stages: dict[int, Connection] = {}
        self._context = zmq.Context()
        self._keeper_socket = self._context.socket(zmq.ROUTER)
        self._keeper_socket.set_hwm(0)
        self._keeper_socket.linger = 1000
        # An unroutable message raises and is never dropped.
        self._keeper_socket.router_mandatory = True
        FromZmq(self._keeper_socket, self._sources, "keepers")
        try:
            self.address = self._bind(address)
            self.stages_address = self._listen_for_stages()
            if launcher == "spawn":
                self._processes = [self._spawn_keeper(rank) for rank in range(num_ranks)]
        except BaseException:
            self.close()
            raise

    # ---- starting -------------------------------------------------------------------------------

    def _bind(self, address: str | None) -> str:
        if address is None:
            return f"127.0.0.1:{self._keeper_socket.bind_to_random_port('tcp://127.0.0.1')}"
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError(f"--control {address!r} is not HOST:PORT, such as 127.0.0.1:29600")
        try:
            self._keeper_socket.bind(f"tcp://{address}")
        except zmq.ZMQError as error:
            raise ConfigError(
                f"--control {address}: {error.strerror}; choose another port, "
                "or leave --control out to take any free one"
            ) from None
        return address

    def _listen_for_stages(self) -> str:
        endpoint = self._keeper_socket.last_endpoint.decode()  # numeric, whatever was asked for
        host = endpoint.removeprefix("tcp://").rpartition(":")[0]
        return Listener(host, self._sources, "stages").address

    def _spawn_keeper(self, rank: int) -> subprocess.Popen:
        return subprocess.Popen(
            [
                sys.executable,
                *("-m", "pipeserve.launch.keeper"),
                *("--control", self.address, "--until-stdin-closes"),
            ],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.num_ranks),
                "LOCAL_WORLD_SIZE": str(self.num_ranks),
            },
            stdin=subprocess.PIPE,  # closes when this process ends, however it ends
            start_new_session=True,  # Ctrl-C reaches the driver, which ends the rest in order
        )

    def wait_for_keepers(self, on_progress: Callable[[str], None]) -> None:
        """Until every rank's keeper has said hello. Raises StageError when one does not."""
        deadline = time.monotonic() + _JOIN_TIMEOUT_S
        while len(self.keepers) < self.num_ranks:
            on_progress(f"waiting for keepers: {len(self.keepers)} of {self.num_ranks} joined")
            if time.monotonic() > deadline:
                missing = sorted(set(range(self.num_ranks)) - set(self.keepers))
                raise StageError(
                    f"no keeper of rank {missing} joined {self.address} within "
                    f"{_JOIN_TIMEOUT_S:g} s; start them with "
                    f"torchrun -m pipeserve.launch.keeper --control {self.address}"
                )
            self.receive(0.5)

    def start_stages(
        self, jobs: list[control.StartStage], on_progress: Callable[[str], None]
    ) -> list[control.StageReady]:
        """Start each rank's stage, connect neighbours; returns when all can take a step."""
        on_progress("starting stages")
        for rank, job in enumerate(jobs):
            self._tell_keeper(rank, job)
        ready = self._gather(
            control.StageReady, lambda: on_progress(_how_far(self._loading, self.num_ranks))
        )
        for stage in range(self.num_ranks):
            is_last = stage == self.num_ranks - 1
            links = control.Connect(
                next_stage="" if is_last else ready[stage + 1].activations_at,
                first_stage=ready[0].tokens_at if is_last else "",
            )
            self._stages[stage].send(control.encode(links))
        self._gather(control.Connected)
        return ready

    def _gather(self, kind: type, on_news: Callable[[], None] = lambda: None) -> list:
        """One message of `kind` from every stage, in stage order; others are kept for `receive`.
        Calls `on_news` whenever something came."""
        by_stage: dict[int, object] = {}
        others: list[Received] = []
        while len(by_stage) < self.num_ranks:
            for received in self.receive(1.0):
                if isinstance(received.message, kind):
                    by_stage[received.message.stage] = received.message
                else:
                    others.append(received)
            on_news()
        self._unread = others
        return [by_stage[stage] for stage in range(self.num_ranks)]

    # ---- running --------------------------------------------------------------------------------

    def broadcast(self, message: control.ToStage) -> None:
        """The same bytes to every stage, first to the first, which may be waiting for them. That
        one has ended, `receive` says."""
        encoded = control.encode(message)
        for stage in range(self.num_ranks):
            self._stages[stage].send(encoded)
        self._returned_s = -inf

    def gather_memory(self) -> list[control.Memory]:
        """Ask every stage for its peak memory. Only while no microbatch is outstanding."""
        self.broadcast(control.ReportMemory())
        return self._gather(control.Memory)

    def ping_remote(self) -> None:
        """Ask each keeper that has another clock than this process for the time; the answers come
        as any other message."""
        for rank, keeper in self.keepers.items():
            if keeper.boot_id != self._boot_id:
                self._tell_keeper(rank, control.Ping(time.monotonic()))

    def receive(self, timeout_s: float) -> list[Received]:
        """What stages said, waiting at most `timeout_s` for the first of it.

        Raises StageError (ConfigError, when its input was at fault) when a stage or a keeper ended.
        """
        messages, self._unread = self._unread, []
        now = time.monotonic()
        if now - self._returned_s > _AT_ONCE_S:
            self.waiting_s = now
        for source in self._sources.ready(0 if messages else int(timeout_s * 1000)):
            payloads = source.receive()
            at_s = time.monotonic()
            for payload in payloads:
                if source.carries == "keepers":
                    payload = payload[-1].buffer
                message = control.decode_for_driver(payload)
                if isinstance(message, control.StageHello):
                    self._stages[message.stage] = source
                else:
                    self._note(Received(message, at_s), messages)
        self._returned_s = time.monotonic()
        if self._returned_s >= self._next_check_s:  # a system call for each of them
            self._check_keepers()
            self._returned_s = time.monotonic()
            self._next_check_s = self._returned_s + _CHECK_S
        return messages

    def _note(self, received: Received, messages: list[Received]) -> None:
        """Deal with what concerns processes; put the rest into `messages`."""
        message = received.message
        match message:
            case control.Heartbeat():
                self._last_heard[message.rank] = received.at_s
            case control.Loading():
                self._loading[message.stage] = message
            case control.KeeperHello():
                self._welcome(message)
            case control.StageFailed():
                self.lost_stage = message.stage
                error = ConfigError if message.is_user_error else StageError
                raise error(f"stage {message.stage}: {message.reason}")
            case control.StageExited():
                self._report_exit(message)
            case _:
                messages.append(received)

    def _welcome(self, hello: control.KeeperHello) -> None:
        if hello.world_size != self.num_ranks:
            raise ConfigError(
                f"the launcher started {hello.world_size} keepers, the pipeline has "
                f"{self.num_ranks} stages; make --pipeline-parallel-size equal to it"
            )
        self.keepers[hello.rank] = hello
        self._last_heard[hello.rank] = time.monotonic()

    def _report_exit(self, exited: control.StageExited) -> None:
        """Raise for a stage that ended, with its own last word if that is still on its way."""
        if self._exited is not None:
            return
        self._exited = exited
        self.lost_stage = exited.rank
        stage = self._stages.get(exited.rank)
        deadline = time.monotonic() + _LAST_WORD_S
        while exited.exit_code > 0 and time.monotonic() < deadline:
            if stage is not None and stage.has_ended:
                break
            self.receive(0.1)
        raise StageError(
            f"stage {exited.rank} (pid {exited.pid} on {self.keepers[exited.rank].host}) died: "
            f"{_describe_exit(exited.exit_code)}"
        )

    def _check_keepers(self) -> None:
        for rank, process in enumerate(self._processes):
            if process.poll() is not None:
                self.lost_stage = rank
                raise StageError(
                    f"the keeper of stage {rank} (pid {process.pid}) ended with "
                    f"{process.returncode}; was it killed by hand?"
                )
        for rank, heard in self._last_heard.items():
            if time.monotonic() - heard > _KEEPER_SILENCE_S:
                self.lost_stage = rank
                raise StageError(
                    f"nothing heard from the keeper of stage {rank} on {self.keepers[rank].host} "
                    f"for {_KEEPER_SILENCE_S:g} s; is the machine up?"
                )
        self._check_connections()

    def _check_connections(self) -> None:
        for stage, connection in self._stages.items():
            if connection.has_ended:  # why, its keeper says within moments
                hung_up_s = self._hung_up_s.setdefault(stage, time.monotonic())
                if time.monotonic() - hung_up_s > _LAST_WORD_S:
                    self.lost_stage = stage
                    raise StageError(
                        f"stage {stage} hung up, and its keeper on {self.keepers[stage].host} does "
                        "not say why; is the network between the two up?"
                    )

    def _tell_keeper(self, rank: int, message: control.ToKeeper) -> None:
        identity = control.keeper_identity(rank)
        try:
            self._keeper_socket.send_multipart([identity, control.encode(message)])
        except zmq.ZMQError as error:
            deadline = time.monotonic() + _LAST_WORD_S
            while time.monotonic() < deadline:
                self.receive(0.1)  # raises when it learns why
            self.lost_stage = rank
            raise StageError(f"{identity.decode()} cannot be reached: {error.strerror}") from None

    # ---- ending ---------------------------------------------------------------------------------

    def close(self) -> None:
        """End every keeper and stage. Safe to call twice, and from a half-made fleet."""
        for rank in self.keepers:
            with contextlib.suppress(zmq.ZMQError):
                self._keeper_socket.send_multipart(
                    [control.keeper_identity(rank), control.encode(control.Stop())]
                )
        self.keepers = {}
        for process in self._processes:
            process.terminate()  # for a keeper that has not said hello yet
        for process in self._processes:
            _end_keeper(process)
        self._processes = []
        self._sources.close()
        self._context.destroy()


def _end_keeper(process: subprocess.Popen) -> None:
    """Give it time to end its stage. Killing it ends the stage too, by the parent-death signal."""
    try:
        process.wait(_CLOSE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _how_far(loading: Mapping[int, control.Loading], num_stages: int) -> str:
    """What the stages together have read of their weights."""
    if len(loading) < num_stages:  # what there is to read is not known yet
        return f"starting stages: {len(loading)} of {num_stages} load weights"
    done = sum(stage.num_read for stage in loading.values())
    total = sum(stage.num_bytes for stage in loading.values())
    share = done / total if total else 1.0  # stages without layers have nothing to read
    return f"loading weights: {done / 1e9:.2f} of {total / 1e9:.2f} GB, {share:.0%}"


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    if -code == signal.SIGKILL:
        return (
            f"killed by {name}, often the kernel when memory runs out; "
            "use more stages or a smaller --kv-cache-memory-bytes"
        )
    return f"killed by {name}"
