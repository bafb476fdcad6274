"""Slow stages are not dead ones: takes the core of a stage from it, by neighbours and by CPU
quotas, and looks whether it is named; and then stops it, which has to be seen all the same.

    python bench/slow_not_dead.py [MODEL] [--seconds 10]

SmolLM2 in float32 over three stages under load. Quotas take root and a cgroup file system that can
be written to; without, they are left out. Exit code 1: one was named that was slow, or one that was
stopped was not, within 2 seconds of when its step should have ended.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from chaos import FLAGS
from chaos_load import Load
from commands import script

from pipeserve.configs import make_config
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver

SLOW = 1
"""The stage."""
NAMED_S = 2.0
_PERIOD_US = 100_000
_CGROUPS = Path("/sys/fs/cgroup")
_BUSY = "while True: pass"


@contextlib.contextmanager
def neighbours(pid: int, number: int) -> Iterator[None]:
    """So many processes on the cores of that one, each as eager."""
    cores = os.sched_getaffinity(pid)
    busy = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(number)]
    try:
        for process in busy:
            os.sched_setaffinity(process.pid, cores)
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


@contextlib.contextmanager
def quota(pid: int, share: float) -> Iterator[None]:
    """Of one core, from now on. Raises OSError where there can be none."""
    is_v2 = (_CGROUPS / "cgroup.controllers").exists()
    above = _CGROUPS if is_v2 else _CGROUPS / "cpu"
    group = above / f"pipeserve-{os.getpid()}"
    group.mkdir()
    try:
        most_us = round(share * _PERIOD_US)
        if is_v2:
            (group / "cpu.max").write_text(f"{most_us} {_PERIOD_US}")
        else:
            (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(most_us))
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        with contextlib.suppress(OSError):  # it has ended
            (above / "cgroup.procs").write_text(str(pid))
        time.sleep(0.1)
        group.rmdir()


def runs(load: Load, seconds: float) -> int:
    """How many tokens come in that time; less, when a stage is lost."""
    until_s, num_tokens = time.monotonic() + seconds, 0
    while time.monotonic() < until_s and not load.driver.losses.trouble:
        load.refill()
        num_tokens += load.step()
    return num_tokens


def is_named(load: Load) -> float:
    """Seconds until a stage that is stopped now is."""
    os.kill(load.driver.stages[SLOW].pid, signal.SIGSTOP)
    began_s = time.monotonic()
    while not load.driver.losses.trouble and time.monotonic() < began_s + 60:
        load.refill()
        load.step()
    return time.monotonic() - began_s


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    config = make_config({}, {"model": options.model, **FLAGS})
    kinds = [("nobody beside it", contextlib.nullcontext())]
    with Driver(checkpoint_setup(config)) as driver:
        load, pid = Load(driver, 0), driver.stages[SLOW].pid
        kinds += [(f"{n} neighbours", neighbours(pid, n)) for n in (1, 3)]
        kinds += [(f"a quota of {share:.0%}", quota(pid, share)) for share in (0.5, 0.1)]
        runs(load, 5.0)
        for what, slowed in kinds:
            try:
                with slowed:
                    num_tokens = runs(load, options.seconds)
            except OSError as error:
                print(f"{what}: left out ({error})", flush=True)
                continue
            lost = driver.losses.trouble or "none"
            print(f"{what}: {num_tokens} tokens; lost: {lost}", flush=True)
        num_false = sum(driver.losses.counts)
        with neighbours(pid, 1):
            runs(load, 3.0)
            seconds = is_named(load)
        print(f"stopped beside a neighbour: named after {seconds:.2f} s: {driver.losses.trouble}")
    return 1 if num_false or seconds > NAMED_S + 1.0 else 0


if __name__ == "__main__":
    script(main)
