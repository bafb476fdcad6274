"""A rank that is killed inside of a sum: who shares its stage is ended and started again with it,
the other stage keeps its processes, and every request comes to the tokens of an undisturbed run.

Four processes import megatron-core, and two of them twice: a third of a minute of two cores.
"""

import os
import signal
from pathlib import Path

import pytest
from checkpoints import random_prompts, tiny
from local_fleet import LocalFleet
from test_restarts import LENGTHS, Taken, none_left, processes_of, request, setup_of

from pipeserve.driver.driver import Driver

pytestmark = pytest.mark.processes


def stage_pids(driver):
    """Of each rank."""
    keepers = [driver.fleet.keepers[rank].pid for rank in range(driver.topology.num_ranks)]
    return [int(Path(f"/proc/{pid}/task/{pid}/children").read_text()) for pid in keepers]


def test_a_rank_that_does_not_speak_for_its_stage_is_killed(tmp_path, capfd):
    folder = tiny("llama", tmp_path)
    requests = [request(*each) for each in enumerate(random_prompts(folder, LENGTHS))]
    with Driver(setup_of(folder, pipeline_parallel_size=2), fleet=LocalFleet) as driver:
        driver.submit(requests)
        expected = Taken(driver).all(driver)
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
