"""The memory of a stage's process, in bytes: what it has, and what there is for it."""

from pathlib import Path

from pipeserve.machine import MemoryLimit, memory_limits


def device_memory() -> tuple[MemoryLimit, ...]:
    """Where weights and KV have to fit: on a CPU, the machine's memory and the limits of its
    containers. A GPU's is its own (`torch.cuda.mem_get_info`), under a key that is the GPU's."""
    return memory_limits()


def resident_bytes() -> int:
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """The most that was ever resident at once."""
    return _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")
