"""The keeper: cores of a stage, and that it ends when there is no driver or the driver is gone."""

import subprocess
import sys

import pytest
import zmq

from pipeserve import control
from pipeserve.launch.keeper import stage_cpus


@pytest.mark.parametrize(
    ("cores", "ranks", "shares", "threads"),
    [
        (2, 1, [[0, 1]], 2),
        (2, 2, [[0], [1]], 1),
        (5, 2, [[0, 1], [2, 3]], 2),
        (2, 3, [[0, 1]] * 3, 1),
    ],
)
def test_cores_are_shared_out_evenly_or_not_at_all(cores, ranks, shares, threads):
    got = [stage_cpus(list(range(cores)), rank, ranks) for rank in range(ranks)]
    assert got == [(share, threads) for share in shares]


def _start_keeper(port, *arguments, stdin=None):
    return subprocess.Popen(
        [sys.executable, "-m", "pipeserve.launch.keeper", "--control", f"127.0.0.1:{port}",
         "--rank", "0", "--world-size", "1", *arguments],
        stdin=stdin,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def test_no_driver_is_one_line_and_exit_1():
    with zmq.Context() as context, context.socket(zmq.ROUTER) as unused:
        port = unused.bind_to_random_port("tcp://127.0.0.1")
    keeper = _start_keeper(port, "--join-timeout", "1")
    _, stderr = keeper.communicate(timeout=20)
    assert keeper.returncode == 1
    assert stderr.startswith("error: keeper of rank 0: no driver at")
    assert stderr.count("\n") == 1


def test_a_spawned_keeper_ends_with_its_parent_before_any_driver_answers():
    with zmq.Context() as context, context.socket(zmq.ROUTER) as unused:
        port = unused.bind_to_random_port("tcp://127.0.0.1")
    keeper = _start_keeper(port, "--until-stdin-closes", stdin=subprocess.PIPE)
    assert keeper.poll() is None
    keeper.stdin.close()
    assert keeper.wait(timeout=20) == 1
    keeper.stderr.close()


@pytest.mark.parametrize("ending", ["stop", "vanish", "terminate"])
def test_it_ends_with_the_driver(ending):
    context = zmq.Context()
    driver = context.socket(zmq.ROUTER)
    port = driver.bind_to_random_port("tcp://127.0.0.1")
    keeper = _start_keeper(port)
    try:
        assert driver.poll(20_000)
        identity, payload = driver.recv_multipart()
        hello = control.decode_for_driver(payload)
        assert (hello.rank, hello.world_size, hello.pid) == (0, 1, keeper.pid)
        assert hello.address == "127.0.0.1"
        if ending == "stop":
            driver.send_multipart([identity, control.encode(control.Stop())])
        elif ending == "terminate":
            keeper.terminate()
        else:
            context.destroy(linger=0)
        expected = {"stop": 0, "vanish": 1, "terminate": 128 + 15}[ending]
        assert keeper.wait(timeout=20) == expected
    finally:
        keeper.kill()
        keeper.communicate()
        context.destroy(linger=0)
