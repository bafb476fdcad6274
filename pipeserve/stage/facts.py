"""What a rank computes with and in, as `pipeserve doctor` compares it between ranks."""

import os
import platform
import resource
from math import inf

import pipeserve
from pipeserve.cgroups import groups_of
from pipeserve.wire.control import Facts

_SHARED_MEMORY = "/dev/shm"


def facts_of(torch: str, kernels: str, num_threads: int) -> Facts:
    """Of this process; `torch`: its version, empty where it computes without."""
    return Facts(
        python=platform.python_version(),
        torch=torch,
        pipeserve=pipeserve.__version__,
        kernels=kernels,
        cpus=tuple(sorted(os.sched_getaffinity(0))),
        num_threads=num_threads,
        cpu_limit=min((group.cpu_limit() for group in groups_of("cpu")), default=inf),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shared_bytes=_shared_bytes(),
    )


def _shared_bytes() -> int:
    try:
        found = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize
