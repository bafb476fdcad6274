"""What the C kernels number, by our names."""

import torch

KERNEL_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""As kernels/numbers.h has them."""
KERNEL_ACTIVATIONS = {
    "silu": 0,
    "swish": 0,
    "gelu": 1,
    "gelu_new": 2,
    "gelu_pytorch_tanh": 2,
    "relu": 3,
}
"""By Hugging Face's names; as kernels/activations.h has them."""
