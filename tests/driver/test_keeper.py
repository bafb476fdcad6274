"""The keeper ends when there is no driver, or the driver is gone."""

import signal
import socket
import subprocess
import sys
import time

import pytest

from pipeserve.wire import control
from pipeserve.wire.listener import Listener
from pipeserve.wire.sources import Sources

pytestmark = pytest.mark.processes


def _start_keeper(address, *arguments, stdin=None):
    return subprocess.Popen(
        [sys.executable, "-m", "pipeserve.launch.keeper", "--control", address,
         "--rank", "0", "--world-size", "1", *arguments],
        stdin=stdin,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


@pytest.fixture
def nobody():
    """The address of a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_no_driver_is_one_line_and_exit_1(nobody):
    keeper = _start_keeper(nobody, "--join-timeout", "1")
    _, stderr = keeper.communicate(timeout=20)
    assert keeper.returncode == 1
    assert stderr.startswith("error: keeper of rank 0: no driver at")
    assert "refused" in stderr
    assert stderr.count("\n") == 1


def test_a_spawned_keeper_ends_with_its_parent_before_any_driver_answers(nobody):
    keeper = _start_keeper(nobody, "--until-stdin-closes", stdin=subprocess.PIPE)
    keeper.stdin.write("00\n")
    keeper.stdin.flush()
    assert keeper.poll() is None
    keeper.stdin.close()
    assert keeper.wait(timeout=20) == 1
    keeper.stderr.close()


class Driver:
    """As a keeper sees it."""

    def __init__(self, host="127.0.0.1", secret=b""):
        self.sources = Sources(secret)
        listener = Listener(host, self.sources, ("keeper",))
        self.address = listener.address.partition("/")[0]
        self.keeper = None

    def hears(self, decode):
        """The next message."""
        while True:
            ready = self.sources.ready(20_000)
            assert ready, "nothing came"
            for source in ready:
                for message in source.receive():
                    self.keeper = source
                    return decode(message)

    def says(self, message):
        self.keeper.send(control.encode(message, 3))


@pytest.fixture(params=["127.0.0.1", "::1"])
def driver(request):
    driver = Driver(request.param)
    yield driver
    driver.sources.close()


@pytest.mark.parametrize("ending", ["stop", "vanish", "asked twice", "asked", "not wanted"])
def test_it_ends_with_the_driver(driver, ending):
    keeper = _start_keeper(driver.address)
    try:
        _, hello = driver.hears(control.decode_keeper_hello)
        assert (hello.rank, hello.world_size, hello.pid) == (0, 1, keeper.pid)
        assert hello.address in ("127.0.0.1", "::1")
        driver.says(control.Heartbeat(1.5))
        epoch, pong = driver.hears(control.decode_from_keeper)
        assert (epoch, pong.sent_s, pong.num_moved) == (0, 1.5, 0)  # it has no stage yet
        if ending == "stop":
            driver.says(control.Stop())
        elif ending in ("asked", "asked twice"):  # its driver may have been asked, too, and drain
            keeper.terminate()
            keeper.send_signal(signal.SIGINT)
            time.sleep(1.2)
            driver.says(control.Heartbeat(2.5))
            assert driver.hears(control.decode_from_keeper)[1].sent_s == 2.5
            if ending == "asked twice":
                keeper.terminate()
            else:
                driver.says(control.Stop())
        elif ending == "not wanted":
            driver.says(control.NotWanted("that rank has joined already"))
        else:
            driver.sources.close()
        expected = {"vanish": 1, "asked twice": 128 + 15, "not wanted": 2}.get(ending, 0)
        _, stderr = keeper.communicate(timeout=20)
        assert keeper.returncode == expected
        reason = f"not wanted by the driver at {driver.address}: that rank has joined already"
        assert stderr == (f"error: keeper of rank 0: {reason}\n" if expected == 2 else "")
    finally:
        keeper.kill()
        keeper.communicate()
