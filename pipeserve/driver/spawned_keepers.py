"""The keepers that the driver starts itself, one a rank, on its own machine."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence

_CLOSE_S = 5.0


class SpawnedKeepers:
    """Their processes."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen] = []
        self._driver: tuple[int, str, bytes] | None = None
        """What each is told, with its rank."""

    def start(self, num_ranks: int, address: str, secret: bytes) -> None:
        """They join the driver at `address`. Raises OSError."""
        self._driver = num_ranks, address, secret
        for rank in range(num_ranks):
            self._processes.append(_spawn(rank, *self._driver))

    def start_again(self, rank: int) -> None:
        """One in place of one that is gone, or that is stopped; nothing, where all were started by
        another launcher. Raises OSError."""
        if self._processes:
            _end([self._processes[rank]], wait_s=0.0)
            self._processes[rank] = _spawn(rank, *self._driver)

    def ended(self) -> list[tuple[int, subprocess.Popen]]:
        """Rank and process of those that have."""
        return [
            (rank, process)
            for rank, process in enumerate(self._processes)
            if process.poll() is not None
        ]

    def end(self) -> None:
        """All of them. They get time to end their stages; killing one ends its stage too, by the
        parent-death signal. No SIGTERM: a server's keepers take none."""
        for process in self._processes:
            with contextlib.suppress(BrokenPipeError):  # it ended before it had read its secret
                process.stdin.close()  # for one that has not joined yet
        _end(self._processes, _CLOSE_S)
        self._processes = []


def _end(processes: Sequence[subprocess.Popen], wait_s: float) -> None:
    """Killed are those that have not ended by then."""
    deadline = time.monotonic() + wait_s
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def _spawn(rank: int, num_ranks: int, address: str, secret: bytes) -> subprocess.Popen:
    process = subprocess.Popen(
        [
            sys.executable,
            *("-m", "pipeserve.stage.keeper_command"),
            *("--control", address, "--until-stdin-closes"),
        ],
        env={
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
        },
        stdin=subprocess.PIPE,  # closes when this process ends, however it ends
        start_new_session=True,  # Ctrl-C reaches the driver, which ends the rest in order
    )
    with contextlib.suppress(BrokenPipeError):  # it has ended: `ended` tells
        process.stdin.write(secret.hex().encode() + b"\n")  # where no other process can read it
        process.stdin.flush()
    return process
