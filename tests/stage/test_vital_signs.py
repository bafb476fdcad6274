"""What the kernel says of a process tells one that is slow from one that does nothing."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

from pipeserve.stage.vital_signs import VitalSigns, Watched


@contextmanager
def running(code, cores=None):
    process = subprocess.Popen([sys.executable, "-c", f"print(flush=True)\n{code}"], stdout=-1)
    process.stdout.readline()
    if cores is not None:
        os.sched_setaffinity(process.pid, cores)
    try:
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def after(pid, seconds):
    """What changes in that time."""
    watched = Watched(pid)
    before = watched.signs()
    time.sleep(seconds)
    now = watched.signs()
    watched.close()
    return now.ran_s - before.ran_s, now.stood_s - before.stood_s, now.state


def test_one_that_sleeps_and_one_that_is_stopped_use_nothing():
    with running("import time; time.sleep(60)") as pid:
        assert Watched(pid).signs().num_moved > 0
        ran_s, stood_s, state = after(pid, 0.3)
        assert ran_s < 0.01 and stood_s < 0.1 and state == "S"
    with running("while True: pass") as pid:
        os.kill(pid, signal.SIGSTOP)
        watched = Watched(pid)
        while watched.signs().state != "T":
            time.sleep(0.01)
        assert after(pid, 0.3) == (0.0, 0.0, "T")


def test_two_that_share_a_core_run_and_stand_in_line():
    core = {min(os.sched_getaffinity(0))}
    with running("while True: pass", core) as pid, running("while True: pass", core):
        ran_s, stood_s, _ = after(pid, 1.0)
        assert ran_s > 0.0 and stood_s > 0.2
        assert ran_s + stood_s > 0.8


def test_one_that_has_ended_gives_no_sign():
    with running("import time; time.sleep(60)") as pid:
        watched = Watched(pid)
        assert watched.signs() != VitalSigns()
    assert watched.signs() == Watched(pid).signs() == VitalSigns()


def test_all_its_threads_count():
    two = "from threading import Thread\nThread(target=lambda: [0 for _ in iter(int, 1)]).start()"
    with running(f"{two}\nimport time; time.sleep(60)") as pid:
        ran_s, stood_s, _ = after(pid, 0.5)
        assert ran_s + stood_s > 0.2


def test_one_file_that_may_not_be_read_takes_nothing_from_the_others(monkeypatch):
    """As in some containers (nginx/agent#383, netdata#779): or a stage that is stopped there would
    not be found, and one that is slow be taken for dead (hermes-agent#110352)."""
    really = os.open

    def refuses(path, flags):
        if path.endswith("/io"):
            raise PermissionError
        return really(path, flags)

    monkeypatch.setattr(os, "open", refuses)
    signs = Watched(os.getpid()).signs()
    assert signs.num_moved == 0 and signs.ran_s > 0 and signs.state == "R"
