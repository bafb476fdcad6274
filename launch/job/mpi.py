"""What the processes of an MPI job tell each other at its start, and nothing after."""

from typing import Any

from pipeserve.errors import ConfigError


def broadcast(value: Any) -> Any:
    """The first process's `value`, to all of them. MPI is over with that: what fails later is no
    business of its library, which may end a process for it. Raises ConfigError."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # it finds no library of MPI
        raise ConfigError(
            f"mpi4py, by which ranks started by MPI find each other, does not load: {error}; "
            "install it for this MPI, or give --control HOST:PORT, which has to be free on the "
            "machine of rank 0"
        ) from None
    told = MPI.COMM_WORLD.bcast(value)
    MPI.Finalize()
    return told
