"""Commands that end in time, and of which nothing is left: not when they are done, not when they
fail, not on Ctrl-C.

A command may start others in sessions of their own and lose them, so this process adopts orphans,
and what has come to descend from it since a command began is ended with the command.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_GRACE_S = 20.0
"""For a command to end what it started by itself."""
_LOOKS_AGAIN_S = 0.05
_LAST_LINES = 15


class CommandError(Exception):
    """What to tell the user of a command that failed or took too long."""


def run(
    command: Sequence[str], log: Path, limit_s: float, env: Mapping[str, str] | None = None
) -> None:
    """Until it is done. Raises CommandError where it fails or is not done in `limit_s`. What it
    prints goes to `log`."""
    with started(command, log, env) as process:
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise CommandError(f"not done in {limit_s:g} s: {told(command, log)}") from None
        if code:
            raise CommandError(f"exit code {code}: {told(command, log)}")


@contextmanager
def started(
    command: Sequence[str], log: Path, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen]:
    """A command that runs while this is entered."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = _children(os.getpid())
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process, which ends the rest in order
        )
        try:
            yield process
        finally:
            with _undisturbed():
                _end(process, before)


def told(command: Sequence[str], log: Path) -> str:
    """The command, and the end of what it said."""
    lines = log.read_text(errors="replace").rstrip().splitlines()[-_LAST_LINES:]
    return "\n".join([" ".join(command), *lines])


def _end(process: subprocess.Popen, before: set[int]) -> None:
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    gives_up_s = time.monotonic() + _GRACE_S  # of one that the kernel does not let go
    while (left := _children(os.getpid()) - before) and time.monotonic() < gives_up_s:
        for pid in {*left, *(each for root in left for each in _descendants(root))}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if process.poll() is not None:
            _reap(left - {process.pid})
        time.sleep(_LOOKS_AGAIN_S)


def _reap(pids: set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def _children(parent: int) -> set[int]:
    return {pid for pid, its_parent in _parents().items() if its_parent == parent}


def _descendants(root: int) -> set[int]:
    parents, found, new = _parents(), set(), {root}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return found


def _parents() -> dict[int, int]:
    """Of every process."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            state_and_parent = file.read_text().rpartition(")")[2].split()
            parents[int(file.parent.name)] = int(state_and_parent[1])
    return parents


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Whoever presses Ctrl-C twice still leaves nothing behind."""
    endings = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {each: signal.signal(each, signal.SIG_IGN) for each in endings}
    try:
        yield
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
