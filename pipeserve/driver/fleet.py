"""The processes of one pipeline as the driver sees them: keepers and stages, each over a connection
of its own to one port.

Keepers are started here (`spawn`) or by others, such as the processes of a launched job
(`external`); after that the two are the same. `receive` gives what they say and what happens to
them (`events.py`), in order; the driver decides what comes of it, and waits for what it needs
(`waiting.py`). What strangers do costs their own connection. `close` leaves no process behind.

By rank (`core/topology.py`), and in epochs: each start of the stages begins a fresh one, and what
is said of an old one is dropped.
"""

import os
import time
from collections.abc import Sequence
from math import inf

import msgspec

from pipeserve.configs import RunConfig
from pipeserve.core.topology import Topology
from pipeserve.driver.events import FleetEvent, Gone, Joined, Lost, Ready, Received, Sized
from pipeserve.driver.joining import why_not
from pipeserve.driver.members import Members
from pipeserve.driver.port import Heard, Port
from pipeserve.driver.spawned_keepers import OwnRanks, SpawnedKeepers
from pipeserve.driver.starting import StartProgress, links_of
from pipeserve.driver.watching import FleetWatch
from pipeserve.machine import boot_id
from pipeserve.wire import control
from pipeserve.wire.connection import Connection
from pipeserve.wire.stage_job import StartStage
from pipeserve.wire.step_messages import HeadTiming, Sampled, Timing
from pipeserve.wire.strangers import TurnedAway

_STOP_S = 2.0
_AT_ONCE_S = 0.001
_CHECK_S = 0.05


class Fleet:
    """A keeper for each rank, each with one stage. Single-threaded: nothing happens but inside its
    methods."""

    def __init__(
        self, topology: Topology, config: RunConfig, spawned: SpawnedKeepers | None = None
    ) -> None:
        """Listen for keepers and stages at `config.control`, by default a free port of this
        machine; unless the launcher is external, start the keepers, as `spawned` does it.

        Raises ConfigError when the address is busy, or reached from beyond this machine without a
        secret.
        """
        self.topology = topology
        self.epoch = 0
        """Of the stages that were started last."""
        self.waiting_s = 0.0
        """Since when the driver only waits; a result from before then waited for the driver.
        Taking a message up at once does not end the waiting (or a stage's timing that comes just
        ahead of a result would make the driver look busy), `broadcast` does."""
        self.config = config
        self._pid = os.getpid()
        self._returned_s = -inf
        self._next_check_s = -inf
        self._members = Members(topology)
        self.keepers = self._members.hellos
        """Of the ranks whose keepers are there: what each said of itself."""
        self._start: StartProgress | None = None
        """Of this epoch; None before the first."""
        self._jobs: Sequence[StartStage] = ()
        """Of each rank's stage, whenever its keeper is there to start it."""
        self._started_in: dict[int, int] = {}
        """The epoch in which a rank's keeper was told to start its stage: of that one it speaks."""
        self._have_weights: set[int] = set()
        """Ranks whose stages do, and keep them in a fresh epoch."""
        self._lost: set[int] = set()
        """Ranks whose loss in this epoch was reported."""
        self._unread: list[Received] = []
        self._spawned = spawned or SpawnedKeepers()
        self._watch = FleetWatch(config.heartbeat_interval, self._members, self._spawned)
        self._port = Port(config)
        self.secret = self._port.secret
        self.local_name = self._port.local_name
        """Of where keepers and stages are listened for, to this machine."""
        self.address = self._port.address
        """To all machines."""
        try:
            if config.launcher != "external":
                ranks = OwnRanks.all(topology.num_ranks)
                self._spawned.start(ranks, self._port.address_here, self.secret)
        except BaseException:
            self.close()
            raise

    def wake_on(self, descriptor: int) -> None:
        """`receive` returns, too, when this can be read from: who else speaks to the driver."""
        self._port.wake_on(descriptor)

    @property
    def turned_away(self) -> TurnedAway:
        """Strangers, and others who do not belong here."""
        return self._port.turned_away

    # ---- starting -------------------------------------------------------------------------------

    def start(self, jobs: Sequence[StartStage]) -> None:
        """Begin a fresh epoch: `Sized` says when all stages wait for `TakeMemory`, and then `Ready`
        when all can take a step. Those that are there keep their process and their weights; those
        that are not are started, once their keepers are there. Nothing that a stage says of an old
        epoch is heard any more."""
        self.epoch += 1
        self._jobs = jobs
        dead = self._to_start(len(jobs))
        self._lost.clear()
        self._watch.start_again()
        now = time.monotonic()
        staying = self._have_weights.difference(dead)
        self._start = StartProgress(self.topology, self.keepers, self.config, now, staying)
        for rank in dead:
            self._members.stage_is_gone(rank)
        for rank, stage in self._members.stages.items():
            stage.send(control.encode(control.Renew(jobs[rank].work), self.epoch))
        for rank in dead:
            self._start_stage(rank)

    def _to_start(self, num_ranks: int) -> list[int]:
        """Ranks whose stages are not there; and those who share a stage with them, who may wait for
        them in a way that nothing ends but their own end."""
        dead = [rank for rank in range(num_ranks) if not self._is_alive(rank)]
        return sorted({peer for rank in dead for peer in self.topology.peers_of(rank)})

    def _is_alive(self, rank: int) -> bool:
        """Or being started, as far as is known."""
        if rank in self._lost or self._watch.has_exited(rank):
            return False
        stage = self._members.stages.get(rank)
        return rank in self._started_in if stage is None else not stage.has_ended

    def _start_stage(self, rank: int) -> None:
        """In place of the one that there was."""
        self._started_in.pop(rank, None)
        self._have_weights.discard(rank)
        if rank in self.keepers:
            self._started_in[rank] = self.epoch
            share = self._members.core_share(rank)
            job = msgspec.structs.replace(self._jobs[rank], core_share=share)
            self._members.tell_keeper(rank, job, self.epoch)

    def _connect(self, stages: Sequence[control.StageReady]) -> None:
        """All have loaded: sends each the addresses at which its neighbours listen."""
        machines = [self.keepers[rank].boot_id for rank in range(self.topology.num_ranks)]
        for rank, connection in self._members.stages.items():
            links = links_of(rank, self.topology, stages, machines)
            connection.send(control.encode(links, self.epoch))

    def begin_loading(self) -> None:
        """Now: until here, stages had something else to do."""
        self._start.loading.begin(time.monotonic())

    def how_far(self) -> str:
        """With the start, in words."""
        return str(self._start)

    # ---- running --------------------------------------------------------------------------------

    def broadcast(self, message: control.ToStage) -> None:
        """To every rank's stage. That one has ended, `receive` says."""
        self._members.tell_stages(message, self.epoch)
        self._returned_s = -inf

    def receive(self, timeout_s: float, for_result: bool = False) -> list[Received]:
        """What stages said, and keepers of their clocks, and what happened to them, waiting at most
        `timeout_s` for the first of it. That one was lost comes behind all that was here before.

        `for_result`: where nothing is there, it waits for who samples, or for somebody's end.
        What the others say, when they computed what, need not wake the driver each time.
        """
        came, self._unread = self._unread, []
        num_lost = len(self._lost)
        now = time.monotonic()
        if now - self._returned_s > _AT_ONCE_S:
            self.waiting_s = now
        is_waiting = self._watch.is_waiting  # for somebody's last word, which is urgent
        timeout_s = min(timeout_s, _CHECK_S if is_waiting else self._watch.look_s)
        for heard in self._port.heard(0 if came else timeout_s, for_result and not is_waiting):
            self._note(heard, came)
        self._returned_s = time.monotonic()
        if self._returned_s >= self._next_check_s or self._watch.is_waiting:
            self._check(came)  # a system call for each of them
            self._returned_s = time.monotonic()
            self._next_check_s = self._returned_s + _CHECK_S
        if len(self._lost) > num_lost:
            came.sort(key=lambda received: isinstance(received.message, Lost | Gone))
        return came

    def is_remote(self, rank: int) -> bool:
        """Its keeper, and so its stage, is on another machine, with another clock."""
        return self._watch.is_remote(rank)

    def give_up(self, rank: int, why: str, by_work: bool = True) -> None:
        """Its stage does not do what it owes: lost, as `receive` tells next."""
        now = time.monotonic()
        if rank in self.keepers:  # is that one there?
            self._watch.asked(rank, now)
            self._members.tell_keeper(rank, control.Heartbeat(now), self.epoch)
        self._happened(Lost(why, by_work=by_work), rank, now, self._unread)

    def keep(self, received: list[Received]) -> None:
        """What one who waited for something else did not take: `receive` gives it again."""
        self._unread = received + self._unread

    def _note(self, heard: Heard, came: list[Received]) -> None:
        """Deal with what concerns processes; put the rest, and what happened, into `came`."""
        message, epoch, source, at_s = heard
        rank = self._members.rank_of.get(source)
        if rank is None:  # it says who it is
            if isinstance(message, control.KeeperHello):
                self._welcome(message, source, at_s, came)
            else:
                self._take_in(message, source, epoch)
        elif source is self._members.keepers.get(rank):
            self._note_keeper(message, rank, at_s, epoch, came)
        elif epoch == self.epoch:
            self._note_stage(message, rank, at_s, came)

    def _note_stage(
        self, message: control.FromStage, rank: int, at_s: float, came: list[Received]
    ) -> None:
        epoch = self.epoch
        match message:
            case (
                Sampled()
                | Timing()
                | HeadTiming()
                | control.Memory()
                | control.Examined()
                | control.Heartbeat()
            ):
                came.append(Received(message, rank, at_s, epoch))
            case control.Loading():
                self._start.loading.take(rank, message, at_s)
            case control.StageSized():
                if self._start.sized(rank, message, at_s):
                    came.append(Received(Sized(self._start.sizes), 0, at_s, epoch))
            case control.StageReady():
                self._have_weights.add(rank)
                if self._start.loaded(rank, message, at_s):
                    self._connect(self._start.stages)
            case control.Connected():
                if self._start.connected(rank):
                    came.append(Received(Ready(self._start.stages), 0, at_s, epoch))
            case control.Unreached():  # by one that goes on, once its neighbour is there
                why = f"{self.topology.name(rank)}: {message.reason}"
                came.append(Received(Lost(why), rank, at_s, epoch))
            case control.StageFailed():
                why = f"{self.topology.name(rank)}: {message.reason}"
                self._happened(Lost(why, message.is_user_error), rank, at_s, came)

    def _note_keeper(
        self,
        message: control.FromKeeper,
        rank: int,
        at_s: float,
        epoch: int,
        came: list[Received],
    ) -> None:
        """A keeper speaks in the epoch in which it has started its stage."""
        is_of_stage = epoch == self._started_in.get(rank, self.epoch)
        match message:
            case control.HeartbeatAnswer():
                self._watch.answered(rank)
                if is_of_stage and self._start is not None:
                    self._watch.is_in_state(rank, message.state, at_s)
                    self._start.signs(rank, message, at_s)
                came.append(Received(message, rank, at_s, self.epoch))
            case control.LastSpans():  # of the stage before, where that was given up
                came.append(Received(message, rank, at_s, self.epoch))
            case control.StageExited() if is_of_stage:
                self._watch.exited(rank, message, at_s)

    def _welcome(
        self, hello: control.KeeperHello, source: Connection, at_s: float, came: list[Received]
    ) -> None:
        if self.config.restart and self._is_missed(hello.rank, at_s):
            why = f"the keeper of {self.topology.name(hello.rank)} was gone, and joins again"
            lost = Lost(why, by_work=False)
            self._happened(lost, hello.rank, at_s, came)
            self._happened(Gone(), hello.rank, at_s, came)
        why = why_not(hello, self.topology, self.keepers)
        if why:
            source.send(control.encode(control.NotWanted(why), self.epoch))
            source.turn_away(why)
            return
        self._members.keeper_joined(hello, source)
        self._happened(Joined(), hello.rank, at_s, came)
        if self._jobs:  # it comes again
            self._start.loading.begin_one(hello.rank, at_s)
            self._members.stage_is_gone(hello.rank)
            self._start_stage(hello.rank)

    def _is_missed(self, rank: int, now: float) -> bool:
        """A keeper that has joined, and hung up or is silent: another one may take its place."""
        keeper = self._members.keepers.get(rank)
        return keeper is not None and (keeper.has_ended or self._watch.is_silent(rank, now))

    def _take_in(self, hello: control.StageHello, source: Connection, epoch: int) -> None:
        is_missing = hello.rank not in self._members.stages
        is_ours = 0 <= hello.rank < self.topology.num_ranks and is_missing
        is_ours = is_ours and epoch == self._started_in.get(hello.rank, self.epoch)
        if not is_ours or self._start is None:
            source.turn_away(f"the stage of rank {hello.rank} is not missing")
            return
        samples = not self._jobs or self._jobs[hello.rank].samples
        self._members.stage_came(hello.rank, source, samples)
        if epoch != self.epoch:  # another one was lost meanwhile
            renew = control.Renew(self._jobs[hello.rank].work)
            source.send(control.encode(renew, self.epoch))

    def _check(self, came: list[Received]) -> None:
        """Who is still there; and ask, for the next time."""
        now = time.monotonic()
        for rank, event in self._watch.look(now):
            self._happened(event, rank, now, came)
        late = self._start.late(now) if self._start is not None else None
        if late is not None:
            self._happened(late[1], late[0], now, came)
        for rank in self._watch.to_ask(now):
            self._members.tell_keeper(rank, control.Heartbeat(time.monotonic()), self.epoch)

    def _happened(self, event: FleetEvent, rank: int, at_s: float, came: list[Received]) -> None:
        """Tell it, once."""
        match event:
            case Lost():
                if rank in self._lost:
                    return
                self._lost.add(rank)
            case Gone():
                if not self._members.keeper_is_gone(rank):
                    return
                self._started_in.pop(rank, None)
                if self.config.restart and self._jobs:
                    self._spawned.start_again(rank)
        came.append(Received(event, rank, at_s, self.epoch))

    # ---- ending ---------------------------------------------------------------------------------

    @property
    def is_own(self) -> bool:
        """Not so in a process that was forked from the one that made it, and shares its sockets:
        what one of the two took of them, the other would miss."""
        return os.getpid() == self._pid

    def close(self, failure: str = "") -> None:
        """End every keeper and stage; `failure`: why the run has ended before it was done. Safe to
        call twice, and from a half-made fleet. In a forked process it leaves them alone."""
        if not self.is_own:
            return
        keepers = self._members.keepers
        told = {boot_id()}  # here, the driver itself says it
        for rank, keeper in keepers.items():
            machine = self.keepers[rank].boot_id
            why = "" if machine in told else failure
            told.add(machine)
            keeper.send(control.encode(control.Stop(bool(failure), why), self.epoch))
        self._spawned.end()
        deadline = time.monotonic() + _STOP_S
        for keeper in keepers.values():  # of another launcher: it hangs up when it is done
            keeper.close(wait_s=max(deadline - time.monotonic(), 1e-3))
        keepers.clear()
        self._port.close()
