"""Who of a fleet is still there: heartbeats of keepers, connections that end, dead processes."""

import signal
from collections.abc import Mapping
from typing import NamedTuple

from pipeserve.core.topology import Topology
from pipeserve.driver.events import Gone, Lost
from pipeserve.driver.spawned_keepers import SpawnedKeepers
from pipeserve.machine import boot_id
from pipeserve.wire import control
from pipeserve.wire.connection import Connection

LAST_WORD_S = 2.0
"""How long one that hung up may leave it to others to say why."""
_MISSED_HEARTBEATS = 5
"""After which a keeper, and its machine, is lost."""
_SILENT_S = 1.0
"""Without an answer, after which another keeper of the same rank may take its place."""
_CLOCK_PING_S = 0.5
"""Between two looks at the clock of another machine."""


class _Exit(NamedTuple):
    """A stage's process has ended, and its last word may be on its way."""

    exited: control.StageExited
    at_s: float


class FleetWatch:
    """Of all keepers and stages of one pipeline. Reads no clock."""

    def __init__(
        self,
        topology: Topology,
        heartbeat_s: float,
        keepers: Mapping[int, control.KeeperHello],
        keeper_of: Mapping[int, Connection],
        stages: Mapping[int, Connection],
        spawned: SpawnedKeepers,
    ) -> None:
        """The mappings, by rank, are the fleet's own: those who are there now."""
        self._topology = topology
        self._heartbeat_s = heartbeat_s
        self._keepers, self._keeper_of, self._stages = keepers, keeper_of, stages
        self._spawned = spawned
        self._boot_id = boot_id()
        self.asked_all_s = float("-inf")
        self._asked_s: dict[int, float] = {}
        """When a keeper got the first heartbeat that it has not answered."""
        self._hung_up_s: dict[Connection, float] = {}
        """When a keeper or a stage was found to have ended its connection."""
        self._exits: dict[int, _Exit] = {}

    @property
    def is_waiting(self) -> bool:
        """For the last word of one that has ended: it is to be looked at soon again."""
        return bool(self._exits or self._hung_up_s)

    def start_again(self) -> None:
        """All stages are new."""
        self._exits.clear()
        self._hung_up_s.clear()

    def has_exited(self, rank: int) -> bool:
        """Its stage's process, as its keeper says."""
        return rank in self._exits

    def is_remote(self, rank: int) -> bool:
        """Its machine has another clock."""
        return self._keepers[rank].boot_id != self._boot_id

    def is_silent(self, rank: int, now: float) -> bool:
        """Its keeper should have answered a heartbeat by now, which takes it no time."""
        return now - self._asked_s.get(rank, now) > _SILENT_S

    def asked(self, rank: int, now: float) -> None:
        """A keeper for a sign of life, out of turn."""
        self._asked_s.setdefault(rank, now)

    # ---- what comes -----------------------------------------------------------------------------

    def answered(self, rank: int) -> None:
        """A heartbeat."""
        self._asked_s.pop(rank, None)

    def exited(self, rank: int, exited: control.StageExited, now: float) -> None:
        """Its keeper says so."""
        self._exits.setdefault(rank, _Exit(exited, now))

    # ---- now and then ---------------------------------------------------------------------------

    def to_ask(self, now: float) -> list[int]:
        """Whose keeper is to give a sign of life now; those of other machines say what their clock
        is, too, and are asked more often."""
        period_s = self._heartbeat_s
        if any(map(self.is_remote, self._keepers)):
            period_s = min(period_s, _CLOCK_PING_S)
        if now < self.asked_all_s + period_s:
            return []
        self.asked_all_s = now
        for rank in self._keeper_of:
            self._asked_s.setdefault(rank, now)
        return list(self._keeper_of)

    def look(self, now: float) -> list[tuple[int, Lost | Gone]]:
        """Whose stage or keeper is not there any more."""
        found: list[tuple[int, Lost | Gone]] = []
        for rank, why in self._gone(now):
            self._asked_s.pop(rank, None)
            self._exits.pop(rank, None)
            self._hung_up_s.pop(self._keeper_of.get(rank), None)
            found += [(rank, Lost(why)), (rank, Gone())]
        gone = {rank for rank, _ in found}
        found += [(rank, Lost(why)) for rank, why in self._lost(now) if rank not in gone]
        return found

    def _gone(self, now: float) -> list[tuple[int, str]]:
        found = {}
        for rank, connection in self._keeper_of.items():
            if self._has_hung_up(connection, now):
                found[rank] = (
                    f"the keeper of {self._topology.name(rank)} on {self._keepers[rank].host} hung "
                    "up; was it ended by hand, or by its launcher?"
                )
        silence_s = _MISSED_HEARTBEATS * self._heartbeat_s
        for rank, asked_s in self._asked_s.items():
            if now - asked_s > silence_s:
                found[rank] = (
                    f"nothing heard from the keeper of {self._topology.name(rank)} on "
                    f"{self._keepers[rank].host} for {silence_s:g} s; is it stopped, or its "
                    "machine down?"
                )
        for rank, process in self._spawned.ended():
            found[rank] = (
                f"the keeper of {self._topology.name(rank)} (pid {process.pid}) ended with "
                f"{process.returncode}; was it killed by hand?"
            )
        return list(found.items())

    def _lost(self, now: float) -> list[tuple[int, str]]:
        found = []
        for rank, (exited, at_s) in list(self._exits.items()):
            stage = self._stages.get(rank)
            has_said_all = exited.exit_code <= 0 if stage is None else stage.has_ended
            if has_said_all or now - at_s > LAST_WORD_S:
                del self._exits[rank]
                found.append(
                    (
                        rank,
                        f"{self._topology.name(rank)} (pid {exited.pid} on "
                        f"{self._keepers[rank].host}) died: {_describe_exit(exited.exit_code)}",
                    )
                )
        for rank, connection in self._stages.items():
            if self._has_hung_up(connection, now):  # why, its keeper says within moments
                found.append(
                    (
                        rank,
                        f"{self._topology.name(rank)} hung up, and its keeper on "
                        f"{self._keepers[rank].host} does not say why; is the network between the "
                        "two up?",
                    )
                )
        return found

    def _has_hung_up(self, connection: Connection, now: float) -> bool:
        """And nobody has said more of it for a while."""
        if not connection.has_ended:
            return False
        return now - self._hung_up_s.setdefault(connection, now) > LAST_WORD_S


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
