"""Where a process finds itself among those of a launched job, from what its launcher has put into
the environment. Reads nothing else.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

OWN_PORT = 29600
"""That keepers join at, where the launcher leaves no other trace of the job."""
VARIABLES_ALONE = "RANK and WORLD_SIZE"
"""What a launcher is called of which nothing else is known."""


class Place(NamedTuple):
    """Of one process. Several ranks may be its to start (`ranks.py`)."""

    launcher: str
    """By the name that users know it by."""
    index: int
    """Among all processes of the job, from 0; the first one is the leader."""
    size: int
    """How many they are."""
    local_index: int
    """Among those of its machine."""
    local_size: int
    leader: str = ""
    """Name or address of the leader's machine; empty: the launcher does not say."""
    port: int = OWN_PORT
    """Of the leader's machine, at which the job's keepers are to join."""
    job_id: str = ""
    """As the launcher names it; empty where it does not."""

    @property
    def num_machines(self) -> int | None:
        """None: they have different numbers of processes, as far as one can see from here."""
        return None if self.size % self.local_size else self.size // self.local_size


def find_place(environment: Mapping[str, str]) -> Place | None:
    """By the first launcher that matches, or None: there is none, or it has started one process.

    The inner one comes first: torchrun may be started by srun on each machine, and mpirun starts
    its daemons by srun, whose variables its processes inherit. Raises ValueError where a variable
    is not what its launcher puts there.
    """
    for find in (_by_torch, _by_open_mpi, _by_mpich, _by_slurm, _by_leader_worker_set):
        place = find(environment)
        if place is not None:
            return place if place.size > 1 else None
    return None


def _by_torch(environment: Mapping[str, str]) -> Place | None:
    """torchrun, DeepSpeed's launcher, and whoever else sets torch.distributed's variables. Where
    only RANK and WORLD_SIZE are there, each process has a machine, as in Kubernetes' PyTorchJob."""
    if not {"RANK", "WORLD_SIZE"} <= environment.keys():
        return None
    launcher = VARIABLES_ALONE
    if "TORCHELASTIC_RUN_ID" in environment:
        launcher = "torchrun"
    elif "CROSS_RANK" in environment:
        launcher = "DeepSpeed"
    local_size = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or "1"
    job_id = environment.get("TORCHELASTIC_RUN_ID", "")
    return Place(
        launcher,
        int(environment["RANK"]),
        int(environment["WORLD_SIZE"]),
        int(environment.get("LOCAL_RANK", 0)),
        int(local_size),
        environment.get("MASTER_ADDR", ""),
        own_port(int(environment.get("MASTER_PORT") or OWN_PORT)),
        "" if job_id == "none" else job_id,
    )


def _by_open_mpi(environment: Mapping[str, str]) -> Place | None:
    if "OMPI_COMM_WORLD_RANK" not in environment:
        return None
    return Place(
        "MPI",
        int(environment["OMPI_COMM_WORLD_RANK"]),
        int(environment["OMPI_COMM_WORLD_SIZE"]),
        int(environment["OMPI_COMM_WORLD_LOCAL_RANK"]),
        int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"]),
        job_id=environment.get("PMIX_NAMESPACE", ""),
    )


def _by_mpich(environment: Mapping[str, str]) -> Place | None:
    """MPICH and Intel MPI, whose launcher is Hydra. Others set PMI_RANK too, but not the local
    one."""
    if not {"PMI_RANK", "MPI_LOCALRANKID"} <= environment.keys():
        return None
    return Place(
        "MPI",
        int(environment["PMI_RANK"]),
        int(environment["PMI_SIZE"]),
        int(environment["MPI_LOCALRANKID"]),
        int(environment["MPI_LOCALNRANKS"]),
    )


def _by_slurm(environment: Mapping[str, str]) -> Place | None:
    """srun. A script of sbatch, which is one process though the job may be of many, has no step."""
    names = {"SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS"}
    if not names <= environment.keys():
        return None
    job, step = environment["SLURM_JOB_ID"], environment["SLURM_STEP_ID"]
    tasks = expand_counts(environment["SLURM_STEP_TASKS_PER_NODE"])
    return Place(
        "Slurm",
        int(environment["SLURM_PROCID"]),
        int(environment["SLURM_STEP_NUM_TASKS"]),
        int(environment["SLURM_LOCALID"]),
        tasks[int(environment["SLURM_NODEID"])],
        first_host(environment["SLURM_STEP_NODELIST"]),
        own_port(int(job) + int(step)),
        f"{job}.{step}",
    )


def _by_leader_worker_set(environment: Mapping[str, str]) -> Place | None:
    """Kubernetes' LeaderWorkerSet, of which each pod is one process here."""
    if not {"LWS_WORKER_INDEX", "LWS_GROUP_SIZE"} <= environment.keys():
        return None
    return Place(
        "LeaderWorkerSet",
        int(environment["LWS_WORKER_INDEX"]),
        int(environment["LWS_GROUP_SIZE"]),
        0,
        1,
        environment["LWS_LEADER_ADDRESS"],
    )


def own_port(number: int) -> int:
    """One that follows from a number that is the job's own, such as MASTER_PORT, at which its
    launcher listens itself: another one, and below those that the kernel gives to connections."""
    return 20000 + (number + 100) % 10000


def first_host(hosts: str) -> str:
    """Of a list as Slurm writes it: `rack[0-3]node[07-12,15],gpu3`."""
    first = re.match(r"([^,\[]|\[[^\]]*\])+", hosts)
    if first is None:
        raise ValueError(hosts)
    return re.sub(r"\[([^,\-\]]+)[^\]]*\]", r"\1", first[0])


def expand_counts(counts: str) -> list[int]:
    """Of each node, as Slurm writes it: `2(x3),1`."""
    found = []
    for entry in counts.split(","):
        count, _, times = entry.rstrip(")").partition("(x")
        found += [int(count)] * int(times or 1)
    return found
