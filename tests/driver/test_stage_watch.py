"""Which stage owes what, by a clock that the test sets."""

import random

import pytest

from pipeserve.core.nouns import Chunk, Microbatch, RequestId
from pipeserve.driver.stage_watch import StageWatch

STAGES = 3
MARGIN_S = 1.5


class Run:
    """Microbatches of one request over stages that take as long as the test says."""

    def __init__(self):
        self.watch = StageWatch(STAGES, MARGIN_S, heartbeat_s=2.0)
        self.now = 100.0
        self.index = -1
        self.watch.start_again(self.now)
        self.look()

    def look(self):
        return self.watch.overdue(self.now)

    def passes(self, seconds):
        """In looks a tenth of a second apart; the first finding."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(self.now + 0.1, until)
            if found := self.look():
                return found
        return None

    def plan(self, num_tokens=1, token_from=None):
        self.index += 1
        chunk = Chunk(RequestId(0), 0, num_tokens, (), token_from, 1, 0)
        self.watch.planned(Microbatch(self.index, (chunk,), (), ()), self.now)

    def crosses(self, seconds, num_tokens=1, stages=STAGES):
        self.plan(num_tokens)
        for stage in range(stages):
            assert self.passes(seconds) is None
            self.watch.computed(stage, self.index, self.now)
        if stages == STAGES:
            self.watch.completed(self.index, self.now)


@pytest.mark.parametrize("usual_s", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("stage", range(STAGES))
def test_the_stage_that_owes_is_named_soon_after_its_usual_time(usual_s, stage):
    run = Run()
    for _ in range(20):
        run.crosses(usual_s)
    run.crosses(usual_s, stages=stage)
    began_s = run.now
    found = run.passes(60.0)
    assert (found.stage, found.index) == (stage, run.index) and run.watch.at(stage) == run.index
    margin_s = max(MARGIN_S, 1.5 * usual_s)
    assert usual_s + margin_s <= run.now - began_s <= usual_s + margin_s + 0.2


def test_one_that_gets_slow_is_not_taken_for_dead():
    """Half of its core is taken, and then a prompt is eight times as long as any before."""
    run, draw = Run(), random.Random(0)
    for slow in [1.0] * 20 + [2.0] * 20:
        run.crosses(0.5 * slow * draw.uniform(0.7, 1.3), num_tokens=64)
    run.crosses(8 * 0.5 * 2.0, num_tokens=512)
    run.crosses(0.4)  # nor is one that is shorter than any


def test_the_first_microbatch_has_a_minute():
    run = Run()
    run.plan()
    assert run.passes(55.0) is None
    assert run.passes(10.0).stage == 0


def test_a_stage_that_waits_for_tokens_owes_nothing():
    run = Run()
    for _ in range(5):
        run.crosses(0.1)
    run.plan()
    source = run.index
    run.plan(token_from=source)
    run.watch.computed(0, source, run.now)
    assert run.watch.at(0) is None and run.watch.at(1) == source
    assert run.passes(10.0).stage == 1
    for stage in (1, 2):
        run.watch.computed(stage, source, run.now)
    run.watch.completed(source, run.now)
    assert run.watch.at(0) == source + 1


def test_stages_may_be_heard_in_any_order():
    run = Run()
    run.crosses(0.1)
    run.plan()
    for stage in (2, 1, 0):
        run.watch.computed(stage, run.index, run.now)
    assert run.passes(100.0) is None


def test_a_driver_that_stood_still_blames_nobody():
    run = Run()
    for _ in range(5):
        run.crosses(0.1)
    run.plan()
    run.now += 100.0
    assert run.look() is None
    assert run.passes(1.0) is None
    assert run.passes(1.0).stage == 0


def test_idle_stages_are_asked_for_a_sign_of_life():
    run = Run()
    assert not run.watch.wants_to_ask(run.now)
    run.passes(1.1)
    assert run.watch.wants_to_ask(run.now) and not run.watch.wants_to_ask(run.now)
    run.watch.answered(0)
    run.watch.answered(2)
    found = run.passes(3.0)
    assert (found.stage, found.index) == (1, None) and 2.0 <= found.late_s <= 2.2
    run.watch.start_again(run.now)
    assert run.passes(0.5) is None
