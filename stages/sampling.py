"""From logits to tokens, on the last stage. A row's token depends on that row alone.

Nothing here keeps generator state: the draw for output token i of a request is a pure function of
(seed, i), so the same token comes out alone, in any batch, after preemption and on a restarted
stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 64) - 1

Sampled = tuple[int, float | None, list[tuple[int, float]]]
"""(token, its log-probability, the likeliest (token, log-probability)); None, [] unless asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """How to draw one token."""

    temperature: float
    """0 is greedy."""
    top_k: int
    """0 keeps all."""
    top_p: float
    seed: int
    output_index: int
    """0 for the request's first output token."""
    banned_ids: tuple[int, ...] = ()
    """Never drawn at this position: stop ids, before `min_tokens`."""
    num_logprobs: int | None = None


def uniform_draw(seed: int, output_index: int) -> float:
    """In [0, 1), 53 bits: the finaliser of SplitMix64 over seed and index.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014. The
    seed is mixed first, so that neighbouring seeds do not give shifted copies of one sequence.
    """
    return _mix(_mix(seed & _MASK) + output_index * 0x9E3779B97F4A7C15) / 2**64


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return (value ^ (value >> 31)) & ~0x7FF & _MASK


def sample(logits_RV: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """One token for each row of float32 logits. Does not modify `logits_RV`.

    Log-probabilities are of the raw logits: before bans, temperature and filters.
    """
    greedy = logits_RV.argmax(-1).tolist()
    sampled: list[Sampled] = []
    for logits_V, token, row in zip(logits_RV, greedy, rows, strict=True):
        if row.temperature > 0 or row.banned_ids:
            token = _choose(logits_V, row)
        sampled.append((token, *_logprobs(logits_V, token, row.num_logprobs)))
    return sampled


def _choose(logits_V: Tensor, row: SampleRow) -> int:
    if row.banned_ids:
        logits_V = logits_V.index_fill(0, torch.tensor(row.banned_ids), -torch.inf)
    if row.temperature == 0:
        return int(logits_V.argmax())
    # Double precision: at a small temperature float32 would overflow, and a cumulative sum over a
    # whole vocabulary loses digits. The likeliest token is at 0, so that nothing overflows at all.
    wide_V = logits_V.double()
    scaled_V = (wide_V - wide_V.max()) / row.temperature
    ids = None
    if 0 < row.top_k < len(scaled_V):
        scaled_V, ids = scaled_V.topk(row.top_k)
    elif row.top_p < 1:
        scaled_V, ids = scaled_V.sort(descending=True, stable=True)
    probabilities = torch.softmax(scaled_V, -1)
    if row.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        # The first token always stays, whatever top_p is.
        probabilities = probabilities.masked_fill(before >= max(row.top_p, 1e-300), 0.0)
    cumulative = probabilities.cumsum(-1)
    draw = uniform_draw(row.seed, row.output_index) * cumulative[-1]
    # NaN logits have no place: they give their own request a wrong token, not the stage an error.
    place = min(int(torch.searchsorted(cumulative, draw, right=True)), len(cumulative) - 1)
    return place if ids is None else int(ids[place])


def _logprobs(
    logits_V: Tensor, token: int, num_logprobs: int | None
) -> tuple[float | None, list[tuple[int, float]]]:
    if num_logprobs is None:
        return None, []
    logprobs_V = torch.log_softmax(logits_V, -1)
    top = logprobs_V.topk(num_logprobs)
    return float(logprobs_V[token]), list(
        zip(top.indices.tolist(), top.values.tolist(), strict=True)
    )
