"""What the kernel says of a process: whether it is slow, or does nothing at all."""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

_MOST_BYTES = 4096
"""Of one of these files."""
_NUM_THREADS = 16
"""Its place among the fields of `stat`, behind the state."""


class VitalSigns(NamedTuple):
    """Of a process, since it began."""

    num_moved: int = 0
    """Bytes that it has read and written, from memory or disk."""
    ran_s: float = 0.0
    """CPU time of all its threads."""
    stood_s: float = 0.0
    """Time that its threads stood in line for a core, or for the end of a pause that a CPU quota
    made them take."""
    state: str = ""
    """Of its main thread, a letter: R runs or stands in line, S sleeps, D waits for a disk, T was
    stopped by a signal. Empty: there is no such process."""


class Watched:
    """A process whose signs are read several times a second: the files that have them stay open."""

    def __init__(self, pid: int) -> None:
        self._folder = f"/proc/{pid}"
        self._files: dict[str, int] = {}

    def signs(self) -> VitalSigns:
        """Of this moment. Zero is what may not be read here; all of it, where it has ended."""
        try:
            state, *fields = self._read("stat").rpartition(b") ")[2].split()
        except OSError:
            return VitalSigns()
        ran_ns = stood_ns = 0
        for times in self._of_threads(int(fields[_NUM_THREADS])):
            ran, stood, _ = times.split()
            ran_ns, stood_ns = ran_ns + int(ran), stood_ns + int(stood)
        return VitalSigns(self._num_moved(), 1e-9 * ran_ns, 1e-9 * stood_ns, state.decode())

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files = {}

    def _read(self, name: str) -> bytes:
        """All of a small file."""
        file = self._files.get(name)
        if file is None:
            file = self._files[name] = os.open(f"{self._folder}/{name}", os.O_RDONLY)
        return os.pread(file, _MOST_BYTES, 0)

    def _num_moved(self) -> int:
        try:
            counts = dict(line.split(b": ") for line in self._read("io").splitlines())
        except OSError:
            return 0
        return sum(int(counts[name]) for name in (b"rchar", b"wchar", b"read_bytes"))

    def _of_threads(self, number: int) -> list[bytes]:
        """What `schedstat` has of each; nothing of those that have ended, or where this kernel does
        not say."""
        found = []
        with contextlib.suppress(OSError):
            if number == 1:
                return [self._read("schedstat")]
            for thread in os.listdir(f"{self._folder}/task"):
                with contextlib.suppress(OSError):
                    found.append(Path(f"{self._folder}/task/{thread}/schedstat").read_bytes())
        return found
