"""What several test files share, and what the tiers need (tiers.py)."""

import json
import os
import resource
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples each time, or what fails would be nobody's change. Others are looked for by
#   ./test --hypothesis-profile=others tests/core
# How long one takes is no failure: what else runs on the machine decides that.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("others", patient)
settings.register_profile("the same", patient, derandomize=True)
settings.load_profile("the same")

# In the background of a shell SIGINT is ignored, and by whatever is started there: tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

if "PIPESERVE_TESTS_WITHOUT_TORCH" in os.environ:
    sys.modules["torch"] = None  # an import of it now raises


# ---- tiers --------------------------------------------------------------------------------------

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # A core for each, or stages of one would make those of another wait.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

NUM_TRIES = 3
STAGES = (
    "pipeserve",
    "pipeserve.launch.cli",
    "pipeserve.launch.keeper",
    "pipeserve.launch.run.driver_process",
    "pipeserve.stage.keeper_command",
    "torch.distributed.run",
)
"""Programs that run stages as processes, or keepers of such."""

running_test: list[pytest.Item] = []


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("timing"):
            item.add_marker(pytest.mark.flaky(reruns=NUM_TRIES - 1))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    running_test[:] = [item]


def processes_are_marked(event, arguments):
    """A test that runs stages as processes says so, or the tiers would not know."""
    if event == "subprocess.Popen" and running_test:
        (item,) = running_test
        command = " ".join(map(str, arguments[1])) + " "
        starts_stages = any(f"-m {name} " in command for name in STAGES)
        if starts_stages and not any(map(item.get_closest_marker, ("processes", "timing"))):
            raise AssertionError(f"{item.nodeid} starts stages: mark it with `processes`")


sys.addaudithook(processes_are_marked)


def cpu_s():
    """Of this process and of all that it started and waited for."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(who)[:2]) for who in whose)


last_cpu_s = cpu_s()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Tells with each step of a test the CPU time since the step before."""
    global last_cpu_s
    report = yield
    before_s, last_cpu_s = last_cpu_s, cpu_s()
    report.cpu_s = last_cpu_s - before_s
    return report


def pytest_terminal_summary(terminalreporter, config):
    """For tiers.py: how many tests came to what, and the seconds (wall, CPU) that each took."""
    path = os.environ.get("PIPESERVE_TESTS_TALLY")
    if path is None or hasattr(config, "workerinput"):
        return
    outcomes = {name: len(them) for name, them in terminalreporter.stats.items() if name}
    took = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds = took.setdefault(report.nodeid, [0.0, 0.0])
                seconds[0] += report.duration
                seconds[1] += getattr(report, "cpu_s", 0.0)  # none of a worker that has died
    Path(path).write_text(json.dumps({"outcomes": outcomes, "took": took}))


# ---- fixtures -----------------------------------------------------------------------------------


@pytest.fixture
def no_collections(monkeypatch):
    """For commands within the tests' own process: each begins with a collection of all garbage,
    which takes ten times as long as the command where a thousand tests have left theirs."""
    from pipeserve.launch.run import record

    monkeypatch.setattr(record, "no_pauses", lambda: nullcontext(lambda: None))


@pytest.fixture(scope="session")
def one_thread():
    """Torch on one thread: tiny products only lose time on more, and other tests want the cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
