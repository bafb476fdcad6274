"""The keepers that one process starts, as children of its own: the driver those of all ranks, or
each process of a launched job those of its ranks.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_CLOSE_S = 5.0


class OwnRanks(NamedTuple):
    """Those whose keepers are started here."""

    ranks: range
    num_ranks: int
    """Of the whole pipeline."""
    first_local: int
    """The number of the first one among the ranks of this machine."""
    num_local: int
    """How many ranks this machine has."""

    @classmethod
    def all(cls, num_ranks: int) -> "OwnRanks":
        return cls(range(num_ranks), num_ranks, 0, num_ranks)

    def environment(self, rank: int) -> dict[str, str]:
        """That tells a rank's keeper its place."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(self.first_local + rank - self.ranks.start),
            "WORLD_SIZE": str(self.num_ranks),
            "LOCAL_WORLD_SIZE": str(self.num_local),
        }


class SpawnedKeepers:
    """Their processes."""

    def __init__(self) -> None:
        self.processes: dict[int, subprocess.Popen] = {}
        """By rank."""
        self._own = OwnRanks.all(0)
        self._command: list[str] = []
        self._secret = b""
        self._options: Mapping[str, Any] = {}

    def start(
        self, own: OwnRanks, address: str, secret: bytes, more: Sequence[str] = (), **options: Any
    ) -> None:
        """They join the driver at `address`. `more`: of their arguments; `options`: of `Popen`.
        Raises OSError."""
        self._own, self._secret, self._options = own, secret, options
        self._command = [
            sys.executable,
            *("-m", "pipeserve.stage.keeper_command"),
            *("--control", address, "--until-stdin-closes", *more),
        ]
        for rank in own.ranks:
            self.processes[rank] = self._spawn(rank)

    def start_again(self, rank: int) -> subprocess.Popen | None:
        """One in place of one that is gone, or that is stopped; nothing, where all were started by
        another launcher. Raises OSError."""
        if rank not in self.processes:
            return None
        _end([self.processes[rank]], wait_s=0.0)
        self.processes[rank] = self._spawn(rank)
        return self.processes[rank]

    def ended(self) -> list[tuple[int, subprocess.Popen]]:
        """Rank and process of those that have."""
        return [
            (rank, process)
            for rank, process in self.processes.items()
            if process.poll() is not None
        ]

    def end(self) -> None:
        """All of them. They get time to end their stages; killing one ends its stage too, by the
        parent-death signal. No SIGTERM: a server's keepers take none."""
        for process in self.processes.values():
            with contextlib.suppress(BrokenPipeError):  # it ended before it had read its secret
                process.stdin.close()  # for one that has not joined yet
        _end(list(self.processes.values()), _CLOSE_S)
        self.processes = {}

    def _spawn(self, rank: int) -> subprocess.Popen:
        process = subprocess.Popen(
            self._command,
            env={**os.environ, **self._own.environment(rank)},
            stdin=subprocess.PIPE,  # closes when this process ends, however it ends
            start_new_session=True,  # Ctrl-C reaches this process, which ends the rest in order
            **self._options,
        )
        with contextlib.suppress(BrokenPipeError):  # it has ended: `ended` tells
            process.stdin.write(self._secret.hex().encode() + b"\n")  # where nobody can read it
            process.stdin.flush()
        return process


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
