"""Since when the driver has only waited: of that depends whether a late result is its fault."""

from types import SimpleNamespace

import pytest

from pipeserve import control, fleet
from pipeserve.connection import Sources, connect


class OneStage:
    """A fleet of one stage, which is here, and a clock that stands still."""

    def __init__(self, monkeypatch):
        self.now_s = 100.0
        monkeypatch.setattr(fleet, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        self.fleet = fleet.Fleet(1, "external", None)
        self._sources = Sources()
        self._stage = connect(self.fleet.stages_address, self._sources, "control")
        self._stage.send(control.encode(control.StageHello(0)))
        self.fleet.receive(10.0)  # it has called
        self.says_something()
        self.fleet.receive(10.0)  # now the two are connected

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
