"""Two hosts whose link goes down, which tells nobody (ray#26772, ray#44692: calls never return;
torch#111646: the others wait for 30 minutes). Both sides find it out: the driver names the keeper,
and the keeper ends with its stage and leaves nothing behind (gpustack#2595: a server that has
forgotten what still runs on a host that was away)."""

import subprocess
import sys
import time

import hosts
import pytest

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(bool(hosts.why_not()), reason=hosts.why_not() or "there are hosts"),
]

DRIVER = """
import sys, time
from pipeserve.configs import make_config
from pipeserve.core.topology import Topology
from pipeserve.driver.events import Lost
from pipeserve.driver.fleet import Fleet
from pipeserve.driver.waiting import wait_for_keepers
from pipeserve.driver.starting import jobs_of
from pipeserve.launch.run.emulated import emulated_setup

flags = {"model": "llama2-7b", "device_profile": "a100-80gb-dgx", "max_model_len": 1024,
         "device": "emulated", "launcher": "external", "control": sys.argv[1]}
config = make_config({}, flags)
fleet = Fleet(Topology(((0,),)), config)
wait_for_keepers(fleet, lambda text: None)
fleet.start(jobs_of(emulated_setup(config), fleet.topology, fleet.local_name))
until = time.monotonic() + 60
while time.monotonic() < until:
    for received in fleet.receive(0.1):
        if type(received.message).__name__ == "Sized":
            print("sized", flush=True)
        elif isinstance(received.message, Lost):
            print(received.message.why, flush=True)
"""
NAMED_S = 2.0
ENDS_S = 6.0


def test_both_sides_find_out_that_a_link_is_down(monkeypatch):
    monkeypatch.setenv("PIPESERVE_CONTROL_SECRET", "of this run")
    with hosts.Hosts("left", "right") as (left, right):
        address = f"{left.address}:29600"
        driver = left.start(
            [sys.executable, "-c", DRIVER, address], stdout=subprocess.PIPE, text=True
        )
        command = [sys.executable, "-m", "pipeserve.launch.keeper", "--control", address]
        keeper = right.start([*command, "--rank", "0", "--world-size", "1"])
        assert driver.stdout.readline() == "sized\n"
        assert len(right.running()) == 2

        right.pull_cable()
        cut_s = time.monotonic()
        said = driver.stdout.readline()
        named_s = time.monotonic() - cut_s
        assert said.startswith("nothing heard from the keeper of stage 0 on right for ")
        assert named_s < NAMED_S + 1.0  # of a machine that has other things to do, too
        assert keeper.wait(timeout=ENDS_S + 20.0) == 1
        assert not right.left_after(5.0)
