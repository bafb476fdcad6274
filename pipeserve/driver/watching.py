"""Who of a fleet is still there: heartbeats of keepers, connections that end, dead processes."""

import signal
from math import inf
from typing import NamedTuple

from pipeserve.driver.events import Gone, Lost
from pipeserve.driver.members import Members
from pipeserve.driver.silence import Silence
from pipeserve.driver.spawned_keepers import SpawnedKeepers
from pipeserve.machine import boot_id
from pipeserve.wire import control
from pipeserve.wire.connection import Connection

LAST_WORD_S = 2.0
"""How long one that hung up may leave it to others to say why."""
_SILENT_S = 1.0
"""Without an answer, after which another keeper of the same rank may take its place."""
_CLOCK_PING_S = 0.5
"""Between two looks at the clock of another machine."""
_STOPPED = "T"
"""The state of a process that a signal has stopped."""


class _Exit(NamedTuple):
    """A stage's process has ended, and its last word may be on its way."""

    exited: control.StageExited
    at_s: float


class FleetWatch:
    """Of all keepers and stages of one pipeline. Reads no clock."""

    def __init__(self, heartbeat_s: float, members: Members, spawned: SpawnedKeepers) -> None:
        """A keeper that gives no sign of life for `heartbeat_s` is lost."""
        self._members = members
        self._spawned = spawned
        self._boot_id = boot_id()
        self._keepers = Silence(heartbeat_s)
        self._stopped = Silence(heartbeat_s)
        """Stages, since their keepers say that they are."""
        self._hung_up_s: dict[Connection, float] = {}
        """When a keeper or a stage was found to have ended its connection."""
        self._exits: dict[int, _Exit] = {}

    @property
    def look_s(self) -> float:
        """Between two looks, at most."""
        return self._keepers.look_s

    @property
    def is_waiting(self) -> bool:
        """For the last word of one that has ended: it is to be looked at soon again."""
        return bool(self._exits or self._hung_up_s)

    def start_again(self) -> None:
        """A fresh epoch."""
        self._exits.clear()
        self._hung_up_s.clear()
        self._stopped.clear()

    def has_exited(self, rank: int) -> bool:
        """Its stage's process, as its keeper says."""
        return rank in self._exits

    def is_remote(self, rank: int) -> bool:
        """Its machine has another clock."""
        return self._members.machine_of(rank) != self._boot_id

    def is_silent(self, rank: int, now: float) -> bool:
        """Its keeper should have answered a heartbeat by now, which takes it no time."""
        return self._keepers.lasts_s(rank, now) > _SILENT_S

    def asked(self, rank: int, now: float) -> None:
        """A keeper for a sign of life, out of turn."""
        self._keepers.asked([rank], now)

    # ---- what comes -----------------------------------------------------------------------------

    def answered(self, rank: int) -> None:
        """A heartbeat."""
        self._keepers.broken(rank)

    def is_in_state(self, rank: int, state: str, now: float) -> None:
        """A stage's process, as its keeper says."""
        if state == _STOPPED:
            self._stopped.asked([rank], now)
        else:
            self._stopped.broken(rank)

    def exited(self, rank: int, exited: control.StageExited, now: float) -> None:
        """Its keeper says so."""
        self._exits.setdefault(rank, _Exit(exited, now))

    # ---- now and then ---------------------------------------------------------------------------

    def to_ask(self, now: float) -> list[int]:
        """Whose keeper is to give a sign of life now; those of other machines say what their clock
        is, too, and are asked as often as that takes."""
        most_s = _CLOCK_PING_S if any(map(self.is_remote, self._members.hellos)) else inf
        if not self._keepers.is_time_to_ask(now, most_s):
            return []
        ranks = list(self._members.keepers)
        self._keepers.asked(ranks, now)
        return ranks

    def look(self, now: float) -> list[tuple[int, Lost | Gone]]:
        """Whose stage or keeper is not there any more."""
        found: list[tuple[int, Lost | Gone]] = []
        for rank, why in self._gone(now):
            self._keepers.broken(rank)
            self._exits.pop(rank, None)
            self._hung_up_s.pop(self._members.keepers.get(rank), None)
            found += [(rank, Lost(why, by_work=False)), (rank, Gone())]
        gone = {rank for rank, _ in found}
        found += [(rank, lost) for rank, lost in self._lost(now) if rank not in gone]
        return found

    def _gone(self, now: float) -> list[tuple[int, str]]:
        found = {}
        for rank, connection in self._members.keepers.items():
            if self._has_hung_up(connection, now):
                found[rank] = (
                    f"the keeper of {self._members.place_of(rank)} hung up; was it ended by hand, "
                    "or by its launcher?"
                )
        for rank, silent_s in self._keepers.too_long(now):
            found[rank] = (
                f"nothing heard from the keeper of {self._members.place_of(rank)} for "
                f"{silent_s:.1f} s; is it stopped, or its machine down or cut off?"
            )
        for rank, process in self._spawned.ended():
            found[rank] = (
                f"the keeper of {self._members.topology.name(rank)} (pid {process.pid}) ended with "
                f"{process.returncode}; was it killed by hand?"
            )
        return list(found.items())

    def _lost(self, now: float) -> list[tuple[int, Lost]]:
        found, members = [], self._members
        for rank, (exited, at_s) in list(self._exits.items()):
            stage = members.stages.get(rank)
            has_said_all = exited.exit_code <= 0 if stage is None else stage.has_ended
            if has_said_all or now - at_s > LAST_WORD_S:
                del self._exits[rank]
                who = f"{members.topology.name(rank)} (pid {exited.pid} on "
                who += f"{members.hellos[rank].host})"
                found.append((rank, Lost(f"{who} died: {_describe_exit(exited.exit_code)}")))
        for rank, connection in members.stages.items():
            if self._has_hung_up(connection, now):  # why, its keeper says within moments
                why = (
                    f"{members.topology.name(rank)} hung up, and its keeper on "
                    f"{members.hellos[rank].host} does not say why; is the network between the two "
                    "up?"
                )
                found.append((rank, Lost(why, by_work=False)))
        for rank, _ in self._stopped.too_long(now):
            why = f"{members.place_of(rank)} is stopped, by a signal (SIGSTOP)"
            found.append((rank, Lost(why, by_work=False)))
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
