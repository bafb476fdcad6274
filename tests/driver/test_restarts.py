"""Stages as processes that are killed and stopped: every request comes to the tokens of an
undisturbed run, the other stages keep their process, and none is left behind."""

import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from checkpoints import random_prompts, tiny_llama
from local_fleet import LocalFleet

from pipeserve.configs import make_config
from pipeserve.core.nouns import Request
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.sampling_params import SamplingParams

pytestmark = pytest.mark.processes

LENGTHS = (40, 3, 17, 33, 1, 25)
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


def setup_of(folder, **flags):
    flags = {
        "model": folder,
        "dtype": "float32",
        "pipeline_parallel_size": 3,
        "max_num_batched_tokens": 16,
        "block_size": 4,
        "num_gpu_blocks_override": 64,
        "max_num_seqs": 4,
        **flags,
    }
    return checkpoint_setup(make_config({}, flags))


def request(number, prompt):
    """Greedy or drawn, with penalties and logprobs, some of the prompt's, too."""
    params = SamplingParams(
        max_tokens=MAX_TOKENS,
        temperature=number % 2,
        seed=number,
        ignore_eos=True,
        presence_penalty=0.5,
        logprobs=2,
        prompt_logprobs=1 if number % 3 == 0 else None,
    )
    return Request(id=number, prompt=tuple(prompt), params=params)


class Taken:
    """What came of a driver's requests."""

    def __init__(self, driver):
        self.driver, self.tokens, self.logprobs, self.reasons = driver, {}, {}, {}
        self.prompt_logprobs = {}

    def look(self):
        for output in self.driver.outputs(0.1):
            if output.token is not None:
                self.tokens.setdefault(output.request_id, []).append(output.token)
                self.logprobs.setdefault(output.request_id, []).append(output.logprobs)
            if output.prompt_logprobs is not None:
                assert output.request_id not in self.prompt_logprobs
                self.prompt_logprobs[output.request_id] = output.prompt_logprobs
            if output.finish_reason is not None:
                self.reasons[output.request_id] = output.finish_reason, output.error

    @property
    def num_tokens(self):
        return sum(map(len, self.tokens.values()))

    def all(self, driver, seconds=120.0):
        deadline = time.monotonic() + seconds
        while driver.engine.num_unfinished:
            self.look()
            assert time.monotonic() < deadline, "no end"
        return self


def numbers_of(entries):
    """Of each sampled or scored token, request after request."""
    return [entry.sampled for number in sorted(entries) for entry in entries[number]]


@pytest.fixture(scope="module")
def expected(folder):
    with Driver(setup_of(folder), fleet=LocalFleet) as driver:
        driver.submit([request(*each) for each in enumerate(random_prompts(folder, LENGTHS))])
        return Taken(driver).all(driver)


def processes_of(driver):
    return [at.pid for at in driver.stages] + [at.pid for at in driver.fleet.keepers.values()]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def none_left():
    """Of the processes in the list that this gives."""
    pids = []
    yield pids
    deadline = time.monotonic() + 20.0
    while left := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.05)


def test_a_stage_that_is_killed_one_that_is_stopped_and_a_keeper(folder, expected, capfd):
    """One after the other, under load."""
    with none_left() as pids, Driver(setup_of(folder)) as driver:
        driver.submit([request(*each) for each in enumerate(random_prompts(folder, LENGTHS))])
        taken = Taken(driver)
        for num_tokens, stage, kind in (
            (10, 1, signal.SIGKILL),
            (50, 2, signal.SIGSTOP),
            (90, 0, "keeper"),
        ):
            while taken.num_tokens < num_tokens:
                taken.look()
            before = [at.pid for at in driver.stages]
            pids += processes_of(driver)
            if kind == "keeper":
                os.kill(driver.fleet.keepers[stage].pid, signal.SIGKILL)
            else:
                os.kill(before[stage], kind)
            while not driver.losses.trouble:
                taken.look()
            assert f"stage {stage}" in driver.losses.trouble
            while driver.losses.trouble:
                taken.look()
            after = [at.pid for at in driver.stages]
            assert [n for n in range(3) if before[n] != after[n]] == [stage]
        taken.all(driver)
        pids += processes_of(driver)
        assert driver.engine.num_free_blocks == driver.limits.num_blocks
        assert driver.losses.counts == [1, 1, 1]
    assert taken.tokens == expected.tokens
    for name in ("logprobs", "prompt_logprobs"):
        assert numbers_of(getattr(taken, name)) == pytest.approx(
            numbers_of(getattr(expected, name)), abs=1e-4
        )
    said = capfd.readouterr().err
    assert "died: killed by SIGKILL" in said and " is stopped, by a signal" in said
    assert said.count("all stages are there again after") == 3
