"""How a layer scores its keys, before the softmax.

Suffixes: N query heads, C positions of the context, X any axes, Q queries, H head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_MOST_NUMBERS = 1 << 22
"""Of keys that are held in float32, too."""


@dataclass(frozen=True, slots=True, eq=False)
class Scoring:
    """A query's score of a key is `scale` * q.k, then soft-capped, then with the ALiBi bias."""

    scale: float
    window: int | None = None
    """How many positions a query sees, up to and with its own; None: all."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap)."""
    slopes_N: Tensor | None = None
    """ALiBi: each head's bias per position of the key, before scaling; rounded to bfloat16, and so
    is the bias, as Falcon was trained."""


def products(q_XQH: Tensor, k_XCH: Tensor) -> Tensor:
    """Float32 [X, Q, C], whatever comes in.

    PyTorch rounds a product of 16-bit numbers to 16 bits. Keys may have a part in common that makes
    all scores large, as Qwen2's biases do: then the differences, which the softmax sees alone, are
    lost (transformers#33317: perplexity 8.0 for 7.1), and float16 overflows (Qwen3#910: NaN). A GPU
    multiplies in 16 bits still: its products of float32 would take many times as long.
    """
    if k_XCH.is_cuda:
        return torch.matmul(q_XQH.to(k_XCH.dtype), k_XCH.mT).float()
    if k_XCH.dtype == torch.float32:
        return torch.matmul(q_XQH, k_XCH.mT)
    scores_XQC = q_XQH.new_empty((*q_XQH.shape[:-1], k_XCH.shape[-2]))
    q, k, scores = (each.flatten(0, -3) for each in (q_XQH, k_XCH, scores_XQC))
    most = max(1, _MOST_NUMBERS // k[0].numel())
    for start in range(0, len(k), most):
        piece = slice(start, start + most)
        torch.bmm(q[piece], k[piece].float().mT, out=scores[piece])
    return scores_XQC


def alibi_slopes(num_heads: int) -> Tensor:
    """Float32 [N]: a geometric series, and for a number that is no power of two every second one of
    the next finer series behind it. Source: Press et al., arXiv:2108.12409; transformers,
    `build_alibi_tensor` of Falcon."""
    near = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * i / near) for i in range(1, near + 1)]
    slopes += [2.0 ** (-4 * i / near) for i in range(1, 2 * (num_heads - near), 2)]
    return torch.tensor(slopes)


def alibi_bias(scoring: Scoring, num_positions: int, device: torch.device) -> Tensor:
    """Float32 [N, C] to add to the scaled scores of the positions from 0 on.

    Less the last position's, which the softmax does not see: so what matters stays small, and exact
    in half precision.
    """
    positions_C = torch.arange(num_positions, device=device)
    slopes_N = scoring.slopes_N.to(device).bfloat16()
    bias_NC = (slopes_N[:, None] * positions_C).float()
    return (bias_NC - bias_NC[:, -1:]) * scoring.scale
