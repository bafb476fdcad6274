"""What the kernel says of a process: whether it is slow, or does nothing at all."""

import contextlib
import os
from typing import NamedTuple


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


def vital_signs(pid: int) -> VitalSigns:
    """Of this moment; all zero where the process has ended, or may not be looked at."""
    try:
        state = _read(f"/proc/{pid}/stat").rpartition(b") ")[2][:1].decode()
        counts = dict(line.split(b": ") for line in _read(f"/proc/{pid}/io").splitlines())
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return VitalSigns()
    num_moved = sum(int(counts[name]) for name in (b"rchar", b"wchar", b"read_bytes"))
    ran_ns = stood_ns = 0
    for thread in threads:
        with contextlib.suppress(OSError):  # it has ended, or this kernel does not say
            ran, stood, _ = _read(f"/proc/{pid}/task/{thread}/schedstat").split()
            ran_ns, stood_ns = ran_ns + int(ran), stood_ns + int(stood)
    return VitalSigns(num_moved, 1e-9 * ran_ns, 1e-9 * stood_ns, state)


def _read(path: str) -> bytes:
    """All of a small file. By system calls alone, for it is read of each stage several times a
    second."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)
