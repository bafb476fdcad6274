"""The keepers of one process of a job: what they and their stages say goes to stderr with the rank
ahead of it, and into a file, and one that is killed is started again.
"""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from pipeserve.driver.spawned_keepers import OwnRanks, SpawnedKeepers
from pipeserve.errors import ConfigError

_MOST_RESTARTS = 5
"""Of one keeper. The driver gives up sooner."""


class RankKeepers:
    """Of the ranks of this process, until `end`."""

    def __init__(
        self, own: OwnRanks, address: str, secret: bytes, more: Sequence[str], log_dir: str | None
    ) -> None:
        """They look for the driver at `address`. `more`: of their arguments. Raises ConfigError
        where there can be no files in `log_dir`."""
        self.exit_codes: dict[int, int] = {}
        """Of the ranks whose keeper has ended for good."""
        self._files = _open_files(own, log_dir)
        self._is_ending = False
        self._lock = threading.Lock()
        """Held by who starts and ends keepers."""
        self._spawned = SpawnedKeepers()
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self._spawned.start(own, address, secret, more, **out)
        self._threads = [
            threading.Thread(target=self._follow, args=entry, daemon=True)
            for entry in self._spawned.processes.items()
        ]
        for thread in self._threads:
            thread.start()

    def wait(self, timeout_s: float | None = None) -> int:
        """Until all have ended; returns what this process is to exit with."""
        for thread in self._threads:
            thread.join(timeout_s)
        return max(self.exit_codes.values(), default=1)

    def have_ended(self, timeout_s: float) -> bool:
        """All of them, for good, or will have by then."""
        until_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(until_s - time.monotonic(), 0.0))
        return not any(thread.is_alive() for thread in self._threads)

    def end(self) -> None:
        """All that still run, and their stages."""
        with self._lock:
            self._is_ending = True
            self._spawned.end()
        for thread in self._threads:
            thread.join()
        for file in self._files.values():
            file.close()

    def _follow(self, rank: int, process: subprocess.Popen) -> None:
        """One keeper, and those that come after it."""
        prefix = f"[rank {rank}, {socket.gethostname()}] "
        for number in range(_MOST_RESTARTS + 1):
            for line in process.stdout:
                self._pass_on(rank, prefix, line)
            exit_code = process.wait()
            with self._lock:
                is_over = exit_code >= 0 or self._is_ending or number == _MOST_RESTARTS
                if is_over:
                    self.exit_codes[rank] = exit_code if exit_code >= 0 else 128 - exit_code
                    return
                process = self._spawned.start_again(rank)
            self._pass_on(rank, prefix, b"warning: its keeper was killed, and is started again\n")

    def _pass_on(self, rank: int, prefix: str, line: bytes) -> None:
        """Whoever reads may be gone; a stage that could not say a word would wait for ever."""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(prefix + line.decode(errors="backslashreplace"))
            sys.stderr.flush()
        if rank in self._files:
            with contextlib.suppress(OSError):
                self._files[rank].write(line)


def _open_files(own: OwnRanks, log_dir: str | None) -> dict[int, BinaryIO]:
    """One a rank, that an earlier run may have begun."""
    if log_dir is None:
        return {}
    try:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        return {
            rank: Path(log_dir, f"rank-{rank}.log").open("ab", buffering=0) for rank in own.ranks
        }
    except OSError as error:
        raise ConfigError(f"--log-dir {log_dir}: {error.strerror}") from None
