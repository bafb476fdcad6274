"""That nothing stops a run for long: what the garbage collector walks, and how much is kept."""

import gc
import time
import weakref
from collections import Counter
from contextlib import contextmanager
from itertools import count

import pytest
from fake_client import FakeDriver
from test_emulated import config_of

from pipeserve.core.cost.partition import split_layers
from pipeserve.core.engine import Engine
from pipeserve.core.journal import Journal
from pipeserve.core.nouns import Microbatch, Request, StepResult, one_each
from pipeserve.core.policies import POLICIES, get_policy
from pipeserve.core.records import Completed, Span
from pipeserve.core.view import Limits
from pipeserve.driver.driver import Driver
from pipeserve.launch.run.collector import no_pauses
from pipeserve.launch.run.emulated import emulated_setup
from pipeserve.launch.run.record import recorded
from pipeserve.launch.verbs import bench
from pipeserve.profiling.recording.recording import Ring
from pipeserve.profiling.simulation.workloads import WorkItem
from pipeserve.sampling_params import SamplingParams

NUM_STAGES = 4


class Run:
    """An engine under a steady load, told to a ring as the driver tells it; stages are invented."""

    def __init__(self, num_running, policy="uniform", outputs=(20, 60), **limits):
        plan = split_layers(8, NUM_STAGES)
        given = {
            "num_blocks": 50 * num_running,
            "max_num_batched_tokens": num_running + 200,
            **limits,
        }
        limits = Limits(block_size=4, max_num_seqs=num_running, max_model_len=2000, **given)
        self.engine = Engine(plan, get_policy(policy), limits)
        self.ring = Ring()
        self.journal = Journal(self.engine, self.ring.record)
        self.now, self.ids, self.outputs = 0.0, count(), outputs
        self.num_tokens: Counter[int] = Counter()
        """That each request has had which has not ended."""
        self.num_ended = 0
        for _ in range(num_running + 20):
            self.add()

    def add(self):
        number = next(self.ids)
        least, most = self.outputs
        params = SamplingParams(max_tokens=least + number * 7 % (most - least), seed=0)
        prompt = tuple(1000 + (number * 31 + place) % 977 for place in range(8 + number % 40))
        request = Request(id=number, prompt=prompt, params=params)
        self.engine.add(request, self.now)
        self.journal.arrived(request, self.now)

    def go(self, num_microbatches, collect=lambda: None):
        flying = []
        for _ in range(num_microbatches):
            while isinstance(planned := self.engine.plan(self.now), Microbatch):
                self.journal.planned(planned, self.now, self.now)
                collect()
                flying.append(planned)
            done = flying.pop(0)
            self.now += 0.01
            for stage in range(NUM_STAGES):
                times = [self.now + stage + place for place in range(6)]
                self.journal.computed(
                    Span(stage, done.index, done.num_tokens, *times, 0.1, 0.01, 8)
                )
            counts = one_each(done.chunks)
            result = StepResult(done.index, tuple(range(1000, 1000 + sum(counts))), counts)
            outputs = self.engine.complete(result, self.now)
            times = [self.now] * 3
            self.journal.completed(Completed(done.index, *times, tuple(counts)), outputs)
            for output in outputs:
                self.num_tokens[output.request_id] += 1
                if output.finish_reason is not None:
                    del self.num_tokens[output.request_id]
                    self.num_ended += 1
                    self.add()
        while flying:
            done = flying.pop(0)
            counts = one_each(done.chunks)
            result = StepResult(done.index, (1000,) * sum(counts), counts)
            self.engine.complete(result, self.now)


@contextmanager
def collections():
    """Of each collection meanwhile: (generation, objects that it walks)."""
    told = []

    def tell(phase, info):
        if phase == "start":
            generations = range(info["generation"] + 1)
            told.append(
                (info["generation"], sum(len(gc.get_objects(number)) for number in generations))
            )

    gc.callbacks.append(tell)
    try:
        yield told
    finally:
        gc.callbacks.remove(tell)


def walked(roots):
    """References that a collection follows or looks at, from `roots` on."""
    seen, left, num = set(), [*roots], 0
    while left:
        thing = left.pop()
        if id(thing) in seen or not gc.is_tracked(thing) or isinstance(thing, type):
            continue
        seen.add(id(thing))
        referents = gc.get_referents(thing)
        num += len(referents)
        left += referents
    return num


def test_no_collection_of_a_long_run_walks_much():
    """At a thousand running requests, all of them replaced twice, with everything recorded."""
    run = Run(1000)
    with no_pauses() as collect, collections() as told:
        run.go(500, collect)
    assert len(run.ring) > 8000 and run.engine.num_running > 900
    assert len(told) > 490 and {generation for generation, _ in told} == {0}
    assert max(num for _, num in told) < 2000


def test_the_default_collector_walks_more():
    """Or the test above could not fail."""
    run = Run(1000)
    gc.collect()
    with collections() as told:
        run.go(500)
    assert max(num for _, num in told) > 5000


def test_what_is_walked_does_not_grow_with_what_was_run():
    run = Run(100, outputs=(40, 80))
    run.go(400)
    gc.collect()
    before, num_recorded = len(gc.get_objects()), len(run.ring)
    run.go(800)
    gc.collect()
    assert len(run.ring) > 2.5 * num_recorded
    assert len(gc.get_objects()) < before + 300  # requests that wait or run, a few more or fewer


def test_what_is_walked_does_not_grow_with_tokens_and_blocks():
    """A request has hundreds of each; a million are walked at ten thousand requests."""
    run = Run(50, outputs=(1500, 1600), num_blocks=50_000)
    run.go(60)
    gc.collect()
    short = walked([run.engine])
    run.go(3000)
    gc.collect()
    assert len(run.num_tokens) >= 50 and min(run.num_tokens.values()) > 500
    num_held = run.engine.limits.num_blocks - run.engine.num_free_blocks
    assert num_held > 100 * run.engine.num_running
    assert walked([run.engine]) < short + 500


def test_what_is_walked_does_not_grow_with_the_kv_pool():
    """The pool of ten thousand requests has a million blocks, most of them cached or free."""
    few, many = (Run(20, num_blocks=blocks) for blocks in (4_000, 400_000))
    for run in (few, many):
        run.go(400)
        gc.collect()
    assert many.num_ended > 30  # each left a dozen full blocks in the cache
    assert walked([many.engine]) < walked([few.engine]) + 300


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_run_leaves_nothing_to_the_collector(policy):
    """Whatever it makes goes with its last reference: there are no cycles. With too few blocks, so
    that requests are preempted, and one is aborted."""
    run = Run(30, policy, num_blocks=520, max_num_batched_tokens=2000)
    run.go(20)
    gc.collect()
    gc.disable()
    try:
        run.engine.finish(next(iter(run.num_tokens)), "abort", run.now)
        run.go(200)
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.processes
def test_an_emulated_run_leaves_nothing_to_the_collector():
    items = [WorkItem(prompt=(7,) * (5 + k), max_tokens=10 + k) for k in range(20)]
    ring = Ring()
    with Driver(emulated_setup(config_of(2)), record=ring.record) as driver:
        bench.run_items(driver, items, "", count())
        gc.collect()
        before = len(gc.get_objects())
        gc.disable()
        try:
            bench.run_items(driver, items, "", count(100))
            driver.settle()
            assert gc.collect() == 0
        finally:
            gc.enable()
        assert len(gc.get_objects()) < before + 50
    assert len(ring) > 150


# ---- the collector of a command ------------------------------------------------------------------


def test_nothing_is_collected_unasked_and_old_things_never():
    with no_pauses() as collect, collections() as told:
        kept = [[number] for number in range(100_000)]
        collect()  # of so many at once most stay: not walked
        assert told == [] and gc.get_freeze_count() > 100_000
        kept += [[number] for number in range(1000)]
        cycle = []
        cycle.append(weakly := Cycle())
        weakly.cycle, gone = cycle, weakref.ref(weakly)
        del cycle, weakly
        collect()
        assert gone() is None
    assert [generation for generation, _ in told] == [0] and 1000 <= told[0][1] < 1100
    assert gc.isenabled() and gc.get_freeze_count() == 0
    del kept


class Cycle:
    """What can be seen to go."""


def test_the_collector_is_left_as_it_was():
    gc.freeze()
    gc.disable()
    try:
        with pytest.raises(KeyError), no_pauses():
            raise KeyError
        assert gc.get_freeze_count() > 0 and not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()


@pytest.mark.processes
def test_the_commands_have_it():
    """`bench` and `generate` get their driver here."""
    items = [WorkItem(prompt=(7,) * 5, max_tokens=40)]
    with (
        collections() as told,
        recorded(lambda record: Driver(emulated_setup(config_of(1)), record=record), None) as (
            driver,
            records,
        ),
    ):
        assert gc.get_freeze_count() > 0 and not gc.isenabled()
        told.clear()
        bench.run_items(driver, items, "", count())
        assert [generation for generation, _ in told] == [0] * (driver.engine.last.index + 1)
        assert len(records.ring) > 80
    assert gc.get_freeze_count() == 0 and gc.isenabled()


# ---- bursts --------------------------------------------------------------------------------------


class CountedDriver(FakeDriver):
    """Notes how many requests were added between two looks."""

    def __init__(self, *args):
        super().__init__(*args)
        self.added_between = []

    def outputs(self, timeout_s):
        self.added_between.append(len(self.added) - sum(self.added_between))
        time.sleep(0.001)
        return super().outputs(timeout_s)


def test_a_burst_does_not_keep_the_driver_from_its_messages(tmp_path):
    """All that is there at first is one load; what comes while others run goes in bit by bit."""
    driver = CountedDriver(tmp_path)
    first = [WorkItem(prompt=(1, 2), max_tokens=50)] * 100
    burst = [WorkItem(prompt=(1, 2), max_tokens=3, arrival_s=0.01)] * 100
    served = bench.run_items(driver, [*first, *burst], "", count())
    assert sum(driver.added_between) == 200 and len(served) == 200
    assert driver.added_between[0] == 100 and 1 <= max(driver.added_between[1:]) <= 16
