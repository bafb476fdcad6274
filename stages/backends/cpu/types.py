"""Types of numbers as the C kernels name them (kernels/numbers.h)."""

import torch

KERNEL_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
