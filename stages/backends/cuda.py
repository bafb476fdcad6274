"""A GPU of this machine for a stage: plain PyTorch there, without kernels or graphs of its own."""

import torch

from pipeserve.errors import ConfigError
from pipeserve.stages.attention.attention import Attention
from pipeserve.stages.backends.backend import Backend


class CudaBackend(Backend):
    def __init__(self, local_rank: int, attention: Attention | None = None) -> None:
        """Ranks of one machine take its visible GPUs in turn. Raises ConfigError where there is
        none."""
        check_gpu()
        super().__init__(torch.device("cuda", local_rank % torch.cuda.device_count()), attention)

    @property
    def name(self) -> str:
        return f"PyTorch on {torch.cuda.get_device_name(self.device)}"


def check_gpu() -> None:
    """Raises ConfigError where this process could not compute on a GPU."""
    if torch.cuda.is_available():
        return
    why = "no GPU is visible here (nvidia-smi lists them; is CUDA_VISIBLE_DEVICES empty?)"
    if torch.version.cuda is None:
        why = f"PyTorch {torch.__version__} is built without CUDA"
    raise ConfigError(f"device is cuda, and {why}; use --device cpu")
