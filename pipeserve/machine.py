"""The machine at hand: which device it is, what it multiplies natively, how much memory it has."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path

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
