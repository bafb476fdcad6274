"""How often a rank may be started again, and who is to blame."""

import pytest

from pipeserve.configs import RunConfig
from pipeserve.core.nouns import Output
from pipeserve.core.topology import Topology
from pipeserve.driver.events import Lost, Received
from pipeserve.driver.losses import Losses
from pipeserve.driver.recovery import Restarts, Suspects

LOST = Lost("stage 1 died")


def test_a_rank_that_keeps_dying_ends_the_run_with_its_reason():
    restarts = Restarts(Topology(((0,), (1,))), most=3, window_s=100.0)
    assert not any(restarts.end_by(1, LOST, now) for now in (0.0, 10.0, 20.0))
    assert restarts.end_by(0, LOST, 30.0) is None  # another rank has its own
    ended = restarts.end_by(1, LOST, 30.0)
    assert ended.why.startswith("stage 1 died (stage 1 was started again 3 times within 100 s")
    assert restarts.end_by(1, LOST, 101.0) is None  # the first is long ago


def test_what_no_restart_helps_ends_it_at_once():
    restarts = Restarts(Topology(((0,),)), most=3, window_s=100.0)
    for lost in (Lost("bad input", is_user_error=True), Lost("nobody joins", is_final=True)):
        assert restarts.end_by(0, lost, 0.0) is lost


class Engine:
    """That knows who is in each microbatch."""

    def __init__(self, aboard):
        self.aboard, self.alone = aboard, None

    def requests_of(self, index):
        return tuple(self.aboard[index])

    def run_alone(self, request_id):
        self.alone = request_id

    def finish(self, request_id, reason, now):
        return Output(request_id, None, reason)

    def lost(self, now): ...


def lose(suspects, index):
    blamed = suspects.lost_at(index, "stage 1 died", 0.0)
    suspects.isolate()
    return blamed


def test_the_request_that_is_there_each_time_ends_alone():
    engine = Engine([[1, 2, 3], [2, 3], [3], [4]])
    suspects = Suspects(engine)
    assert lose(suspects, 0) is None and engine.alone is None
    assert lose(suspects, 1) is None and engine.alone == 2
    suspects.came([Output(2, 7)] * 3)
    assert engine.alone == 2
    suspects.came([Output(2, 7)])  # enough: it was not that one
    assert engine.alone == 3
    blamed = lose(suspects, 2)
    assert (blamed.request_id, blamed.finish_reason) == (3, "error")
    assert blamed.error.startswith("a stage was lost at this request 3 times")
    assert engine.alone is None
    assert lose(suspects, 3) is None


def test_a_loss_at_what_was_planned_before_blames_nobody():
    engine = Engine([[1, 2]])
    suspects = Suspects(engine)
    for _ in range(3):
        assert lose(suspects, 0) is None
    assert engine.alone == 1
    suspects.came([Output(1, None, "stop")])
    assert engine.alone == 2


def test_who_goes_on_for_a_while_between_two_losses_is_no_suspect():
    engine = Engine([[1, 2]])
    suspects = Suspects(engine)
    for _ in range(5):
        assert lose(suspects, 0) is None
        suspects.came([Output(request, 7) for request in (1, 2)] * 4)
    assert engine.alone is None


class Watch:
    """Of stages that are always at microbatch 0."""

    def at_all(self, stage):
        return [0]

    def whereabouts(self, stage):
        return "it was at 0"

    def start_again(self): ...


class Journal:
    def lost(self, stage, now, why): ...

    def finished(self, output, now): ...


@pytest.mark.parametrize("by_work", [True, False])
def test_nobody_is_to_blame_for_a_machine_that_is_gone(by_work):
    """Though the same request is there each time."""
    engine, config = Engine([[1]]), RunConfig(model="any", max_restarts=99)
    losses = Losses(Topology(((0,), (1,))), config, engine, Watch(), Journal())
    received = Received(Lost("stage 1 was lost", by_work=by_work), 1, 0.0, 1)
    blamed = [losses.take(received) for _ in range(3)]
    assert blamed[:2] == [None, None]
    assert (blamed[2] is not None) == by_work
    assert losses.counts == [0, 3] and losses.trouble == "stage 1 was lost; it was at 0"
