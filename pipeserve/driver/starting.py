"""One start of all stages: from the jobs that their keepers get to stages that have reached their
neighbours. Sends nothing, and reads no clock.
"""

import os
from collections.abc import Iterable, Mapping, Sequence

from pipeserve.configs import RunConfig
from pipeserve.core.topology import Topology
from pipeserve.driver.events import Lost
from pipeserve.driver.loading import LoadWatch
from pipeserve.driver.setup import Setup
from pipeserve.driver.stillness import Stillness
from pipeserve.wire import control
from pipeserve.wire.stage_job import StartStage

ANSWER_S = 30.0
"""For what a stage does at once: connect to its neighbours, say how much memory it has used."""


def jobs_of(setup: Setup, topology: Topology, local_name: str) -> list[StartStage]:
    """What the keeper of each rank is to start. `local_name`: of where the driver listens."""
    jobs = []
    for rank in range(topology.num_ranks):
        stage = topology.stage_of(rank)
        jobs.append(
            StartStage(
                stage=stage,
                num_stages=topology.num_stages,
                module=setup.module,
                work=setup.works[stage],
                control=f"/{local_name}",
                host="",
                traceback=os.environ.get("PIPESERVE_TRACEBACK", "") not in ("", "0"),
                shares_head=setup.plan.shares_head,
                shard=topology.shard_of(rank),
                num_shards=topology.width,
            )
        )
    return jobs


class StartProgress:
    """How far it is."""

    def __init__(
        self,
        topology: Topology,
        keepers: Mapping[int, control.KeeperHello],
        config: RunConfig,
        now: float,
        staying: Iterable[int] = (),
    ) -> None:
        """`staying`: ranks whose stages keep their process, and the weights that they have."""
        self._topology = topology
        self._keepers = keepers
        """Of those that are there now."""
        self._load_timeout_s, self._join_timeout_s = config.load_timeout, config.join_timeout
        self._began_s = now
        self.loading = LoadWatch(topology.num_ranks, now)
        self._stillness = Stillness(staying, topology)
        self._sized: dict[int, control.StageSized] = {}
        self._loaded: dict[int, control.StageReady] = {}
        self._loaded_s = now
        """When the last of them was."""
        self._connected: set[int] = set()

    @property
    def sizes(self) -> tuple[control.StageSized, ...]:
        """Of each rank, once all have told."""
        return tuple(self._sized[rank] for rank in range(self._topology.num_ranks))

    @property
    def stages(self) -> tuple[control.StageReady, ...]:
        """Of each rank, once all have loaded."""
        return tuple(self._loaded[rank] for rank in range(self._topology.num_ranks))

    def signs(self, rank: int, signs: control.HeartbeatAnswer, now: float) -> None:
        """What a keeper says of its stage's process."""
        self.loading.moved(rank, signs.num_moved, now)
        self._stillness.take(rank, signs, now)

    def sized(self, rank: int, size: control.StageSized, now: float) -> bool:
        """Whether all stages have told what they take, with this one. Those that have, wait for the
        others; now they all begin to load."""
        self._sized[rank] = size
        are_all = len(self._sized) == self._topology.num_ranks
        if are_all:
            self.loading.begin(now)
            self._stillness.begin()
        return are_all

    def loaded(self, rank: int, stage: control.StageReady, now: float) -> bool:
        """Whether all stages have, with this one."""
        self._loaded[rank] = stage
        self._loaded_s = now
        return len(self._loaded) == self._topology.num_ranks

    def connected(self, rank: int) -> bool:
        """Whether all stages have reached their neighbours, with this one."""
        self._connected.add(rank)
        return len(self._connected) == self._topology.num_ranks

    def __str__(self) -> str:
        if len(self._loaded) == self._topology.num_ranks:
            return "connecting stages"
        return str(self.loading)

    def late(self, now: float) -> tuple[int, Lost] | None:
        """A rank that is not to be waited for any longer."""
        absent = [rank for rank in range(self._topology.num_ranks) if rank not in self._keepers]
        if absent and now - self._began_s > self._join_timeout_s:
            return absent[0], Lost(
                f"no keeper of {self._topology.name(absent[0])} has joined again within "
                f"{self._join_timeout_s:g} s; start it, or raise --join-timeout",
                is_final=True,
            )
        ranks = [rank for rank in range(self._topology.num_ranks) if rank in self._keepers]
        unsized = [rank for rank in ranks if rank not in self._sized]
        loading = unsized
        if not (unsized or absent):  # else those that are there wait for the others
            loading = [rank for rank in ranks if rank not in self._loaded]
        if loading:
            return self._still(loading) or self._stopped(loading, now)
        missing = [rank for rank in ranks if rank not in self._connected]
        if missing and not absent and now - self._loaded_s > ANSWER_S:
            return missing[0], no_answer(
                missing, "reached its neighbours", self._topology, self._keepers
            )
        return None

    def _still(self, loading: Sequence[int]) -> tuple[int, Lost] | None:
        rank = self._stillness.longest(loading)
        if rank is None:
            return None
        others = [other for other in loading if other != rank]
        return rank, Lost(
            f"{self._topology.name(rank)} on {self._keepers[rank].host} stands still, "
            f"{self._how_far(rank)}: no rank of its stage has computed or moved a byte for "
            f"{self._stillness.lasts_s(rank):.0f} s"
            + (f"; nor has {_names(others, self._topology)} come so far" if others else "")
        )

    def _stopped(self, loading: Sequence[int], now: float) -> tuple[int, Lost] | None:
        rank = self.loading.stopped(loading, self._load_timeout_s, now)
        if rank is None:
            return None
        return rank, Lost(
            f"{self._topology.name(rank)} on {self._keepers[rank].host} has stopped loading, "
            f"{self._how_far(rank)}: it has moved no byte for {self._load_timeout_s:g} s; "
            "look at its disk, or raise --load-timeout"
        )

    def _how_far(self, rank: int) -> str:
        """In words. A stage that stays has nothing to load."""
        if rank not in self._stillness:
            return self.loading.how_far(rank)
        if rank not in self._sized:
            return "not yet out of the epoch before"
        return "before it has met the ranks that share its stage"


def links_of(
    rank: int,
    topology: Topology,
    stages: Sequence[control.StageReady],
    machines: Sequence[str],
) -> control.Connect:
    """Where a rank's stage is to send, and what; `stages`, of each rank, say where they listen, and
    `machines` where they are."""
    following, other_end = topology.next_of(rank), topology.other_end_of(rank)
    stage = topology.stage_of(rank)
    return control.Connect(
        next_stage="" if following is None else stages[following].activations_at,
        other_end="" if other_end is None else stages[other_end].tokens_at,
        rows="" if other_end is None or rank < other_end else stages[other_end].rows_at,
        sends_part=_gets_parts(stage + 1, topology, machines),
        gets_part=_gets_parts(stage, topology, machines),
    )


def _gets_parts(stage: int, topology: Topology, machines: Sequence[str]) -> bool:
    """Whether the stage before sends each of its ranks a part of the activations, which they put
    together: that is less to carry from machine to machine. On one machine it is not less, and one
    wait more."""
    if topology.width == 1 or not 0 < stage < topology.num_stages:
        return False
    before, here = ({machines[rank] for rank in topology.ranks[at]} for at in (stage - 1, stage))
    return len(here) == 1 and not here & before


def no_answer(
    ranks: Sequence[int],
    what: str,
    topology: Topology,
    keepers: Mapping[int, control.KeeperHello],
    limit_s: float = ANSWER_S,
) -> Lost:
    """Of `ranks`, whose stages have not done `what` for so long."""
    hosts = ", ".join(sorted({keepers[rank].host for rank in ranks}))
    return Lost(
        f"{_names(ranks, topology)} (on {hosts}) has not {what} within {limit_s:g} s; is it "
        "stopped, or does a firewall stand between the machines?"
    )


def _names(ranks: Sequence[int], topology: Topology) -> str:
    first, *others = [topology.name(rank) for rank in ranks]
    return ", ".join([first, *(name.removeprefix("stage ") for name in others)])
