"""Which backend a stage computes by, from what the user calls its device and its attention."""

import torch

from pipeserve.stages.attention.attention import ReferenceAttention
from pipeserve.stages.backends.backend import Backend
from pipeserve.stages.backends.cpu.backend import CpuBackend
from pipeserve.stages.backends.cpu.kernel_backend import KernelBackend
from pipeserve.stages.backends.cpu.library import kernels
from pipeserve.stages.backends.cuda import CudaBackend
from pipeserve.stages.config.attentions import check_attention

_WORTH_THREADS = 3


def make_backend(device: str = "cpu", attention: str = "auto", local_rank: int = 0) -> Backend:
    """`attention`: "auto" is the best there is; on the CPU "cpu" is PyTorch's, which "auto" is too
    where there are no C kernels, or several threads (`best_num_threads`); "reference" is the
    definition, position by position. `local_rank`: of the stage among those of its machine.

    Raises ConfigError for what there is not.
    """
    check_attention(device, attention)
    own = ReferenceAttention() if attention == "reference" else None
    if device == "cuda":
        return CudaBackend(local_rank, own)
    if attention == "auto" and kernels() is not None and torch.get_num_threads() == 1:
        return KernelBackend()
    return CpuBackend(own)


def best_num_threads(device: str, attention: str, most: int) -> int:
    """How many threads a stage computes with best that may have `most` of them.

    The C kernels have one. They take a third to nine tenths of what PyTorch takes on one core
    (docs/cpu-performance.md), and on cores that others use, too, threads that wait for each other
    lose more than that. So PyTorch is for stages of several cores.
    """
    has_kernels = device == "cpu" and attention == "auto" and kernels() is not None
    return 1 if has_kernels and most < _WORTH_THREADS else most
