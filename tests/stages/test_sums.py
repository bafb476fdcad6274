"""A rank's time in all-reduces, told from what it waits for the others there."""

from types import SimpleNamespace

import pytest
import torch

from pipeserve.stages.tensor_parallel import sums
from pipeserve.stages.tensor_parallel.sums import Sums

SUM_S, LATE_S = 0.001, 0.1
SUMS = 2


class Rank:
    """One of two."""

    def __init__(self):
        self.sums, self.took_s, self.said = Sums(None), [], []

    def adds_up(self, clock, begun_s, ended_s):
        clock.now_s = begun_s
        self.sums.begin()
        clock.now_s = ended_s
        self.sums.end()
        self.took_s.append(ended_s - begun_s)


@pytest.fixture
def of_two_ranks(monkeypatch):
    clock, ranks = SimpleNamespace(now_s=0.0), (Rank(), Rank())
    monkeypatch.setattr(sums, "time", SimpleNamespace(monotonic=lambda: clock.now_s))

    def least(took_S, kind, group):
        took_S[:] = torch.tensor([rank.took_s for rank in ranks]).amin(0)

    monkeypatch.setattr(sums.dist, "all_reduce", least)
    monkeypatch.setattr(sums.dist, "get_backend", lambda group: "gloo")

    def of_two_ranks(late):
        """What each says of four microbatches of two sums, each of a size that was there before but
        the first; `late(rank, microbatch)`: seconds before each of its sums."""
        for microbatch in range(4):
            for _ in range(SUMS):
                begun_s = [clock.now_s + late(rank, microbatch) for rank in range(2)]
                for rank, at_s in zip(ranks, begun_s, strict=True):
                    rank.adds_up(clock, at_s, max(begun_s) + SUM_S)
            for rank in ranks:
                rank.said.append(rank.sums.of_microbatch(100 if microbatch < 3 else 1))
            for rank in ranks:
                rank.took_s.clear()
        return [rank.said for rank in ranks]

    return of_two_ranks


def test_who_waits_for_a_slower_rank_is_told_from_a_slow_sum(of_two_ranks):
    """By the other's time, so also where it is as late in each of them."""
    first, second = of_two_ranks(lambda rank, microbatch: LATE_S * rank)
    assert first == [pytest.approx((SUMS * SUM_S, SUMS * LATE_S))] * 4
    assert second == [pytest.approx((SUMS * SUM_S, 0.0))] * 4


def test_a_rank_that_is_late_once_is_waited_for_once(of_two_ranks):
    """Between two comparisons, too: by what such a microbatch took before."""
    first, _ = of_two_ranks(lambda rank, microbatch: LATE_S * rank * (microbatch == 1))
    waited_s = [waited_s for _, waited_s in first]
    assert waited_s == pytest.approx([0.0, SUMS * LATE_S, 0.0, 0.0])


def test_nothing_is_exchanged_where_nothing_was_added_up():
    assert Sums(None).of_microbatch(5) == (0.0, 0.0)
