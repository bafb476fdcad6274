"""Which backend a stage computes by, from what the user calls its device and its attention."""

import torch

from pipeserve.stages.attention.attention import ReferenceAttention
from pipeserve.stages.backends.backend import Backend
from pipeserve.stages.backends.cpu.backend import CpuBackend
from pipeserve.stages.backends.cpu.kernel_backend import KernelBackend
from pipeserve.stages.backends.cpu.library import kernels
from pipeserve.stages.backends.cuda import CudaBackend
from pipeserve.stages.config.attentions import check_attention


def make_backend(device: str = "cpu", attention: str = "auto", local_rank: int = 0) -> Backend:
    """`attention`: "auto" is the best there is; on the CPU "cpu" is PyTorch's, which "auto" is too
    where there are no C kernels, or several threads; "reference" is the definition, position by
    position. `local_rank`: of the stage among those of its machine.

    Raises ConfigError for what there is not.
    """
    check_attention(device, attention)
    own = ReferenceAttention() if attention == "reference" else None
    if device == "cuda":
        return CudaBackend(local_rank, own)
    if attention == "auto" and kernels() is not None and torch.get_num_threads() == 1:
        return KernelBackend()
    return CpuBackend(own)
