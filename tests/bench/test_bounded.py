"""Of a command that `bounded` runs nothing is left, however it ends."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
LEAVES_ONE = (
    "import subprocess, sys, time\n"
    "lost = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
    "open(sys.argv[1], 'w').write(str(lost.pid))\n"
)


def bounded(body: str, *args: str) -> subprocess.Popen:
    """A process of its own, for it adopts orphans."""
    code = "import sys\nfrom pathlib import Path\nimport bounded\n" + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        env={**os.environ, "PYTHONPATH": str(BENCH)},
        stdout=subprocess.PIPE,
        text=True,
    )


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("ending", "limit_s", "told"),
    [
        ("", 60, "done"),
        ("print('no such model'); sys.exit(3)", 60, "exit code 3"),
        ("time.sleep(60)", 3, "not done in 3 s"),
    ],
)
def test_what_a_command_started_ends_with_it(tmp_path, ending, limit_s, told):
    command = [sys.executable, "-c", LEAVES_ONE + ending, str(tmp_path / "pid")]
    body = f"""
        try:
            bounded.run({command!r}, Path(sys.argv[1]), {limit_s})
            print("done")
        except bounded.CommandError as error:
            print(error)
    """
    said, _ = bounded(body, str(tmp_path / "log")).communicate(timeout=60)
    assert told in said
    assert ("no such model" in said) == (told == "exit code 3")  # the end of its log
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_ctrl_c_ends_what_runs(tmp_path):
    pid_file = tmp_path / "pid"
    command = [sys.executable, "-c", LEAVES_ONE + "time.sleep(60)", str(pid_file)]
    process = bounded(f"bounded.run({command!r}, Path(sys.argv[1]), 60)", str(tmp_path / "log"))
    deadline = time.monotonic() + 30
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert not is_running(int(pid_file.read_text()))
