"""Since when the driver has only waited: of that depends whether a late result is its fault. And
what it and a stage say to each other, until one of them hangs up."""

import os
from types import SimpleNamespace

import pytest

from pipeserve.configs import RunConfig
from pipeserve.core.topology import Topology
from pipeserve.driver import fleet
from pipeserve.driver.events import Gone, Lost
from pipeserve.errors import ConfigError, StageError
from pipeserve.stage.vital_signs import VitalSigns
from pipeserve.wire import control
from pipeserve.wire.connecting import connect
from pipeserve.wire.sources import Sources
from pipeserve.wire.stage_job import StartStage
from pipeserve.wire.step_messages import Registration, Sampled, Step

from local_fleet import NoKeepers  # isort: skip

JOB = StartStage(0, 1, "", b"", "", "", traceback=False)


class OneStage:
    """A fleet whose first stage is here, and a clock that stands still."""

    def __init__(self, monkeypatch, num_stages=1):
        self.now_s = 100.0
        monkeypatch.setattr(fleet, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        topology = Topology(tuple((rank,) for rank in range(num_stages)))
        self.fleet = fleet.Fleet(topology, RunConfig(model="any"), NoKeepers())
        self.fleet.start([])
        self.sources = Sources(self.fleet.secret)
        self.stage = self.comes()
        self.says_something()
        while not self.fleet.receive(0.0):
            self.listens()

    def comes(self, rank=0, epoch=1, sources=None):
        """One more, which says that it is a stage."""
        address = f"{self.fleet.address}/{self.fleet.local_name}"
        stage = connect(address, sources or self.sources, "stage")
        stage.send(control.encode(control.StageHello(rank), epoch))
        return stage

    def keeper_joins(self):
        """That of its rank, on another machine."""
        address = f"{self.fleet.address}/{self.fleet.local_name}"
        self.keeper = connect(address, self.sources, "keeper")
        self.keeper.send(control.encode(control.KeeperHello(0, 1, "afar", "", 0, ""), 0))
        while 0 not in self.fleet.keepers:
            self.fleet.receive(0.0)
            self.listens()

    def listens(self):
        for source in self.sources.ready(0):
            source.receive()

    def says(self, message, epoch=1):
        self.stage.send(control.encode(message, epoch))

    def says_something(self):
        self.says(control.Memory(7))

    def hangs_up(self):
        self.stage.close()

    def passes(self, seconds):
        self.now_s += seconds

    def hears(self, num=1):
        """The messages that come next."""
        came = []
        while len(came) < num:
            came += self.fleet.receive(0.01)
            self.listens()
        return [received.message for received in came]

    def close(self):
        self.sources.close()
        self.fleet.close()


@pytest.fixture
def stage(monkeypatch):
    stage = OneStage(monkeypatch)
    yield stage
    stage.close()


def test_taking_up_a_message_at_once_does_not_end_the_waiting(stage):
    for _ in range(3):
        stage.passes(0.0005)
        stage.says_something()
        stage.fleet.receive(10.0)
    assert stage.fleet.waiting_s == 100.0


def test_who_did_something_else_meanwhile_waits_anew(stage):
    stage.passes(0.25)
    stage.fleet.receive(0.0)
    assert stage.fleet.waiting_s == 100.25


def test_who_sent_a_plan_waits_anew(stage):
    stage.passes(0.0005)
    stage.fleet.broadcast(control.ReportMemory())
    stage.fleet.receive(0.0)
    assert stage.fleet.waiting_s == 100.0005


def test_both_send_more_than_the_kernel_takes(stage):
    """And neither takes anything until it has sent all of its own."""
    tokens, large = os.urandom(16 << 20), list(range(1, 4_000_000))
    admitted = Registration(1, tokens, 1, [], {}, [], ())
    stage.fleet.broadcast(Step(0, (), [admitted], []))
    stage.fleet.broadcast(control.ReportMemory())
    stage.says(Sampled(0, large, b"", [], []))
    stage.says_something()
    here, there = [], []
    while len(here) < 2 or len(there) < 2:
        here += stage.fleet.receive(0.01)
        for source in stage.sources.ready(10):
            there += map(control.decode_for_stage, source.receive())
    assert [type(received.message) for received in here] == [Sampled, control.Memory]
    assert here[0].message.tokens == large
    assert there[0][1].admitted[0].token_ids == tokens
    assert there[1] == (1, control.ReportMemory())


@pytest.mark.parametrize(("rank", "epoch"), [(0, 1), (1, 1), (-1, 1), (0, 0), (0, 2)])
def test_a_stage_that_is_not_missing_is_turned_away(stage, capsys, rank, epoch):
    """And the one that is here goes on."""
    sources = Sources(stage.fleet.secret)
    second = stage.comes(rank, epoch, sources)
    while not second.has_ended:
        stage.fleet.receive(0.0)
        for source in sources.ready(1):
            source.receive()
    assert f"the stage of rank {rank} is not missing" in capsys.readouterr().err
    stage.says_something()
    assert stage.hears() == [control.Memory(7)]
    sources.close()


# ---- events -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_user_error", [False, True])
def test_the_last_word_of_a_stage_comes_behind_what_it_said_before(stage, is_user_error):
    stage.says(Sampled(0, [5], b"\x01", [], []))
    stage.says(control.StageFailed("no layer 7", is_user_error))
    stage.hangs_up()
    stage.fleet.broadcast(control.ReportMemory())  # nobody is there
    sampled, lost = stage.hears(2)
    assert sampled.tokens == [5]
    assert lost == Lost("stage 0: no layer 7", is_user_error)
    assert isinstance(lost.error(), ConfigError if is_user_error else StageError)


def test_what_others_said_before_a_loss_comes_before_it(monkeypatch):
    """Though it is read after it."""
    stage = OneStage(monkeypatch, num_stages=2)
    last, heard = stage.comes(1), []
    while not heard:  # until both are there
        stage.fleet.broadcast(control.ReportMemory())
        stage.fleet.receive(0.0)
        heard = last.receive()
        stage.listens()
    stage.says(control.StageFailed("no more", False))
    last.send(control.encode(Sampled(0, [5], b"\x01", [], []), 1))
    sampled, lost = stage.fleet.receive(1.0)
    assert (sampled.rank, sampled.message.tokens) == (1, [5])
    assert (lost.rank, lost.message.why) == (0, "stage 0: no more")
    stage.close()


def test_a_stage_that_hangs_up_is_lost_if_no_keeper_says_why(stage):
    stage.keeper_joins()
    stage.hangs_up()
    for seconds in (1.0, 1.5, 1.0):
        assert not stage.fleet.receive(1.0)
        stage.passes(seconds)
    (received,) = stage.fleet.receive(1.0)
    assert (received.rank, received.at_s) == (0, 103.5)
    assert "stage 0 hung up, and its keeper on afar does not say why" in received.message.why
    stage.passes(0.5)
    assert not stage.fleet.receive(0.1)  # it is told once


def test_what_a_keeper_said_before_it_was_gone_is_taken_up_behind_that(stage):
    """It may have answered a heartbeat, whose machine's clock is asked for."""
    stage.keeper_joins()
    stage.keeper.send(control.encode(control.HeartbeatAnswer(0.0, 0.0, *VitalSigns()), 0))
    stage.keeper.close()
    came = []
    while not any(isinstance(each.message, Gone) for each in came):
        came += stage.fleet.receive(0.01)
        stage.passes(0.5)
    assert 0 not in stage.fleet.keepers
    assert stage.fleet.is_remote(0)


def test_what_is_said_of_an_old_epoch_is_dropped(stage):
    stage.says(Sampled(0, [5], b"\x01", [], []), epoch=0)
    stage.says(control.StageFailed("too late", False), epoch=0)
    stage.says_something()
    assert stage.hears() == [control.Memory(7)]


def test_a_fresh_epoch_keeps_the_stages_that_are_there(stage):
    """What one of them said in the old one is not heard any more."""
    stage.fleet.start([JOB])
    (payload,) = stage.stage.receive()
    assert control.decode_for_stage(payload) == (2, control.Renew(JOB.work))
    stage.says(Sampled(0, [5], b"\x01", [], []))
    stage.says(control.Memory(8), epoch=2)
    assert stage.hears() == [control.Memory(8)]


def test_a_stage_that_was_lost_is_not_kept(stage):
    stage.says(control.StageFailed("no more", False))
    assert isinstance(stage.hears()[0], Lost)
    stage.fleet.start([JOB])
    stage.stage = stage.comes(epoch=2)
    stage.says(control.Memory(8), epoch=2)
    assert stage.hears() == [control.Memory(8)]


def test_a_stage_that_hangs_is_lost_when_the_driver_says_so(stage):
    stage.fleet.give_up(0, "it hangs")
    (received,) = stage.fleet.receive(60.0)
    assert (received.rank, received.message) == (0, Lost("it hangs"))


def test_a_neighbour_that_is_not_reached_is_a_loss_and_no_end_of_its_stage(stage):
    stage.says(control.Unreached("10.0.0.2 hung up"))
    assert stage.hears() == [Lost("stage 0: 10.0.0.2 hung up")]
    stage.fleet.start([JOB])
    stage.says(control.Memory(8), epoch=2)
    assert stage.hears() == [control.Memory(8)]


def test_what_was_kept_comes_first_and_does_not_wait(stage):
    stage.says_something()
    kept = []
    while not kept:
        kept = stage.fleet.receive(0.01)
    stage.fleet.keep(kept)
    assert stage.fleet.receive(60.0) == kept
