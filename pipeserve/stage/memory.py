"""The memory of a stage's process, in bytes: what it has, and what there is for it."""

from pathlib import Path
from typing import TYPE_CHECKING

from pipeserve.machine import MemoryLimit, memory_limits

if TYPE_CHECKING:
    import torch


def device_memory(device: "torch.device") -> tuple[MemoryLimit, ...]:
    """Where weights and KV have to fit: on a CPU, the machine's memory and the limits of its
    containers; on a GPU, its own."""
    if device.type != "cuda":
        return memory_limits()
    import torch

    free_bytes, num_bytes = torch.cuda.mem_get_info(device)
    properties = torch.cuda.get_device_properties(device)
    return (MemoryLimit(str(properties.uuid), f"GPU {device.index}", num_bytes, free_bytes),)


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
