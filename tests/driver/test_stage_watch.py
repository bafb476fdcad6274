"""Which stage owes what, by a clock that the test sets."""

import random

import pytest

from pipeserve.core.nouns import Chunk, Microbatch, RequestId
from pipeserve.core.records import Span
from pipeserve.driver.stage_watch import StageWatch
from pipeserve.wire import control

STAGES = 3
MARGIN_S = 1.5
HEARTBEAT_S = 2.0


class Run:
    """Microbatches of one request over stages that take as long as the test says."""

    def __init__(self):
        self.watch = StageWatch(STAGES, MARGIN_S, HEARTBEAT_S)
        self.now = 100.0
        self.index = -1
        self.watch.start_again()
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

    def computed(self, stage, index=None):
        """By the CPU."""
        index = self.index if index is None else index
        self.watch.computed(Span(stage, index, 1, *[self.now] * 6, 0.0, 0.0, 0), self.now)

    def crosses(self, seconds, num_tokens=1, stages=STAGES):
        self.plan(num_tokens)
        for stage in range(stages):
            assert self.passes(seconds) is None
            self.computed(stage)
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
    run.computed(0, source)
    assert run.watch.at(0) is None and run.watch.at(1) == source
    assert run.passes(10.0).stage == 1
    for stage in (1, 2):
        run.computed(stage, source)
    run.watch.completed(source, run.now)
    assert run.watch.at(0) == source + 1


def test_stages_may_be_heard_in_any_order():
    run = Run()
    run.crosses(0.1)
    run.plan()
    for stage in (2, 1, 0):
        run.computed(stage, run.index)
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


@pytest.mark.parametrize("silent_s", [0.01, 0.3, 0.49])
def test_an_idle_stage_that_gives_no_sign_of_life_is_found_within_a_heartbeat(silent_s):
    """Wherever between two questions it stops."""
    run = Run()
    silent_from, found = run.now + 3.0 + silent_s, None
    while not found:
        run.now += 0.01
        if run.watch.wants_to_ask(run.now):
            for stage in range(STAGES):
                if stage != 1 or run.now < silent_from:
                    run.watch.answered(stage)
        found = run.look()
        assert run.now < silent_from + HEARTBEAT_S
    assert (found.stage, found.index) == (1, None) and run.now > silent_from + HEARTBEAT_S / 2
    run.watch.start_again()
    assert run.passes(0.5) is None


def test_a_driver_that_did_not_look_blames_no_idle_stage():
    run = Run()
    run.watch.wants_to_ask(run.now)
    run.now += 100.0
    assert run.look() is None and run.passes(1.0) is None


class Process:
    """That a stage is, as its keeper tells of it: twice a second, and at the end of a phase."""

    def __init__(self, run, stage):
        self.run, self.stage = run, stage
        self.ran_s = self.stood_s = 0.0
        self.num_moved = 0
        self.tell()

    def tell(self, state="S"):
        answer = control.HeartbeatAnswer(0.0, 0.0, self.num_moved, self.ran_s, self.stood_s, state)
        self.run.watch.signs(self.stage, answer, self.run.now)

    def lives(self, seconds, runs=0.0, stands=0.0, state="S"):
        """Having a core for a share of the time, and standing in line for another; what is found
        to be overdue meanwhile."""
        for _ in range(round(2 * seconds)):
            self.ran_s += 0.5 * runs
            self.stood_s += 0.5 * stands
            found = self.run.passes(0.5)
            self.tell(state)
            if found:
                return found
        return None


def at_its_second_stage(usual_s):
    """A microbatch, in a run whose microbatches took so long there."""
    run = Run()
    for _ in range(20):
        run.crosses(usual_s)
    process = Process(run, stage=1)
    run.crosses(usual_s, stages=1)
    return run, process


@pytest.mark.parametrize("core", [0.5, 0.25, 0.1])
def test_a_stage_that_waits_for_its_core_is_slow_and_not_dead(core):
    """A neighbour, or a quota, takes the rest of it, all at once (storm#7339: workers are ended for
    health checks that time out under load)."""
    run, process = at_its_second_stage(usual_s=2.0)
    assert process.lives(2.0 / core, runs=core, stands=1 - core, state="R") is None
    run.computed(1)


def test_one_that_computes_longer_than_ever_gets_more_time_than_one_that_sleeps():
    """A core that is shared with another thread of it computes less, and nobody waits for it."""
    run, process = at_its_second_stage(usual_s=2.0)
    assert process.lives(4.5, runs=1.0, state="R") is None
    found = process.lives(60.0, runs=1.0, state="R")
    assert found.stage == 1 and found.late_s < 2.0 * 2.5 + 1.0
    for state in "ST":
        run, process = at_its_second_stage(usual_s=2.0)
        found = process.lives(60.0, state=state)
        assert (found.stage, found.index) == (1, run.index) and found.late_s < 2.0 + 2.0


def test_a_stage_whose_pages_come_from_disk_is_at_work():
    _, process = at_its_second_stage(usual_s=2.0)
    for _ in range(9):
        process.num_moved += 4096
        assert process.lives(0.5) is None


def test_what_it_waited_for_before_its_microbatch_excuses_nothing():
    run = Run()
    for _ in range(20):
        run.crosses(0.1)
    process = Process(run, stage=1)
    assert process.lives(20.0, stands=1.0) is None
    run.crosses(0.1, stages=1)
    process.tell()
    found = process.lives(60.0)
    assert found.stage == 1 and found.late_s < 0.1 + 2.0


def test_an_idle_stage_that_gets_no_core_is_not_dead():
    run = Run()
    process = Process(run, stage=1)
    run.watch.wants_to_ask(run.now)
    for stage in (0, 2):
        run.watch.answered(stage)
    assert process.lives(10.0, stands=1.0, state="R") is None
    assert process.lives(10.0).stage == 1


def test_another_process_begins_anew():
    _, process = at_its_second_stage(usual_s=0.1)
    process.stood_s = process.ran_s = 1e6
    process.tell()
    process.stood_s = process.ran_s = 0.0
    process.tell()
    assert process.lives(60.0).late_s < 2.5


# ---- heads at the first stage -------------------------------------------------------------------


def owes_a_head(run, rows=1):
    """A microbatch that has left the last stage."""
    run.index += 1
    chunks = tuple(Chunk(RequestId(n), 0, 1, (), None, 1, 0) for n in range(rows))
    run.watch.planned(Microbatch(run.index, chunks, (), (), head_at_first=True), run.now)
    for stage in range(STAGES):
        run.passes(0.01)
        run.computed(stage)


def heads_take(run, seconds, rows=1):
    owes_a_head(run, rows)
    assert run.passes(seconds) is None
    run.watch.completed(run.index, run.now)


def test_a_head_that_is_not_done_is_named_though_the_stage_owes_nothing_else():
    run = Run()
    heads_take(run, 0.5)
    owes_a_head(run)
    assert not run.watch.wants_to_ask(run.now), "it cannot answer within a head"
    assert run.watch.at_all(0) == [run.index] and f"at {run.index}" in run.watch.whereabouts(0)
    found = run.passes(0.5 + MARGIN_S + 1.0)
    assert (found.stage, found.index) == (0, run.index)


def test_the_first_head_of_all_has_as_long_as_the_first_microbatch():
    run = Run()
    owes_a_head(run)
    assert run.passes(50.0) is None
    assert run.passes(15.0).index == run.index


def test_heads_that_go_first_are_no_fault_of_the_microbatch_behind_them():
    run = Run()
    for _ in range(3):
        run.crosses(0.01)
    heads_take(run, 2.0)
    owes_a_head(run)
    head = run.index
    run.plan()  # is there, and waits for the head
    assert run.passes(2.0) is None
    run.watch.completed(head, run.now)
    assert run.passes(1.0) is None
    found = run.passes(1.5)
    assert (found.stage, found.index) == (0, run.index)


def test_many_rows_are_not_judged_by_few():
    run = Run()
    heads_take(run, 0.1, rows=1)
    owes_a_head(run, rows=64)
    assert run.passes(3.0) is None, "64 rows may take 64 times as long"
