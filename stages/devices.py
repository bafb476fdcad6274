"""Which backend a stage computes by, from what the user calls its device and its attention."""

from pipeserve.errors import ConfigError
from pipeserve.stages.attention.attention import ReferenceAttention
from pipeserve.stages.backends.backend import Backend
from pipeserve.stages.backends.cpu.backend import CpuBackend
from pipeserve.stages.backends.cuda import CudaBackend


def make_backend(device: str = "cpu", attention: str = "auto", local_rank: int = 0) -> Backend:
    """`attention`: "auto" is the device's own, and so is "cpu" on that one; "reference" is the
    definition, position by position. `local_rank`: of the stage among those of its machine.

    Raises ConfigError for what there is not.
    """
    check_attention(device, attention)
    own = ReferenceAttention() if attention == "reference" else None
    return CudaBackend(local_rank, own) if device == "cuda" else CpuBackend(own)


def check_attention(device: str, attention: str) -> None:
    """Raises ConfigError for an attention that `device` does not have."""
    known = ("auto", "reference") if device == "cuda" else ("auto", "cpu", "reference")
    if attention not in known:
        raise ConfigError(f"attention {attention!r} of {device} is not one of {', '.join(known)}")
