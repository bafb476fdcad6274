"""Rotary positions, in the half-split layout of Hugging Face's checkpoints.

Suffixes: T tokens, X heads, H head size, h half of it.
"""

import math

import torch
from torch import Tensor

from pipeserve.stages.config import RopeConfig

Rotation = tuple[Tensor, Tensor]
"""(cos, signed sin) of each token, float32 [T, 1, H]."""


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair of dimensions: float32 [h].

    "llama3": wavelengths beyond the trained context are stretched by `factor`, short ones are kept,
    those between are blended. Source: transformers, `_compute_llama3_parameters`.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "default":
        return frequencies
    if rope.kind == "linear":
        return frequencies / rope.factor
    context, low, high = (
        rope.original_max_position_embeddings,
        rope.low_freq_factor,
        rope.high_freq_factor,
    )
    wavelengths = 2 * math.pi / frequencies
    blend = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


def make_rotation(positions_T: Tensor, frequencies_h: Tensor) -> Rotation:
    angles_Th = positions_T[:, None].float() * frequencies_h
    cos_Th, sin_Th = angles_Th.cos(), angles_Th.sin()
    return (
        torch.cat((cos_Th, cos_Th), -1)[:, None],
        torch.cat((-sin_Th, sin_Th), -1)[:, None],
    )


def rotate(heads_TXH: Tensor, rotation: Rotation) -> Tensor:
    """In float32. Does not modify its arguments."""
    cos_T1H, signed_sin_T1H = rotation
    heads_TXH = heads_TXH.float()
    swapped_TXH = heads_TXH.roll(heads_TXH.shape[-1] // 2, -1)
    return (heads_TXH * cos_T1H).addcmul_(swapped_TXH, signed_sin_T1H)
