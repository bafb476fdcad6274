"""What the kernel says of a process: whether it is slow, or does nothing at all."""

import contextlib
from pathlib import Path
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
    process = Path(f"/proc/{pid}")
    try:
        state = (process / "stat").read_text("ascii").rpartition(") ")[2][0]
        lines = (process / "io").read_text("ascii").splitlines()
        threads = list((process / "task").iterdir())
    except OSError:
        return VitalSigns()
    counts = dict(line.split(": ") for line in lines)
    num_moved = sum(int(counts[name]) for name in ("rchar", "wchar", "read_bytes"))
    ran_ns = stood_ns = 0
    for thread in threads:
        with contextlib.suppress(OSError):  # it has ended, or this kernel does not say
            ran, stood, _ = (thread / "schedstat").read_text("ascii").split()
            ran_ns, stood_ns = ran_ns + int(ran), stood_ns + int(stood)
    return VitalSigns(num_moved, 1e-9 * ran_ns, 1e-9 * stood_ns, state)
