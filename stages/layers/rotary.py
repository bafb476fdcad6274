"""Rotary positions: how fast each pair of dimensions turns, in the half-split layout of Hugging
Face's checkpoints.

Suffixes: h half of what turns of a head.
"""

import math

import torch
from torch import Tensor

from pipeserve.stages.config.model_config import RopeConfig


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair of rotated dimensions: float32 [h].

    "linear": positions are divided by `factor`. "llama3": wavelengths beyond the trained context
    are stretched by `factor`, short ones are kept, those between are blended. "yarn": the same by
    the number of turns within the trained context, on a ramp over the pairs. "longrope": a factor
    for each pair. "proportional": the last pairs stand still. Source: transformers,
    `modeling_rope_utils.py`.
    """
    size = head_dim if rope.kind == "proportional" else int(head_dim * rope.part)
    exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    if rope.kind == "yarn":
        kept = 1 - _ramp(*_yarn_bounds(rope, size), size // 2)
        return frequencies / rope.factor * (1 - kept) + frequencies * kept
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor(rope.pair_factors) * rope.theta**exponents)
    if rope.kind == "proportional":
        frequencies[int(rope.part * head_dim // 2) :] = 0.0
        return frequencies / rope.factor
    return frequencies


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_max_position_embeddings / wavelengths
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


def _yarn_bounds(rope: RopeConfig, size: int) -> tuple[float, float]:
    """The pairs, as numbers, that turn `beta_fast` and `beta_slow` times in the trained context."""

    def pair(turns: float) -> float:
        ratio = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return size * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, size - 1)


def _ramp(low: float, high: float, length: int) -> Tensor:
    """0 up to `low`, 1 from `high` on."""
    rise = high - low or 0.001
    return ((torch.arange(length, dtype=torch.float32) - low) / rise).clamp(0, 1)
