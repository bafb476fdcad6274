"""A stage that keeps its process through a loss has an answer to give, and nothing to load: the
driver waits for it as long as it, or a rank that shares it, does anything at all."""

import pytest

from pipeserve.configs import RunConfig
from pipeserve.core.topology import Topology
from pipeserve.driver.starting import StartProgress
from pipeserve.driver.stillness import LONGEST_S
from pipeserve.wire import control

TWO_A_STAGE = Topology(((0, 1), (2, 3)))
STAYING = (2, 3)
BEGAN_S = 100.0
ASKED_EVERY_S = 0.5
SIZE = control.StageSized(1, 1, ())


class Start:
    """Of a fresh epoch, after the first stage was lost: its ranks are started, and those of the
    other stay. Keepers are asked for signs by a clock that the test moves on."""

    def __init__(self):
        keepers = {
            rank: control.KeeperHello(rank, 4, f"host{rank}", "", 0, "") for rank in range(4)
        }
        config = RunConfig(model="any", load_timeout=60.0)
        self.progress = StartProgress(TWO_A_STAGE, keepers, config, BEGAN_S, STAYING)
        self.now_s, self.ran_s, self.num_moved = BEGAN_S, [0.0] * 4, [0] * 4

    def passes(self, seconds, computing=(), moving=(), state="S"):
        """And who is late then."""
        late, until_s = None, self.now_s + seconds
        while late is None and self.now_s < until_s:
            self.now_s += ASKED_EVERY_S
            for rank in range(4):
                self.ran_s[rank] += ASKED_EVERY_S * (rank in computing)
                self.num_moved[rank] += rank in moving
                signs = control.HeartbeatAnswer(
                    0.0, 0.0, self.num_moved[rank], self.ran_s[rank], 0.0, state
                )
                self.progress.signs(rank, signs, self.now_s)
            late = self.progress.late(self.now_s)
        return late


@pytest.fixture
def start():
    return Start()


def test_one_that_does_nothing_is_named_with_where_it_is_and_who_else_has_not_come(start):
    start.progress.sized(3, SIZE, start.now_s)
    rank, lost = start.passes(2 * LONGEST_S)
    assert (rank, lost.is_final, lost.is_user_error) == (2, False, False)
    assert start.now_s - BEGAN_S == pytest.approx(LONGEST_S, abs=3 * ASKED_EVERY_S)
    assert lost.why == (
        "rank 2 of stage 1 on host2 stands still, not yet out of the epoch before: no rank of its "
        "stage has computed or moved a byte for 10 s; nor has rank 0 of stage 0, rank 1 of stage 0 "
        "come so far"
    )


@pytest.mark.parametrize("does", ["computing", "moving"])
def test_one_that_waits_for_another_of_its_stage_is_given_time(start, does):
    """Which is at the microbatch before."""
    assert start.passes(3 * LONGEST_S, **{does: [3]}) is None
    assert start.passes(2 * LONGEST_S)[0] in STAYING


def test_one_that_stands_in_line_for_a_core_is_given_time(start):
    assert start.passes(3 * LONGEST_S, state="R") is None


def test_who_starts_may_do_nothing_for_as_long_as_its_disk(start):
    """And who stays, while it waits for them."""
    for rank in STAYING:
        start.progress.sized(rank, SIZE, start.now_s)
    assert start.passes(55.0) is None
    rank, lost = start.passes(10.0)
    assert rank == 0 and "has stopped loading, before its first weight" in lost.why


def test_those_who_do_not_meet_are_named(start):
    for rank in range(4):
        start.progress.sized(rank, SIZE, start.now_s)
    assert start.passes(LONGEST_S) is None
    rank, lost = start.passes(LONGEST_S, computing=[0, 1])
    assert rank in STAYING and "before it has met the ranks that share its stage" in lost.why


def test_time_in_which_the_driver_did_not_look_does_not_count(start):
    """It was stopped, or busy: no keeper was asked, and each of them says later that it worked."""
    start.passes(1.0)
    start.now_s += 3 * LONGEST_S
    assert start.progress.late(start.now_s) is None
    start.ran_s = [3 * LONGEST_S] * 4
    assert start.passes(LONGEST_S / 2) is None
