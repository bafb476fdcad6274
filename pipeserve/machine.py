"""The machine at hand: which device it is, how much memory it has."""

import platform
from pathlib import Path


def device_name() -> str:
    """The CPU as the kernel names it: what a calibrated profile is good for."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def boot_id() -> str:
    """The same for all processes that share this machine's CLOCK_MONOTONIC, and no others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()


def total_memory_bytes() -> int:
    return _meminfo("MemTotal")


def available_memory_bytes() -> int:
    """What can be had without swapping."""
    return _meminfo("MemAvailable")


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/meminfo has no {name}")
