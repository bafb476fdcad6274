"""Who is there: the keepers and stages of a fleet, each by its rank and with its connection."""

from pipeserve.core.topology import Topology
from pipeserve.wire import control
from pipeserve.wire.connection import Connection
from pipeserve.wire.sources import Source


class Members:
    """Of one pipeline, as their connections say. Decides nothing."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.hellos: dict[int, control.KeeperHello] = {}
        """Of the ranks whose keepers have joined."""
        self._last_hellos: dict[int, control.KeeperHello] = {}
        """Likewise, and of those that are gone, which may come again."""
        self.keepers: dict[int, Connection] = {}
        self.stages: dict[int, Connection] = {}
        self.rank_of: dict[Source, int] = {}
        """Of keepers and stages that have said who they are."""

    def place_of(self, rank: int) -> str:
        """Who and where, for people."""
        name = self.topology.name(rank)
        return f"{name} on {self.hellos[rank].host}" if rank in self.hellos else name

    def machine_of(self, rank: int) -> str:
        """As its keeper says (`KeeperHello.boot_id`), or said: what it told before it was gone may
        be taken up behind that."""
        return self.hellos.get(rank, self._last_hellos[rank]).boot_id

    def core_share(self, rank: int) -> tuple[int, int]:
        """Its number among the ranks that may use CPUs that it may use, and how many they are. A
        launcher may have bound each to some of its own, as mpirun and srun do."""
        own = self._last_hellos[rank]
        sharing = [
            other
            for other, hello in sorted(self._last_hellos.items())
            if other == rank
            or (hello.boot_id == own.boot_id and not set(own.cpus).isdisjoint(hello.cpus))
        ]
        return sharing.index(rank), len(sharing)

    # ---- they come and go -----------------------------------------------------------------------

    def keeper_joined(self, hello: control.KeeperHello, source: Connection) -> None:
        source.carries = "words of a keeper"
        source.can_wait()
        self.hellos[hello.rank] = self._last_hellos[hello.rank] = hello
        self.keepers[hello.rank] = source
        self.rank_of[source] = hello.rank

    def stage_came(self, rank: int, source: Connection, samples: bool) -> None:
        source.carries = "words of a stage"
        if not samples:
            source.can_wait()
        self.stages[rank] = source
        self.rank_of[source] = rank

    def stage_is_gone(self, rank: int) -> None:
        if rank in self.stages:
            self._let_go(self.stages.pop(rank))

    def keeper_is_gone(self, rank: int) -> bool:
        """And its stage with it. False: it was not there."""
        if self.hellos.pop(rank, None) is None:
            return False
        self._let_go(self.keepers.pop(rank))
        self.stage_is_gone(rank)
        return True

    def _let_go(self, connection: Connection) -> None:
        connection.close()
        del self.rank_of[connection]

    # ---- what they are told ---------------------------------------------------------------------

    def tell_keeper(self, rank: int, message: control.ToKeeper, epoch: int) -> None:
        self.keepers[rank].send(control.encode(message, epoch))

    def tell_stages(self, message: control.ToStage, epoch: int) -> None:
        """The same bytes to every rank's, first to the first, which may be waiting for them."""
        encoded = control.encode(message, epoch)
        for rank in range(self.topology.num_ranks):
            if rank in self.stages:
                self.stages[rank].send(encoded)
