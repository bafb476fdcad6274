"""Which ranks compute which stage, and whom each of them sends to."""

from dataclasses import replace

import pytest

from pipeserve.core.cost.partition import split_layers
from pipeserve.core.topology import Topology

TWO_A_STAGE = Topology(((0, 1), (4, 2), (3, 5)))


def test_one_rank_a_stage_is_the_stage():
    topology = Topology.of(split_layers(9, 3))
    assert topology.num_stages == topology.num_ranks == 3
    for number in range(3):
        assert topology.stage_of(number) == topology.speaker(number) == number
        assert topology.speaks(number)
        assert topology.name(number) == f"stage {number}"
    assert [topology.next_of(rank) for rank in range(3)] == [1, 2, None]
    assert [topology.other_end_of(rank) for rank in range(3)] == [2, None, 0]
    assert str(topology) == "3 stages"


def test_shards_send_to_their_own_shard_of_the_next_stage():
    topology = TWO_A_STAGE
    assert (topology.num_stages, topology.num_ranks) == (3, 6)
    assert [topology.stage_of(rank) for rank in range(6)] == [0, 0, 1, 2, 1, 2]
    assert [topology.shard_of(rank) for rank in range(6)] == [0, 1, 1, 0, 0, 1]
    assert topology.peers_of(2) == topology.peers_of(4) == (4, 2)
    assert [topology.next_of(rank) for rank in range(6)] == [4, 2, 5, None, 3, None]
    assert [topology.other_end_of(rank) for rank in range(6)] == [3, 5, None, 0, None, 1]


def test_one_rank_speaks_for_a_stage():
    topology = TWO_A_STAGE
    assert [topology.speaker(stage) for stage in range(3)] == [0, 4, 3]
    assert [rank for rank in range(6) if topology.speaks(rank)] == [0, 3, 4]
    assert topology.name(5) == "rank 5 of stage 2"
    assert str(topology) == "3 stages of 2 ranks each"


def test_a_stage_alone_sends_to_nobody():
    topology = Topology(((0, 1),))
    assert topology.next_of(1) is topology.other_end_of(1) is None


def test_it_is_as_the_plan_has_it():
    plan = split_layers(4, 2)
    first, last = plan.stages
    plan = replace(plan, stages=(replace(first, ranks=(2, 0)), replace(last, ranks=(1, 3))))
    assert Topology.of(plan) == Topology(((2, 0), (1, 3)))


@pytest.mark.parametrize("ranks", [(), ((0,), (2,)), ((0,), (0,)), ((0, 1), (2,)), ((0,), ())])
def test_a_rank_has_one_place_and_stages_are_alike(ranks):
    with pytest.raises(ValueError, match="ranks"):
        Topology(ranks)


@pytest.mark.parametrize("rank", [-1, 6])
def test_a_rank_that_is_not_there(rank):
    with pytest.raises(ValueError, match=f"no rank {rank}"):
        TWO_A_STAGE.stage_of(rank)
