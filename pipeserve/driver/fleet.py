"""The processes of one pipeline as the driver sees them: keepers and stages, each over a connection
of its own to one port.

Keepers are started here (`spawn`) or by torchrun and its kind (`external`); after that the two are
the same. A stage that fails or dies becomes one `StageError` that says which and why, raised from
whatever the driver was doing. Every wait has an end, at which it names who did not come. What
strangers do costs their own connection. `close` leaves no process behind.
"""

import os
import secrets
import signal
import socket
import time
from collections.abc import Callable
from math import inf
from typing import NamedTuple

import msgspec

from pipeserve.configs import RunConfig
from pipeserve.configs.addresses import join_address, split_address
from pipeserve.driver.loading import LoadWatch
from pipeserve.driver.spawned_keepers import SpawnedKeepers
from pipeserve.errors import ConfigError, StageError
from pipeserve.machine import boot_id
from pipeserve.wire import control
from pipeserve.wire.connection import Connection
from pipeserve.wire.listener import Listener, is_loopback, is_wildcard
from pipeserve.wire.secret import control_secret
from pipeserve.wire.sources import Source, Sources

_MISSED_HEARTBEATS = 5
"""After which a keeper, and its machine, is lost."""
_CLOCK_PING_S = 0.5
"""Between two looks at the clock of another machine."""
_ANSWER_S = 30.0
"""For what a stage does at once: connect to its neighbours, say how much memory it has used."""
_LAST_WORD_S = 2.0
_STOP_S = 2.0
_AT_ONCE_S = 0.001
_CHECK_S = 0.05
_DECODE = {
    "keeper": control.decode_keeper_hello,
    "stage": control.decode_stage_hello,
    "words of a keeper": control.decode_from_keeper,
    "words of a stage": control.decode_from_stage,
}
"""By what a connection carries: that of one who has not said yet who it is, nothing but that."""


class Received(NamedTuple):
    """What a stage or a keeper said, and when it was received."""

    message: control.ToDriver
    at_s: float


class Fleet:
    """P keepers, each with one stage. Single-threaded: nothing happens but inside its methods."""

    def __init__(self, num_ranks: int, config: RunConfig) -> None:
        """Listen for keepers and stages at `config.control`, by default a free port of this
        machine; with launcher "spawn", start the keepers.

        Raises ConfigError when the address is busy, or reached from beyond this machine without a
        secret.
        """
        self.num_ranks = num_ranks
        self.keepers: dict[int, control.KeeperHello] = {}
        self.waiting_s = 0.0
        """Since when the driver only waits; a result from before then waited for the driver.
        Taking a message up at once does not end the waiting (or a stage's timing that comes just
        ahead of a result would make the driver look busy), `broadcast` does."""
        self._config = config
        self._pid = os.getpid()
        self._returned_s = -inf
        self._next_check_s = -inf
        self._asked_all_s = -inf
        self.lost_stage: int | None = None
        """Of the process whose end was raised."""
        self._boot_id = boot_id()
        self._keeper_of: dict[int, Connection] = {}
        self._asked_s: dict[int, float] = {}
        """When a keeper got the first heartbeat that it has not answered."""
        self._hung_up_s: dict[Connection, float] = {}
        """When a keeper or a stage was found to have ended its connection."""
        self._loading = LoadWatch(num_ranks, inf)
        self._unread: list[Received] = []
        self._exited: control.StageExited | None = None
        self._spawned = SpawnedKeepers()
        self._stages: dict[int, Connection] = {}
        host, port = split_address(config.control) if config.control else ("127.0.0.1", 0)
        self.secret = self._find_secret(host)
        self._sources = Sources(self.secret)
        try:
            listener = self._listen(host, port)
            self.local_name = listener.local_name
            """Of where keepers and stages are listened for, to this machine."""
            self.address = config.control or join_address(listener.host, listener.port)
            """To all machines."""
            if config.launcher == "spawn":
                self._start_keepers(listener)
        except BaseException:
            self.close()
            raise

    # ---- starting -------------------------------------------------------------------------------

    def _find_secret(self, host: str) -> bytes:
        """What was given, or what the keepers that are started here can be told; empty: none."""
        given = control_secret(self._config.control_secret)
        if given is not None:
            return given
        try:
            can_tell = self._config.launcher == "spawn" and is_loopback(host)
        except OSError:  # a name that nobody knows: `_listen` says so
            can_tell = False
        return secrets.token_bytes(32) if can_tell else b""

    def _listen(self, host: str, port: int) -> Listener:
        place = join_address(host, port)
        try:
            return Listener(host, self._sources, ("keeper", "stage"), port)
        except ConfigError as error:
            raise ConfigError(f"--control {error}") from None
        except socket.gaierror as error:
            raise ConfigError(f"--control {place}: {error.strerror}") from None
        except OSError as error:
            reason = error.strerror.partition(" (")[0]
            raise ConfigError(
                f"--control {place}: {reason}; choose another address or port, "
                "or leave --control out to take any free one"
            ) from None

    def _start_keepers(self, listener: Listener) -> None:
        host = listener.host
        if is_wildcard(host):
            host = "::1" if ":" in host else "127.0.0.1"
        self._spawned.start(self.num_ranks, join_address(host, listener.port), self.secret)

    def wait_for_keepers(self, on_progress: Callable[[str], None]) -> None:
        """Until every rank's keeper has joined. Raises StageError when one does not."""
        join_s = self._config.join_timeout
        deadline = time.monotonic() + join_s
        while len(self.keepers) < self.num_ranks:
            on_progress(f"waiting for keepers: {len(self.keepers)} of {self.num_ranks} joined")
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                missing = sorted(set(range(self.num_ranks)) - set(self.keepers))
                raise StageError(
                    f"no keeper of {_ranks(missing)} joined {self.address} within {join_s:g} s"
                    f"{self._who_was_turned_away()}; start them with torchrun -m "
                    f"pipeserve.launch.keeper --control {self.address}, or raise --join-timeout"
                )
            self.receive(min(left_s, 0.5))
        self._check_addresses()

    def _who_was_turned_away(self) -> str:
        turned_away = self._sources.turned_away
        if not turned_away.counts:
            return ""
        return f" ({turned_away.counts.total():,} were turned away, the last: {turned_away.last})"

    def _check_addresses(self) -> None:
        """Stages of several machines find each other by the addresses of their keepers."""
        if len({keeper.boot_id for keeper in self.keepers.values()}) > 1:
            for rank, keeper in self.keepers.items():
                if is_loopback(keeper.address):
                    raise ConfigError(
                        f"the keeper of rank {rank} on {keeper.host} joined at {keeper.address}, "
                        "where the stages of other machines cannot reach its stage; start it with "
                        f"--control ADDRESS:{split_address(self.address)[1]}, an address of the "
                        "driver's machine in the network of the others"
                    )

    def start_stages(
        self, jobs: list[control.StartStage], on_progress: Callable[[str], None]
    ) -> list[control.StageReady]:
        """Start each rank's stage, connect neighbours; returns when all can take a step."""
        on_progress("starting stages")
        self._loading = LoadWatch(self.num_ranks, time.monotonic())
        for rank, job in enumerate(jobs):
            self._tell_keeper(rank, job)
        ready = self._gather(
            control.StageReady, self._check_loading, lambda: on_progress(str(self._loading))
        )
        for stage in range(self.num_ranks):
            is_last = stage == self.num_ranks - 1
            links = control.Connect(
                next_stage="" if is_last else ready[stage + 1].activations_at,
                first_stage=ready[0].tokens_at if is_last else "",
            )
            self._stages[stage].send(control.encode(links))
        self._gather(control.Connected, self._within_answer_time("reached its neighbours"))
        return ready

    def _gather(
        self,
        kind: type,
        check: Callable[[list[int]], None],
        on_news: Callable[[], None] = lambda: None,
    ) -> list:
        """One message of `kind` from every stage, in stage order; others are kept for `receive`.
        Calls `on_news` whenever something came, and `check`, which ends the wait, with the stages
        that have not said it yet."""
        by_stage: dict[int, object] = {}
        others: list[Received] = []
        while len(by_stage) < self.num_ranks:
            for received in self.receive(0.5):
                if isinstance(received.message, kind):
                    by_stage[received.message.stage] = received.message
                else:
                    others.append(received)
            on_news()
            check([stage for stage in range(self.num_ranks) if stage not in by_stage])
        self._unread = others
        return [by_stage[stage] for stage in range(self.num_ranks)]

    def _check_loading(self, stages: list[int]) -> None:
        timeout_s = self._config.load_timeout
        stage = self._loading.stopped(stages, timeout_s, time.monotonic())
        if stage is not None:
            self.lost_stage = stage
            raise StageError(
                f"stage {stage} on {self.keepers[stage].host} has stopped loading, "
                f"{self._loading.how_far(stage)}: it has moved no byte for {timeout_s:g} s; look "
                "at its disk, or raise --load-timeout"
            )

    def _within_answer_time(self, what: str) -> Callable[[list[int]], None]:
        deadline = time.monotonic() + _ANSWER_S

        def check(stages: list[int]) -> None:
            if stages and time.monotonic() > deadline:
                self.lost_stage = stages[0]
                hosts = ", ".join(sorted({self.keepers[stage].host for stage in stages}))
                numbers = ", ".join(map(str, stages))
                raise StageError(
                    f"stage {numbers} (on {hosts}) has not {what} within {_ANSWER_S:g} s; is it "
                    "stopped, or does a firewall stand between the machines?"
                )

        return check

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
        return self._gather(
            control.Memory, self._within_answer_time("said what memory it has used")
        )

    def receive(self, timeout_s: float) -> list[Received]:
        """What stages said, and keepers of their clocks, waiting at most `timeout_s` for the first
        of it.

        Raises StageError (ConfigError, when its input was at fault) when a stage or a keeper ended.
        """
        messages, self._unread = self._unread, []
        now = time.monotonic()
        if now - self._returned_s > _AT_ONCE_S:
            self.waiting_s = now
        for source in self._sources.ready(0 if messages else timeout_s * 1000):
            payloads = source.receive()
            at_s = time.monotonic()
            for payload in payloads:
                try:
                    message = _DECODE[source.carries](payload)
                except (msgspec.DecodeError, RecursionError):  # of a list in a list in a list
                    source.turn_away("what it says is not understood")
                    break
                self._note(Received(message, at_s), source, messages)
        self._returned_s = time.monotonic()
        if self._returned_s >= self._next_check_s:  # a system call for each of them
            self._check_keepers()
            self._ask_keepers()
            self._returned_s = time.monotonic()
            self._next_check_s = self._returned_s + _CHECK_S
        return messages

    def _note(self, received: Received, source: Source, messages: list[Received]) -> None:
        """Deal with what concerns processes; put the rest into `messages`."""
        message = received.message
        match message:
            case control.Sampled() | control.Timing():
                messages.append(received)
            case control.Pong():
                self._asked_s.pop(message.rank, None)
                self._loading.moved(message.rank, message.num_moved, received.at_s)
                if self._is_remote(message.rank):
                    messages.append(received)
            case control.Loading():
                self._loading.take(message, received.at_s)
            case control.StageHello():
                if 0 <= message.stage < self.num_ranks and message.stage not in self._stages:
                    source.carries = "words of a stage"
                    self._stages[message.stage] = source
                else:
                    source.turn_away(f"stage {message.stage} is not missing")
            case control.KeeperHello():
                self._welcome(message, source)
            case control.StageFailed():
                self.lost_stage = message.stage
                error = ConfigError if message.is_user_error else StageError
                raise error(f"stage {message.stage}: {message.reason}")
            case control.StageExited():
                self._report_exit(message)
            case _:
                messages.append(received)

    def _welcome(self, hello: control.KeeperHello, source: Connection) -> None:
        why = self._why_not(hello)
        if why:
            source.send(control.encode(control.NotWanted(why)))
            source.turn_away(why)
            return
        source.carries = "words of a keeper"
        self.keepers[hello.rank] = hello
        self._keeper_of[hello.rank] = source

    def _why_not(self, hello: control.KeeperHello) -> str:
        """Empty: it is one of ours."""
        who = f"keeper of rank {hello.rank} on {hello.host}"
        if hello.world_size != self.num_ranks:
            return (
                f"{who} is one of {hello.world_size}, and the pipeline has {self.num_ranks} "
                "stages; make --pipeline-parallel-size equal to the number of keepers"
            )
        if not 0 <= hello.rank < self.num_ranks:
            return f"{who}: there are ranks 0 to {self.num_ranks - 1}"
        if hello.rank in self.keepers:
            first = self.keepers[hello.rank]
            return f"{who}: that rank has joined already, from {first.host} (pid {first.pid})"
        return ""

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
        ended = self._spawned.ended()
        if ended is not None:
            self.lost_stage, process = ended
            raise StageError(
                f"the keeper of stage {self.lost_stage} (pid {process.pid}) ended with "
                f"{process.returncode}; was it killed by hand?"
            )
        now = time.monotonic()
        silence_s = _MISSED_HEARTBEATS * self._config.heartbeat_interval
        for rank, asked_s in self._asked_s.items():
            if now - asked_s > silence_s:
                self.lost_stage = rank
                raise StageError(
                    f"nothing heard from the keeper of stage {rank} on {self.keepers[rank].host} "
                    f"for {silence_s:g} s; is it stopped, or its machine down?"
                )
        for stage, connection in self._stages.items():
            if self._has_hung_up(connection):  # why, its keeper says within moments
                self.lost_stage = stage
                raise StageError(
                    f"stage {stage} hung up, and its keeper on {self.keepers[stage].host} does "
                    "not say why; is the network between the two up?"
                )
        for rank, connection in self._keeper_of.items():
            if self._has_hung_up(connection):
                self.lost_stage = rank
                raise StageError(
                    f"the keeper of stage {rank} on {self.keepers[rank].host} hung up; was it "
                    "ended by hand, or by its launcher?"
                )

    def _has_hung_up(self, connection: Connection) -> bool:
        """And nobody has said more of it for a while."""
        if not connection.has_ended:
            return False
        now = time.monotonic()
        return now - self._hung_up_s.setdefault(connection, now) > _LAST_WORD_S

    def _ask_keepers(self) -> None:
        """For a sign of life, now and then; those of other machines also for the time, more often.
        The answers come as any other message."""
        now = time.monotonic()
        period_s = self._config.heartbeat_interval
        if any(map(self._is_remote, self.keepers)):
            period_s = min(period_s, _CLOCK_PING_S)
        if now < self._asked_all_s + period_s:
            return
        self._asked_all_s = now
        for rank, keeper in self._keeper_of.items():
            keeper.send(control.encode(control.Ping(time.monotonic())))
            self._asked_s.setdefault(rank, now)

    def _is_remote(self, rank: int) -> bool:
        return self.keepers[rank].boot_id != self._boot_id

    def _tell_keeper(self, rank: int, message: control.ToKeeper) -> None:
        self._keeper_of[rank].send(control.encode(message))

    # ---- ending ---------------------------------------------------------------------------------

    @property
    def is_own(self) -> bool:
        """Not so in a process that was forked from the one that made it, and shares its sockets:
        what one of the two took of them, the other would miss."""
        return os.getpid() == self._pid

    def close(self) -> None:
        """End every keeper and stage. Safe to call twice, and from a half-made fleet. In a forked
        process it leaves them alone."""
        if not self.is_own:
            return
        for keeper in self._keeper_of.values():
            keeper.send(control.encode(control.Stop()))
        self._spawned.end()
        deadline = time.monotonic() + _STOP_S
        for keeper in self._keeper_of.values():  # of another launcher: it hangs up when it is done
            keeper.close(wait_s=max(deadline - time.monotonic(), 1e-3))
        self._keeper_of = {}
        self._sources.close()


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


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
