"""Stages that keep process and weights through a loss, and do not come into the fresh epoch.

Such a one has nothing to load: it ends the microbatch that it is at, meets the ranks that share its
stage, and says so. While one of these does anything, the others may wait for it, and all are given
time. Where none does, they wait for what will not come.
"""

from collections.abc import Iterable

from pipeserve.core.topology import Topology
from pipeserve.driver.at_work import AtWork
from pipeserve.wire.control import HeartbeatAnswer

LONGEST_S = 10.0
"""Of doing nothing. A rank that others have left says so after 3."""


class Stillness:
    """Of the ranks that stay, from when they are told of a fresh epoch. Goes by what their keepers
    say alone: time in which the driver did not look does not count. Reads no clock."""

    def __init__(self, staying: Iterable[int], topology: Topology) -> None:
        self._topology = topology
        self._at_work = {rank: AtWork() for rank in staying}
        self._heard_s: dict[int, float] = {}
        self._did_s: dict[int, float] = {}
        """When it, or one that shares its stage, did something last."""

    def __contains__(self, rank: int) -> bool:
        """Whether it is one of those who stay."""
        return rank in self._at_work

    def begin(self) -> None:
        """They have waited for those who start until now, and go on."""
        self._did_s.clear()

    def take(self, rank: int, signs: HeartbeatAnswer, at_s: float) -> None:
        """What a keeper says of its stage's process."""
        if rank not in self:
            return
        self._at_work[rank].take(signs, at_s)
        self._heard_s[rank] = at_s
        if self._at_work[rank].is_working or rank not in self._did_s:
            for peer in self._topology.peers_of(rank):
                self._did_s[peer] = at_s

    def longest(self, ranks: Iterable[int]) -> int | None:
        """One of `ranks` that has been still for too long."""
        still = [rank for rank in ranks if self.lasts_s(rank) > LONGEST_S]
        return max(still, key=self.lasts_s, default=None)

    def lasts_s(self, rank: int) -> float:
        """How long it has been, as far as is known."""
        if rank not in self._did_s or rank not in self._heard_s:
            return 0.0
        return self._heard_s[rank] - self._did_s[rank]
