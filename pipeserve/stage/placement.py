"""Which cores a stage gets of its machine, how many threads, and what its process is told of it."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from pipeserve.cpus import Core
from pipeserve.wire.secret import VARIABLE

_MANY = 8
"""A stage of more cores than this can spare one for driver and server, which would else take one
now and then, with all the others waiting for it."""
_PLACING = (
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "KMP_HW_SUBSET",
    "OMP_PLACES",
    "OMP_PROC_BIND",
)
"""Variables by which OpenMP moves threads itself. They are meant for a program that has the machine
alone: by GOMP_CPU_AFFINITY=0-15 every stage would compute on CPU 0 (pytorch#49971, #149422)."""
_SPINS = "1000"
"""How often a thread that waits for others looks before it sleeps; a few microseconds. By default
it looks for a millisecond, and where others use the cores, that is time in which those that it
waits for do not run: two threads on two busy cores took 24 s for what they do in 3.5 s so, and one
alone in 2 (480 prompt tokens, November 2026)."""


class Place(NamedTuple):
    cpus: list[int]
    """That its threads may run on."""
    num_threads: int


def place_of(
    cores: Sequence[Core],
    quota: float,
    number: int,
    num_stages: int,
    most_threads: int | None = None,
) -> Place:
    """What one of the stages gets that may use these cores; `number`: which of them. `quota`: its
    share of the CPUs that its container may keep busy.

    Each stage has as many cores as the others, and none that another has; of each core one CPU,
    for two threads of one core are hardly faster than one, and wait for each other
    (llama.cpp#19110). Where there are fewer cores than stages, but enough CPUs, a CPU counts as a
    core. With fewer still there is nothing to pin: each stage may run anywhere, with one thread.
    Cores that are left over are for driver and server, which may run anywhere.

    It has no more threads than `quota`, but one: a thread over it makes the others stand still at
    the end of each product (ollama#17916, 45 times slower). Nor has it more than `most_threads`.
    """
    cpus = [core[0] for core in cores]
    if len(cpus) < num_stages:
        cpus = list(chain.from_iterable(cores))
    share = len(cpus) // num_stages
    if share == 0:
        return Place(cpus, 1)
    own = cpus[number * share : (number + 1) * share]
    if share > _MANY and share * num_stages == len(cpus):
        own.pop()
    num_threads = min(quota, len(own), most_threads or len(own))
    return Place(own, max(int(num_threads), 1))


def most_threads(environment: Mapping[str, str]) -> int | None:
    """Of one stage, as the user wants it: OMP_NUM_THREADS, whose first number is meant. torchrun
    sets it to 1 where the user did not (pytorch's `torch.distributed.run`), so there it is none."""
    first = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if "TORCHELASTIC_RUN_ID" in environment or not first.isdecimal():
        return None
    return int(first) or None


def stage_environment(
    environment: Mapping[str, str], rank: int, local_rank: int, num_threads: int
) -> dict[str, str]:
    """The keeper's, with what has to be set before the stage's interpreter starts.

    Huge pages for large allocations (glibc 2.35 and newer; others ignore it): gathering KV touches
    many pages; one pair of runs of the mix in docs/bench.md took 25.4 s with and 27.0 s without.
    What torch's C++ warns of, such as hosts whose names it would log and does not find, is not for
    whoever runs a model (DeepEP#172).
    """
    changed = {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "GOMP_SPINCOUNT": _SPINS,
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **environment,
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "OMP_NUM_THREADS": str(num_threads),
    }
    for name in (*_PLACING, VARIABLE):  # the secret is told in another way
        changed.pop(name, None)
    return changed
