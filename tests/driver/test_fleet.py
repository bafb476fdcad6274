"""Since when the driver has only waited: of that depends whether a late result is its fault. And
what it and a stage say to each other, until one of them hangs up."""

import os
from types import SimpleNamespace

import pytest

from pipeserve.configs import RunConfig
from pipeserve.driver import fleet
from pipeserve.errors import StageError
from pipeserve.wire import control
from pipeserve.wire.connection import connect
from pipeserve.wire.sources import Sources


class Alone(fleet.Fleet):
    """That starts no keepers."""

    def _start_keepers(self, listener): ...


class OneStage:
    """A fleet of one stage, which is here, and a clock that stands still."""

    def __init__(self, monkeypatch):
        self.now_s = 100.0
        monkeypatch.setattr(fleet, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        self.fleet = Alone(1, RunConfig(model="any"))
        self._sources = Sources(self.fleet.secret)
        address = f"{self.fleet.address}/{self.fleet.local_name}"
        self._stage = connect(address, self._sources, "stage")
        self._stage.send(control.encode(control.StageHello(0)))
        self.says_something()
        while not self.fleet.receive(0.0):
            for source in self._sources.ready(0):
                source.receive()

    def says_something(self):
        self._stage.send(control.encode(control.Connected(0)))

    def passes(self, seconds):
        self.now_s += seconds

    def close(self):
        self._sources.close()
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
    admitted = control.Registration(1, tokens, 1, [], {}, [], ())
    stage.fleet.broadcast(control.Step(0, (), [admitted], []))
    stage.fleet.broadcast(control.ReportMemory())
    stage._stage.send(control.encode(control.Sampled(0, large, b"", [], [])))
    stage.says_something()
    here, there = [], []
    while len(here) < 2 or len(there) < 2:
        here += stage.fleet.receive(0.01)
        for source in stage._sources.ready(10):
            there += map(control.decode_for_stage, source.receive())
    assert [type(received.message) for received in here] == [control.Sampled, control.Connected]
    assert here[0].message.tokens == large
    assert there[0].admitted[0].token_ids == tokens
    assert there[1] == control.ReportMemory()


@pytest.mark.parametrize("number", [0, 1, -1])
def test_a_stage_that_is_not_missing_is_turned_away(stage, capsys, number):
    """And the one that is here goes on."""
    sources = Sources(stage.fleet.secret)
    second = connect(stage.fleet.address, sources, "stage")
    second.send(control.encode(control.StageHello(number)))
    while not second.has_ended:
        stage.fleet.receive(0.0)
        for source in sources.ready(1):
            source.receive()
    assert f"stage {number} is not missing" in capsys.readouterr().err
    stage.says_something()
    assert stage.fleet.receive(10.0)
    sources.close()


def test_the_last_word_of_a_stage_is_what_the_driver_raises(stage):
    stage._stage.send(control.encode(control.StageFailed(0, "no layer 7", False)))
    stage._stage.close()
    stage.fleet.broadcast(control.ReportMemory())  # nobody is there
    with pytest.raises(StageError, match=r"^stage 0: no layer 7$"):
        while True:
            stage.fleet.receive(1.0)


def test_a_stage_that_hangs_up_is_an_error_if_no_keeper_says_why(stage):
    stage.fleet.keepers[0] = control.KeeperHello(0, 1, "afar", "", 0, "")
    stage._stage.close()
    for seconds in (1.0, 1.5, 1.0):
        stage.fleet.receive(1.0)
        stage.passes(seconds)
    with pytest.raises(StageError, match=r"stage 0 hung up, .* on afar does not say why"):
        stage.fleet.receive(1.0)
    assert stage.fleet.lost_stage == 0
    stage.fleet.keepers = {}
