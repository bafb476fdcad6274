"""The machine at hand: which device it is, what it multiplies natively, and how much memory and how
many CPUs this process may have of it.
"""

import math
import os
import platform
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pipeserve.cgroups import groups_of

_MULTIPLIES = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"},  # the last is Arm's
    "float16": {"avx512_fp16", "amx_fp16"},
}
"""Any of these, by the kernel's names, multiplies that type as it is."""
_LEFT_OUT = {
    ("SSE41", "AVX"): ("avx2", "avx512", "amx"),
    ("AVX2", "AVX2_VNNI", "AVX2_VNNI_2"): ("avx512", "amx"),
    ("AVX512_CORE", "AVX512_CORE_VNNI"): ("avx512_bf16", "avx512_fp16", "amx"),
    ("AVX512_CORE_BF16",): ("avx512_fp16", "amx"),
}
"""What a value of ONEDNN_MAX_CPU_ISA or ATEN_CPU_CAPABILITY has oneDNN or torch do without: all
instructions whose names begin so (oneDNN, "CPU Dispatcher Control")."""
_ISA_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


def device_name() -> str:
    """The CPU as the kernel names it: what a calibrated profile is good for."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_instructions(
    cpuinfo: str | None = None, environment: Mapping[str, str] = os.environ
) -> set[str]:
    """What every core of this machine can do, by the kernel's names (avx2, avx512_bf16), less what
    a process with this `environment` is told to do without: so one kind of CPU imitates another.

    By /proc/cpuinfo, because a keeper has no torch.
    """
    if cpuinfo is None:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    # Of every core: a machine may have two kinds.
    cores = [
        set(line.partition(":")[2].split())
        for line in cpuinfo.splitlines()
        if line.startswith(("flags", "Features"))
    ]
    found = set.intersection(*cores) if cores else set()
    limits = {environment.get(name, "").upper() for name in _ISA_VARIABLES}
    if "DEFAULT" in limits:  # torch's name for none of them
        limits.add("AVX")
    for values, left_out in _LEFT_OUT.items():
        if limits & {*values}:
            found = {name for name in found if not name.startswith(left_out)}
    return found


def native_dtypes(
    cpuinfo: str | None = None, environment: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """The types that products of this machine's CPU, and of a process with this `environment`, are
    made in without imitation: float32, and of "bfloat16" and "float16" what there is."""
    instructions = cpu_instructions(cpuinfo, environment)
    multiplied = [dtype for dtype, any_of in _MULTIPLIES.items() if instructions & any_of]
    return ("float32", *multiplied)


def fingerprint(local_rank: int, local_world_size: int) -> str:
    """What a stage of this machine computes on, as far as a keeper can tell: where this is the
    same, so is what layers take."""
    cpus = f"{num_cpus()} of {os.cpu_count()} CPUs"
    place = f"stage {local_rank} of {local_world_size}"
    switches = [os.environ.get(name, "") for name in (*_ISA_VARIABLES, "PIPESERVE_KERNELS")]
    return ", ".join(filter(None, [device_name(), cpus, place, *_gpu_names(), *switches]))


def _gpu_names() -> list[str]:
    """Of NVIDIA's, by the driver's files: keepers load no torch."""
    names = []
    for path in sorted(Path("/").glob("proc/driver/nvidia/gpus/*/information")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model")]
    return names


def boot_id() -> str:
    """The same for all processes that share this machine's CLOCK_MONOTONIC, and no others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()


def num_cpus(root: Path = Path("/")) -> int:
    """How many CPUs threads of this process can keep busy all the time: those that they may run on,
    or the quota of its container, whichever is less; at least 1. A quota is rounded down: of 7.65
    CPUs, the eighth thread would have all of them stopped for a while (lilbee#660)."""
    quota, num_cores = cpu_quota(root), len(os.sched_getaffinity(0))
    return num_cores if quota >= num_cores else max(int(quota), 1)


def cpu_quota(root: Path = Path("/")) -> float:
    """CPUs that the processes of this container may keep busy together; inf: no limit."""
    return min((group.cpu_limit() for group in groups_of("cpu", root)), default=math.inf)


class MemoryLimit(NamedTuple):
    """Memory that processes take from, and can use up."""

    key: str
    """The same for all processes that take from it."""
    name: str
    """In words."""
    num_bytes: int
    free_bytes: int
    """What can be had of it without swapping."""


def memory_limits(root: Path = Path("/")) -> tuple[MemoryLimit, ...]:
    """All that hold for this process: the machine's memory, and what its control groups allow it
    of that. `root` stands for the machine's folder /."""
    machine, host = boot_id(), socket.gethostname()
    total = _meminfo("MemTotal", root)
    limits = [MemoryLimit(machine, host, total, _meminfo("MemAvailable", root))]
    for group in groups_of("memory", root):
        limit = group.memory_limit()
        if limit < total:  # version 1 says 2**63 less a page for none
            # The folder's number is that of the group, however many containers it is seen from.
            key = f"{machine}/{group.folder.stat().st_ino}"
            name = f"{host}, limited to {limit} bytes by its control group {group.folder},"
            limits.append(
                MemoryLimit(key, name, int(limit), int(max(limit - group.used_memory(), 0)))
            )
    return tuple(limits)


def total_memory_bytes() -> int:
    """Of this machine, or what this process may have of it, if that is less."""
    return min(limit.num_bytes for limit in memory_limits())


def _meminfo(name: str, root: Path) -> int:
    for line in (root / "proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/meminfo has no {name}")
