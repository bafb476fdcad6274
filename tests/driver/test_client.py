"""What a driver promises to its client (pipeserve/frontend/client.py), on emulated stages."""

import inspect
import threading

import pytest
from fake_client import FakeClient

from pipeserve.configs import make_config
from pipeserve.core.nouns import Request, RequestId
from pipeserve.core.records import Arrived, Ended, Planned
from pipeserve.driver.driver import Driver
from pipeserve.errors import CapacityError, ConfigError, StageError
from pipeserve.frontend.client import Client
from pipeserve.launch.run.emulated import emulated_setup
from pipeserve.sampling_params import SamplingParams

pytestmark = pytest.mark.processes

CONFIG = {
    "model": "llama2-7b",
    "device": "emulated",
    "device_profile": "a100-80gb-dgx",
    "pipeline_parallel_size": 2,
}


class Run:
    """A driver and what it tells; `on_record` is called from within its methods."""

    def __init__(self):
        self.told = []
        self.on_record = lambda record: None
        self.driver = Driver(emulated_setup(make_config({}, CONFIG)), record=self._record)

    def _record(self, record):
        self.told.append(record)
        self.on_record(record)

    def go(self):
        """Until nothing is unfinished."""
        outputs = []
        while self.driver.engine.num_unfinished:
            outputs += self.driver.outputs(0.5)
        return outputs

    def ends(self):
        return {end.request_id: end.reason for end in self.told if type(end) is Ended}


@pytest.fixture(scope="module")
def started():
    run = Run()
    yield run
    run.driver.close()


@pytest.fixture
def run(started):
    started.told.clear()
    started.on_record = lambda record: None
    return started


def request(number, prompt=(5,) * 20, **fields):
    params = SamplingParams(max_tokens=12, seed=0, ignore_eos=True)
    return Request(id=RequestId(number), prompt=prompt, params=params, **fields)


@pytest.mark.parametrize("kind", [Driver, FakeClient])
def test_it_has_the_methods_of_a_client(kind):
    promised = inspect.getmembers(Client, inspect.isfunction)
    methods = {name: method for name, method in promised if not name.startswith("_")}
    assert methods.keys() == {"submit", "abort", "outputs", "close"}
    for name, method in methods.items():
        names = [*inspect.signature(method).parameters]
        assert [*inspect.signature(getattr(kind, name)).parameters] == names


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (request(1, prompt=()), CapacityError, "is empty"),
        (request(1, prompt=(5,) * 10**6), CapacityError, "the context"),
        (request(1, prompt=(10**6,)), ConfigError, "1000000 is no token id"),
        (request(1, num_imported=3), CapacityError, "another pipeline"),
    ],
)
def test_of_requests_that_come_together_all_are_queued_or_none(run, bad, error, message):
    with pytest.raises(error, match=message):
        run.driver.submit([request(0), bad, request(2)])
    assert run.told == [] and not run.driver.engine.num_unfinished


def test_requests_that_come_together_are_planned_together(run):
    run.driver.submit([request(number) for number in (10, 11, 12)])
    run.go()
    first = next(record for record in run.told if type(record) is Planned)
    assert [chunk.request_id for chunk in first.chunks] == [10, 11, 12]


def test_an_abort_may_come_within_a_step(run):
    """As when Python collects a dropped stream there."""

    def abort(record):
        if type(record) is Planned:
            run.driver.abort(RequestId(20))

    run.on_record = abort
    run.driver.submit([request(20), request(21)])
    outputs = run.go()
    assert run.ends() == {20: "abort", 21: "length"}
    assert len([output for output in outputs if output.request_id == 21]) == 12


def test_an_abort_may_come_on_another_thread_while_a_step_waits(run):
    run.driver.submit([request(30), request(31)])

    def abort(record):
        if type(record) is Planned:
            thread = threading.Thread(target=run.driver.abort, args=(RequestId(30), "error"))
            thread.start()
            thread.join()

    run.on_record = abort
    run.go()
    assert run.ends() == {30: "error", 31: "length"}


def test_an_abort_of_what_has_ended_or_never_was_is_ignored(run):
    run.driver.submit([request(40)])
    run.go()
    run.driver.abort(RequestId(40))
    run.driver.abort(RequestId(999))
    run.driver.submit([request(41)])
    run.go()
    assert run.ends() == {40: "length", 41: "length"}


def test_what_was_aborted_before_the_end_is_told():
    run = Run()
    run.driver.submit([request(0)])
    run.driver.abort(RequestId(0))
    run.driver.close()
    assert [type(record) for record in run.told] == [Arrived, Ended]
    for call in (lambda: run.driver.outputs(0), lambda: run.driver.submit([request(1)])):
        with pytest.raises(StageError, match="it was closed"):
            call()
    run.driver.abort(RequestId(0))  # does not raise
    run.driver.close()
