"""A rank that is killed inside of a sum: who shares its stage is ended and started again with it,
the other stage keeps its processes, and every request comes to the tokens of an undisturbed run.

Four processes import megatron-core, and two of them twice: a third of a minute of two cores.
"""

import os
import signal
import time
from pathlib import Path

import pytest
from checkpoints import random_prompts, tiny
from forked_fleet import ForkedFleet
from local_fleet import LocalFleet
from test_restarts import LENGTHS, Taken, none_left, processes_of, request, setup_of

from pipeserve.driver.driver import Driver
from pipeserve.stage.worker import ModelCompute
from pipeserve.wire import control

WAITS_S = 0.3

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.processes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def requests(folder):
    return [request(*each) for each in enumerate(random_prompts(folder, LENGTHS))]


@pytest.fixture(scope="module")
def expected(folder, requests):
    with Driver(setup_of(folder, pipeline_parallel_size=2), fleet=LocalFleet) as driver:
        driver.submit(requests)
        return Taken(driver).all(driver)


def stage_pids(driver):
    """Of each rank."""
    keepers = [driver.fleet.keepers[rank].pid for rank in range(driver.topology.num_ranks)]
    return [int(Path(f"/proc/{pid}/task/{pid}/children").read_text()) for pid in keepers]


def test_a_rank_that_does_not_speak_for_its_stage_is_killed(folder, requests, expected, capfd):
    setup = setup_of(folder, pipeline_parallel_size=2, tensor_parallel_size=2)
    with none_left() as pids, Driver(setup) as driver:
        driver.submit(requests)
        taken = Taken(driver)
        while taken.num_tokens < 10:
            taken.look()
        before = stage_pids(driver)
        pids += processes_of(driver) + before
        os.kill(before[1], signal.SIGKILL)
        while not driver.losses.trouble:
            taken.look()
        assert "rank 1 of stage 0" in driver.losses.trouble
        while driver.losses.trouble:
            taken.look()
        after = stage_pids(driver)
        assert [before[rank] != after[rank] for rank in range(4)] == [True, True, False, False]
        taken.all(driver)
        pids += processes_of(driver) + after
        assert driver.engine.num_free_blocks == driver.limits.num_blocks
        assert driver.losses.counts == [1, 0]
    assert taken.tokens == expected.tokens
    assert "died: killed by SIGKILL" in capfd.readouterr().err


def test_who_waits_in_a_sum_is_freed_by_an_idle_rank_that_hears_of_the_fresh_epoch(
    folder, requests, expected, monkeypatch
):
    """A rank of the first stage is lost before it has sent what the others of it have sent: so in
    the stage behind one rank has its input, and waits in a sum for another that has not. That one
    frees it by ending its connections, which torch does only where nobody holds the group any more
    (pytorch#96017, pytorch#107298): one was held, and a rank sat in its sum until it was killed."""
    import pipeserve.stages.tensor_parallel.layers  # noqa: F401  in this process, before it forks

    end, at = ModelCompute.end, []

    def sends_nothing_once(self, turn, feed_back):
        at.append(turn.step.index)
        if (self._job.stage, self._job.shard, len(at)) != (0, 1, 5):
            return end(self, turn, feed_back)
        self.links.send = lambda *what: 0
        end(self, turn, feed_back)
        del self.links.send
        time.sleep(WAITS_S)  # until the other has come as far as its sum
        self._tell(control.Unreached("nobody is there"))
        return None

    monkeypatch.setattr(ModelCompute, "end", sends_nothing_once)
    setup = setup_of(
        folder, pipeline_parallel_size=2, tensor_parallel_size=2, heartbeat_interval=60.0
    )
    with Driver(setup, fleet=ForkedFleet) as driver:
        driver.submit(requests)
        taken = Taken(driver)
        while driver.engine.num_unfinished:
            taken.look()
            assert driver.losses.counts in ([0, 0], [1, 0])
    assert taken.tokens == expected.tokens
