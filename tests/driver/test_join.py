"""Start and join: who belongs to the pipeline, what ends each wait, and whom it names."""

import ast
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import msgspec
import pytest
from local_fleet import NoKeepers

from pipeserve.addresses import split_address
from pipeserve.configs import make_config
from pipeserve.core.nouns import RequestId
from pipeserve.core.records import Fault
from pipeserve.core.topology import Topology
from pipeserve.driver import joining, spawned_keepers, starting, watching
from pipeserve.driver.driver import Driver
from pipeserve.driver.events import Gone, Lost
from pipeserve.driver.fleet import Fleet
from pipeserve.driver.gathering import gathering
from pipeserve.driver.loading import LoadWatch
from pipeserve.driver.waiting import wait_for_keepers
from pipeserve.errors import ConfigError, StageError
from pipeserve.launch import cli
from pipeserve.launch.run.emulated import emulated_setup
from pipeserve.launch.verbs.bench import run_items
from pipeserve.profiling.simulation.workloads import WorkItem
from pipeserve.wire import control
from pipeserve.wire.connecting import connect
from pipeserve.wire.secret import VARIABLE
from pipeserve.wire.sources import Sources
from pipeserve.wire.stage_job import StartStage

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parent.parent.parent
EMULATED = {"model": "llama2-7b", "device_profile": "a100-80gb-dgx", "max_model_len": 1024,
            "pipeline_parallel_size": 2, "device": "emulated"}  # fmt: skip
ITEMS = [WorkItem(prompt=(7,) * 40, max_tokens=3)]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def config_of(**flags):
    return make_config({}, EMULATED | flags)


def external(host="127.0.0.1", **flags):
    """A run whose keepers are started by hand."""
    flags = {"control": f"{host}:{free_port()}", "join_timeout": 30.0, **flags}
    return config_of(launcher="external", **flags)


@contextmanager
def keepers(*places, address, more=(), **environment):
    """Keepers of (rank, world size), as another launcher starts them."""
    started = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "pipeserve.launch.keeper",
                "--control",
                address,
                "--rank",
                str(rank),
                "--world-size",
                str(world),
                *more,
            ],
            env={**os.environ, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, world in places
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


@contextmanager
def opened(config, num_ranks=2):
    opened = Fleet(Topology(tuple((rank,) for rank in range(num_ranks))), config)
    try:
        yield opened
    finally:
        opened.close()


def receive_until(opened, is_so, seconds=20.0):
    until_s = time.monotonic() + seconds
    while not is_so() and time.monotonic() < until_s:
        opened.receive(0.05)
    assert is_so()


def loss_of(opened, rank, seconds=20.0):
    """Why a rank's stage is lost; and its keeper is gone."""
    came, until_s = [], time.monotonic() + seconds
    while Gone() not in [each.message for each in came] and time.monotonic() < until_s:
        came += [each for each in opened.receive(0.5) if isinstance(each.message, Lost | Gone)]
    lost, gone = came[-2:]
    assert lost.rank == gone.rank == rank and isinstance(gone.message, Gone)
    return lost.message.why


def serves(driver):
    (served,) = run_items(driver, ITEMS, "", map(RequestId, count()))
    return len(served.token_times_s) == ITEMS[0].max_tokens


def parts_of(driver):
    return [part.pid for part in (*driver.stages, *driver.fleet.keepers.values())]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def are_gone(pids, seconds=15.0):
    until_s = time.monotonic() + seconds
    while any(map(is_running, pids)) and time.monotonic() < until_s:
        time.sleep(0.02)
    return not any(map(is_running, pids))


def said_by(keeper):
    """Its one line."""
    _, said = keeper.communicate(timeout=20)
    assert said.count("\n") == 1, said
    return said


# ---- who belongs to it --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "world", "why"),
    [
        (5, 2, "there are ranks 0 to 1"),
        (-1, 2, "there are ranks 0 to 1"),
        (0, 3, "is one of 3, and the pipeline has 2 stages; make --pipeline-parallel-size times"),
        (0, 2, "that rank has joined already, from"),
    ],
)
def test_a_keeper_that_does_not_belong_is_told_so_and_the_run_goes_on(capsys, rank, world, why):
    config = external()
    with opened(config) as fleet, keepers((0, 2), address=config.control) as (first,):
        receive_until(fleet, lambda: fleet.keepers)
        with keepers((rank, world), address=config.control) as (stranger,):
            receive_until(fleet, lambda: stranger.poll() is not None)
            assert stranger.returncode == 2
            told = said_by(stranger)
        address = f"error: keeper of rank {rank}: not wanted by the driver at {config.control}: "
        assert told.startswith(address) and why in told
        with keepers((1, 2), address=config.control) as (second,):
            wait_for_keepers(fleet, print)
            assert [fleet.keepers[r].pid for r in range(2)] == [first.pid, second.pid]
            fleet.close()
            assert first.wait(10) == second.wait(10) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if why in line]
    assert len(said) == 1 and said[0].startswith("warning: 127.0.0.1 was turned away from")


OTHER_VERSION = (
    "import pipeserve; pipeserve.__version__ = '9.9'; from pipeserve.launch.keeper import main; "
    "import sys; sys.argv[1:] = ['--control', '{}', '--rank', '0', '--world-size', '1']; main()"
)


def test_a_keeper_of_another_version_is_told_so(capsys):
    config = external(join_timeout=5.0)
    command = [sys.executable, "-c", OTHER_VERSION.format(config.control)]
    with opened(config, 1) as fleet:
        keeper = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        receive_until(fleet, lambda: keeper.poll() is not None)
    told = said_by(keeper)
    assert keeper.returncode == 2
    assert told.startswith("error: keeper of rank 0: refused by the driver at")
    assert "runs pipeserve 9.9, and who listens 0." in told
    assert "9.9" in capsys.readouterr().err


def test_another_secret_is_refused_and_in_the_end_those_who_did_not_come_are_named(
    tmp_path, capsys
):
    secret, other = tmp_path / "secret", tmp_path / "other"
    for file, content in ((secret, "right\n"), (other, "wrong\n")):
        file.touch(0o600)
        file.write_text(content)
    config = external(control_secret=str(secret), join_timeout=4.0, pipeline_parallel_size=3)
    address = config.control
    with (
        opened(config, 3) as fleet,
        keepers((0, 3), address=address, more=("--control-secret", str(other))) as (wrong,),
        keepers((1, 3), address=address, **{VARIABLE: "right"}) as (right,),
        keepers((2, 3), address=address) as (without,),
    ):
        with pytest.raises(StageError, match=rf"no keeper of ranks 0, 2 joined {address}") as error:
            wait_for_keepers(fleet, print)
        assert "within 4 s; 2 were turned away, the last: the secrets differ" in str(error.value)
        assert "\n" not in str(error.value)
        assert set(fleet.keepers) == {1} and fleet.keepers[1].pid == right.pid
        for keeper in (wrong, without):
            assert keeper.wait(10) == 2
            assert "the secrets differ; give driver and keepers the same --control-secret" in (
                said_by(keeper)
            )
    said = [line for line in capsys.readouterr().err.splitlines() if "secrets differ" in line]
    assert len(said) == 2 and "2 times in all" in said[1]


def test_when_nobody_comes_the_wait_ends():
    config = external(join_timeout=0.2, pipeline_parallel_size=1)
    with (
        opened(config, 1) as fleet,
        pytest.raises(StageError, match=r"^no keeper of rank 0 joined"),
    ):
        wait_for_keepers(fleet, print)


# ---- where one listens --------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["0.0.0.0:{}", "[::]:{}", ":::{}", "8.8.8.8:{}"])
def test_beyond_this_machine_without_a_secret_is_one_line(capsys, monkeypatch, address):
    monkeypatch.delenv(VARIABLE, raising=False)
    run = ["bench", "llama2-7b", "--device-profile", "a100-80gb-dgx", "--max-model-len", "1024"]
    run += ["--device", "emulated", "-pp", "2", "--num-prompts", "2", "--control"]
    assert cli.main([*run, address.format(free_port())]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    remedy = "[::1]:29600" if address.startswith(":") else "--control-secret FILE"
    assert remedy in line


def test_a_keeper_of_another_machine_without_a_secret_is_one_line(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with keepers((0, 1), address="203.0.113.7:29600") as (keeper,):
        assert keeper.wait(20) == 2
        assert "takes a shared secret: give driver and keepers the same" in said_by(keeper)
    with keepers((0, 1), address="nowhere") as (keeper,):
        assert keeper.wait(20) == 2
        assert "is not HOST:PORT" in said_by(keeper)


@pytest.mark.parametrize(
    ("host", "reached"),
    [("0.0.0.0", "127.0.0.1"), ("[::]", "[::1]"), ("localhost", "localhost")],
)
def test_stages_are_told_what_they_can_reach(monkeypatch, host, reached):
    """The address by which their keeper reached the driver, and never a wildcard."""
    monkeypatch.setenv(VARIABLE, "of this run")
    config = external(host)
    port = config.control.rpartition(":")[2]
    address = f"{reached}:{port}"
    with keepers((0, 2), (1, 2), address=address), Driver(emulated_setup(config)) as driver:
        assert serves(driver)
        told = {keeper.address for keeper in driver.fleet.keepers.values()}
        assert told <= {"127.0.0.1", "::1"}
        for stage in driver.stages:
            environment = Path(f"/proc/{stage.pid}/environ").read_bytes()
            command = Path(f"/proc/{stage.pid}/cmdline").read_bytes()
            assert b"of this run" not in environment + command


@pytest.mark.parametrize("host", [None, "127.0.0.1", "[::1]", "localhost"])
def test_keepers_that_the_driver_starts_share_a_secret_of_the_run(monkeypatch, host):
    monkeypatch.delenv(VARIABLE, raising=False)
    found = set()
    for _ in range(2):
        config = config_of(control=host and f"{host}:{free_port()}")
        fleet = Fleet(Topology(((0,),)), config, NoKeepers())
        found.add(fleet.secret)
        fleet.close()
    assert len(found) == 2 and {*map(len, found)} == {32}


def test_a_stage_that_other_machines_cannot_reach_is_an_error():
    with opened(config_of(join_timeout=30.0)) as fleet:
        wait_for_keepers(fleet, print)
        fleet.keepers[1] = msgspec.structs.replace(
            fleet.keepers[1], boot_id="b", address="10.0.0.2"
        )
        with pytest.raises(ConfigError, match=r"rank 0 on .* joined at 127\.0\.0\.1, where the"):
            joining.check_addresses(fleet.keepers, fleet.address)


@pytest.mark.parametrize("control", ["nowhere.invalid:29600", "203.0.113.7:29600"])
def test_an_address_that_is_not_here_is_one_line(monkeypatch, control):
    monkeypatch.setenv(VARIABLE, "of this run")
    with pytest.raises(ConfigError, match=f"^--control {control}: "):
        Fleet(Topology(((0,),)), config_of(control=control))


# ---- before it is known what will run -----------------------------------------------------------


@contextmanager
def joined_early(config):
    """What makes the driver's fleet, whose keepers have joined while its model is looked for."""
    with gathering(config) as make:
        fleet, until_s = make(None, config), time.monotonic() + 30
        while len(fleet.keepers) < 2 and time.monotonic() < until_s:
            time.sleep(0.02)
        assert len(fleet.keepers) == 2
        yield make


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_signal_as_the_fleet_begins_to_gather_leaves_nothing(monkeypatch, has_begun):
    """Such as comes while a thread is being started; one that nobody ends would keep the process
    for ever."""
    start, threads = threading.Thread.start, set(threading.enumerate())

    def interrupted(thread):
        if has_begun:
            start(thread)
        raise SystemExit(143)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    config = external(pipeline_parallel_size=1)
    with pytest.raises(SystemExit), gathering(config):
        raise AssertionError("it goes on")
    assert set(threading.enumerate()) <= threads
    with socket.create_server(split_address(config.control)):  # nobody else listens there
        pass


def test_keepers_join_while_the_model_is_fetched():
    config = external()
    with keepers((0, 2), (1, 2), address=config.control):
        with joined_early(config) as fleet:
            setup = emulated_setup(config)
        with Driver(setup, fleet=fleet) as driver:
            assert serves(driver)


def test_a_driver_that_fails_before_anything_runs_tells_the_other_machines_why():
    """sgl-project/sglang#3099: the other machine's process stays."""
    config = external()
    with keepers((0, 2), (1, 2), address=config.control) as started:
        with pytest.raises(ConfigError, match="no such model"), joined_early(config) as make:
            there = make(None, config).keepers
            there[1] = msgspec.structs.replace(there[1], boot_id="another machine's")
            raise ConfigError("no such model; give another")
        ended = [(process.communicate(timeout=10)[1], process.returncode) for process in started]
    line = f"the driver at {config.control} has ended the run: no such model; give another"
    assert ended == [("", 1), (f"error: keeper of rank 1: {line}\n", 1)]


# ---- loading ------------------------------------------------------------------------------------

STAGE = """
import os, signal, sys, time
from pipeserve.wire import control
from pipeserve.launch.emulated.stage import EmulatedCompute
from pipeserve.stage.serve import serve

def load(job, tell):
    if job.stage == 1:
        {what}
    return EmulatedCompute.load(job, tell)

serve(load)
"""
TELL = "tell(control.Loading({0}, 10**9))"
HANGS = {
    "sleeps": ("time.sleep(60)", "before its first weight"),
    "half way": (f"{TELL.format(250_000_000)}; time.sleep(60)", "with 0.25 of 1.00 GB of weights"),
    "says the same": (
        f"[({TELL.format(5)}, time.sleep(0.1)) for _ in range(600)]",
        "with 0.00 of 1.00 GB",
    ),
}
GOES_ON = {
    "tells": f"[({TELL.format('i')}, time.sleep(0.2)) for i in range(15)]",
    "reads": "f = open('/dev/zero', 'rb', 0); [(f.read(9), time.sleep(0.2)) for i in range(15)]",
}


def setup_of(tmp_path, monkeypatch, what, **flags):
    """Stages, of which the second does something else while it loads."""
    (tmp_path / "odd_stage.py").write_text(STAGE.format(what=what))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    return replace(emulated_setup(config_of(**flags)), module="odd_stage")


def children():
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            _, parent, *_ = path.read_text().rpartition(")")[2].split()
            found += [int(path.parent.name)] * (int(parent) == os.getpid())
    return found


@pytest.mark.parametrize(("what", "where"), HANGS.values(), ids=HANGS)
def test_a_stage_that_hangs_while_it_loads_is_named_and_ended(tmp_path, monkeypatch, what, where):
    setup = setup_of(tmp_path, monkeypatch, what, load_timeout=2.0)
    with pytest.raises(StageError) as error:
        Driver(setup)
    assert str(error.value).startswith(f"stage 1 on {socket.gethostname()} has stopped loading, ")
    assert where in str(error.value)
    assert "moved no byte for 2 s; look at its disk, or raise --load-timeout" in str(error.value)
    assert not children()


def test_a_stage_that_is_stopped_while_it_loads_is_not_waited_for(tmp_path, monkeypatch):
    setup = setup_of(tmp_path, monkeypatch, "os.kill(os.getpid(), signal.SIGSTOP)")
    with pytest.raises(StageError) as error:
        Driver(setup)
    said = f"stage 1 on {socket.gethostname()} is stopped, by a signal (SIGSTOP)"
    assert str(error.value) == said
    assert not children()


@pytest.mark.parametrize("what", GOES_ON.values(), ids=GOES_ON)
def test_a_slow_one_is_waited_for(tmp_path, monkeypatch, what):
    """As long as bytes move (vllm#35547): 3 seconds here, of a timeout of 2."""
    setup = setup_of(tmp_path, monkeypatch, what, load_timeout=2.0)
    with Driver(setup) as driver:
        assert serves(driver)


@pytest.mark.parametrize("code", [0, 3])
def test_a_stage_that_goes_without_a_word_is_named(tmp_path, monkeypatch, code):
    with pytest.raises(StageError, match=rf"stage 1 \(pid \d+ on .*\) died: exit code {code}"):
        Driver(setup_of(tmp_path, monkeypatch, f"sys.stdout.flush(); os._exit({code})"))


def test_which_stage_has_stopped_is_a_matter_of_bytes():
    watch = LoadWatch(3, 100.0)
    assert watch.stopped([0, 1, 2], 60.0, 160.0) is None
    assert watch.stopped([0, 1, 2], 60.0, 160.1) == 0
    watch.take(0, control.Loading(0, 100), 150.0)  # it has found its weights
    watch.moved(1, 4096, 140.0)
    assert watch.stopped([0, 1, 2], 60.0, 160.1) == 2
    assert watch.stopped([0, 1], 60.0, 160.1) is None
    watch.take(0, control.Loading(0, 100), 205.0)
    watch.moved(1, 4096, 205.0)
    assert watch.stopped([0, 1], 60.0, 205.0) == 1
    assert watch.stopped([0], 60.0, 215.0) == 0
    watch.take(0, control.Loading(1, 100), 215.0)
    assert watch.stopped([0], 60.0, 216.0) is None
    assert watch.stopped([], 60.0, 1e9) is None


# ---- silence ------------------------------------------------------------------------------------


def test_a_silent_keeper_is_named_and_nothing_is_left(monkeypatch):
    monkeypatch.setattr(spawned_keepers, "_CLOSE_S", 0.5)
    told = []
    setup = emulated_setup(config_of(heartbeat_interval=0.8, restart=False))
    with Driver(setup, record=told.append) as driver:
        assert serves(driver)
        time.sleep(1.0)  # a driver that rests has asked nobody
        assert serves(driver)
        parts = parts_of(driver)
        os.kill(driver.fleet.keepers[1].pid, signal.SIGSTOP)
        with pytest.raises(StageError, match=r"keeper of stage 1 on .* for 0\.\d s; is it stopped"):
            while True:
                serves(driver)
        assert [entry.stage for entry in told if isinstance(entry, Fault)] == [1]
    assert are_gone(parts)


def test_a_silent_keeper_is_named_before_its_stage_is_there_too():
    config = external(heartbeat_interval=0.8)
    with opened(config) as fleet, keepers((0, 2), (1, 2), address=config.control) as (_, second):
        wait_for_keepers(fleet, print)
        second.send_signal(signal.SIGSTOP)
        assert loss_of(fleet, 1).startswith("nothing heard from the keeper of stage 1 on ")


def test_a_keeper_that_dies_once_it_has_joined_is_named(monkeypatch):
    monkeypatch.setattr(watching, "LAST_WORD_S", 0.2)
    config = external()
    with opened(config) as own, keepers((0, 2), (1, 2), address=config.control) as (_, second):
        wait_for_keepers(own, print)
        second.kill()
        assert re.match(r"the keeper of stage 1 on .* hung up", loss_of(own, 1))
        assert set(own.keepers) == {0}


def test_a_stopped_stage_that_is_asked_for_its_memory_is_named(monkeypatch):
    monkeypatch.setattr(starting, "ANSWER_S", 1.0)
    with Driver(emulated_setup(config_of())) as driver:
        parts = parts_of(driver)
        os.kill(driver.stages[0].pid, signal.SIGSTOP)
        with pytest.raises(StageError, match=r"stage 0 \(on .*\) has not said what memory"):
            driver.refresh_memory()
    assert are_gone(parts)


@pytest.mark.parametrize(
    "said",
    [
        control.encode(control.Memory(1), 0),
        # In place of the reason of an end: a list in a list in a list.
        control.encode(control.StageExited(1, 0), 0)[:-1] + b"\x91" * 5000 + b"\xc0",
    ],
)
def test_what_a_keeper_says_that_cannot_be_costs_its_connection(monkeypatch, capsys, said):
    """And then it is missed, by name."""
    monkeypatch.setattr(watching, "LAST_WORD_S", 0.1)
    with opened(external(), 1) as own:
        sources = Sources(own.secret)
        keeper = connect(own.address, sources, "keeper")
        keeper.send(control.encode(control.KeeperHello(0, 1, "afar", "", 0, ""), 0))
        keeper.send(said)
        until_s = time.monotonic() + 20.0
        while not keeper.has_ended and time.monotonic() < until_s:
            own.receive(0.01)
            for source in sources.ready(0):
                source.receive()
        assert re.match(r"the keeper of stage 0 on afar hung up", loss_of(own, 0))
        sources.close()
    assert "what it says is not understood" in capsys.readouterr().err


def test_strangers_while_keepers_are_waited_for():
    config = external()
    host, port = config.control.split(":")
    with opened(config) as fleet:
        crowd = [socket.create_connection((host, int(port))) for _ in range(300)]
        for number, stranger in enumerate(crowd):
            stranger.sendall((b"", b"GET / HTTP/1.1\r\n\r\n", b"ppsv")[number % 3])
        with keepers((0, 2), (1, 2), address=config.control):
            wait_for_keepers(fleet, print)
            assert set(fleet.keepers) == {0, 1}
            fleet.close()
        for stranger in crowd:
            stranger.close()


# ---- processes ----------------------------------------------------------------------------------


def test_no_process_with_threads_is_forked():
    """No code of ours runs between fork and exec, and the keeper has one thread."""
    for path in (
        *ROOT.glob("pipeserve/*.py"),
        *ROOT.glob("launch/*.py"),
        *ROOT.glob("stages/*.py"),
    ):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            assert getattr(node, "arg", None) != "preexec_fn", path
            assert not (isinstance(node, ast.Attribute) and node.attr == "fork"), path
    with opened(config_of(), 1) as fleet:
        wait_for_keepers(fleet, print)
        assert len(os.listdir(f"/proc/{fleet.keepers[0].pid}/task")) == 1


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.05, 0.1, 0.3])
def test_a_killed_keeper_leaves_no_stage_at_whatever_moment(after_s):
    """Before the stage has asked to end with it, and after."""
    config = external()
    setup = emulated_setup(config)
    with (
        opened(config, 1) as fleet,
        keepers((0, 1), address=config.control) as (keeper,),
    ):
        wait_for_keepers(fleet, print)
        job = StartStage(
            0, 1, setup.module, setup.works[0], f"/{fleet.local_name}", "127.0.0.1", False
        )
        fleet.start([job])
        own = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children")
        until_s = time.monotonic() + 10
        while not own.read_text() and time.monotonic() < until_s:
            pass
        (stage,) = map(int, own.read_text().split())
        time.sleep(after_s)
        keeper.kill()
        assert are_gone([stage])


def test_a_forked_process_neither_ends_nor_uses_the_pipeline():
    """Such as one of a user's own workers, which leaves the `with` by sys.exit()."""
    with Driver(emulated_setup(config_of())) as driver:
        child = os.fork()
        if child == 0:
            try:
                with pytest.raises(StageError, match="belongs to the process that started it"):
                    driver.outputs(0.0)
                driver.close()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        serves(driver)


def test_a_killed_driver_leaves_nothing_though_a_process_forked_from_it_goes_on():
    """Which holds the other ends of everything that the keepers could see closed (ATOM#1511,
    gpustack#2434: workers outlive their parent, and keep memory and ports)."""
    read, write = os.pipe()
    driver_pid = os.fork()
    if driver_pid == 0:
        try:
            driver = Driver(emulated_setup(config_of()))
            forked = os.fork()
            if forked == 0:
                time.sleep(60)
            os.write(write, " ".join(map(str, [forked, *parts_of(driver)])).encode())
            time.sleep(60)
        finally:
            os._exit(1)
    forked, *parts = map(int, os.read(read, 1000).split())
    try:
        os.kill(driver_pid, signal.SIGKILL)
        os.waitpid(driver_pid, 0)
        assert are_gone(parts, seconds=5.0)
    finally:
        os.kill(forked, signal.SIGKILL)
        os.close(read), os.close(write)


def test_a_keeper_that_ends_before_it_has_its_secret(monkeypatch):
    """What was written for it cannot be sent when its pipe is closed either."""
    monkeypatch.setattr(spawned_keepers.sys, "executable", "/bin/true")
    popen = subprocess.Popen

    def slow(*arguments, **options):
        process = popen(*arguments, **options)
        process.wait()
        return process

    monkeypatch.setattr(spawned_keepers.subprocess, "Popen", slow)
    with opened(config_of()) as own, pytest.raises(StageError, match=r"keeper of stage 0 .* ended"):
        wait_for_keepers(own, print)
