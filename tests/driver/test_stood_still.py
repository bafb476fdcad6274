"""Processes that stand still for a while: who is to blame for it is lost, and nobody else."""

import os
import signal
import subprocess
import time

import pytest

from pipeserve.configs import make_config
from pipeserve.core.nouns import Request, RequestId
from pipeserve.driver.driver import Driver
from pipeserve.launch.run.emulated import emulated_setup
from pipeserve.sampling_params import SamplingParams

pytestmark = pytest.mark.processes

STAGES = 3
FLAGS = {"model": "llama2-7b", "device_profile": "a100-80gb-dgx", "max_model_len": 1024,
         "pipeline_parallel_size": STAGES, "device": "emulated"}  # fmt: skip
STILL_S = 3.0


class Load:
    """Enough requests for a while."""

    def __init__(self, driver):
        self.driver, self.num_tokens, self.num_added = driver, 0, 0

    def runs(self, is_enough, seconds=60.0):
        until_s = time.monotonic() + seconds
        while not is_enough():
            while self.driver.engine.num_unfinished < 6:
                params = SamplingParams(max_tokens=50, seed=1, ignore_eos=True)
                number = RequestId(self.num_added)
                self.driver.submit([Request(id=number, prompt=(7,) * 50, params=params)])
                self.num_added += 1
            self.num_tokens += len(self.driver.outputs(0.1))
            assert time.monotonic() < until_s

    def runs_for(self, seconds):
        until_s = time.monotonic() + seconds
        self.runs(lambda: time.monotonic() > until_s)


@pytest.fixture
def load():
    with Driver(emulated_setup(make_config({}, FLAGS))) as driver:
        load = Load(driver)
        load.runs(lambda: load.num_tokens > 100)
        yield load


def stand_still(pids):
    """For a while; and this process with them."""
    everyone = " ".join(map(str, [os.getpid(), *pids]))
    subprocess.Popen(["sh", "-c", f"sleep {STILL_S}; kill -CONT {everyone}"])
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("who", ["driver", "machine"])
def test_a_driver_that_stood_still_blames_nobody(load, who):
    """Alone, as one that was busy (mars#470: workers are judged dead when the scheduler is busy;
    storm#7339, ray#59193: nodes that are, by health checks); or with all others, as on a virtual
    machine that was paused."""
    driver = load.driver
    keepers = [keeper.pid for keeper in driver.fleet.keepers.values()]
    others = [*keepers, *[stage.pid for stage in driver.stages]]
    stand_still(others if who == "machine" else [])
    load.runs_for(1.5)
    assert driver.losses.counts == [0] * STAGES and not driver.losses.trouble


def test_one_that_is_stopped_while_others_are_started_again_is_found(load):
    """It owes no microbatch then, and nobody waits for it but all."""
    driver = load.driver
    os.kill(driver.stages[1].pid, signal.SIGKILL)
    stopped = driver.stages[2].pid
    load.runs(lambda: driver.losses.trouble)
    os.kill(stopped, signal.SIGSTOP)
    load.runs(lambda: not driver.losses.trouble)
    assert driver.losses.counts == [0, 1, 1] and driver.stages[2].pid != stopped
