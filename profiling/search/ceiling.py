"""The rate that no schedule can pass: what a pipeline serves if every microbatch is the best.

In a steady state every microbatch holds the mix's own proportion of prefill tokens and decodes, a
fraction x of a mean request, and takes T(x) on the slowest stage, so that x / T(x) requests are
served a second. What bounds x: P microbatches are a turn, so P T(x) is the least time between
tokens; and P times its decodes, at their mean context, are in the KV pool. Microbatches of several
sizes may be mixed, so T is its own lower convex envelope.

That is more than a pipeline can do. Of the microbatches of a turn the longest passes all P stages,
and the next token of its requests comes no sooner: with one of b seconds in it a turn is P b, not
P times the mean. Without the envelope (`mixed=False`) the rate is that of equal microbatches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf

from pipeserve.core.nouns import Chunk, Microbatch, RequestId
from pipeserve.profiling.simulation.stage_times import StageTimes

_STEP = 16  # tokens between the sizes that are tried: a part of every tile
_SAMPLES = 16  # executions that a time is the mean of: each has a jitter


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """The best rate, and the microbatch that gives it."""

    rate: float
    """Requests a second."""
    microbatch_s: float
    num_tokens: int
    bound: str
    """What keeps microbatches from being larger: "slo", "kv", or "none" where larger ones give no
    more."""
    stage_seconds: float
    """Of the slowest stage, for one request."""


@dataclass(frozen=True, slots=True)
class MeanRequest:
    """Means of a workload, in tokens."""

    prompt: float
    decodes: float
    """Of a request: its output tokens but the first, which its prompt's last chunk gives."""
    prompt_context: float
    """Positions before a prompt token, on average over prompt tokens."""
    decode_context: float
    """Positions that a decode reads, on average over decodes; also the KV of a running one."""


def mix_of(lengths: Sequence[tuple[int, int]]) -> MeanRequest:
    """`lengths`: (prompt tokens, output tokens) of each request."""
    num = len(lengths)
    prompts, decodes = sum(p for p, _ in lengths), sum(o - 1 for _, o in lengths)
    return MeanRequest(
        prompts / num,
        decodes / num,
        sum(p * p for p, _ in lengths) / 2 / prompts,
        sum((o - 1) * (p + o / 2) for p, o in lengths) / max(decodes, 1),
    )


def ceiling(
    times: StageTimes,
    lengths: Sequence[tuple[int, int]],
    *,
    num_stages: int,
    slo_tbt_s: float,
    kv_positions: int,
    most_tokens: int = 4096,
    mixed: bool = True,
) -> Ceiling:
    """Of a workload with these lengths within a limit between tokens; `kv_positions` of the pool
    of a stage; microbatches of at most `most_tokens`, of several sizes or (not `mixed`) of one."""
    mix = mix_of(lengths)
    per_request = mix.prompt + mix.decodes
    sizes = range(_STEP, most_tokens + 1, _STEP)
    points = [(float(size), _seconds(times, mix, size)) for size in sizes]
    if mixed:
        points = _lower_hull(points)
    kv_per_token = num_stages * mix.decode_context * mix.decodes / per_request
    most_by_kv = kv_positions / kv_per_token if kv_per_token else inf
    best = Ceiling(rate=0.0, microbatch_s=0.0, num_tokens=0, bound="slo", stage_seconds=0.0)
    for size in sizes:
        seconds = _on(points, size)
        if seconds * num_stages > slo_tbt_s or size > most_by_kv:
            if best.num_tokens in (0, size - _STEP):
                best = replace(best, bound="kv" if size > most_by_kv else "slo")
            continue
        rate = size / per_request / seconds
        if rate > best.rate:
            best = Ceiling(
                rate=rate,
                microbatch_s=seconds,
                num_tokens=size,
                bound="none",
                stage_seconds=1 / rate,
            )
    return best


def _seconds(times: StageTimes, mix: MeanRequest, num_tokens: int) -> float:
    """Of the slowest stage, for the mix's own proportion at its mean contexts. All prefill tokens
    are one chunk, which is cheapest, with the mean context in its middle."""
    num_decodes = round(num_tokens * mix.decodes / (mix.prompt + mix.decodes))
    context = round(mix.decode_context)
    chunks = [
        Chunk(RequestId(number), context - 1, context, (), None, 1) for number in range(num_decodes)
    ]
    prefill = num_tokens - num_decodes
    if prefill:
        before = max(0, round(mix.prompt_context - prefill / 2))
        chunks.append(Chunk(RequestId(num_decodes), before, before + prefill, (), None, 1))
    samples = [times.compute_s(Microbatch(index, tuple(chunks))) for index in range(_SAMPLES)]
    return max(sum(stage) / _SAMPLES for stage in zip(*samples, strict=True))


def _lower_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the lower convex envelope; points by size (Andrew's monotone chain, 1979)."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return hull


def _is_above(
    left: tuple[float, float], middle: tuple[float, float], right: tuple[float, float]
) -> bool:
    slope = (right[1] - left[1]) / (right[0] - left[0])
    return middle[1] >= left[1] + slope * (middle[0] - left[0])


def _on(points: Sequence[tuple[float, float]], x: float) -> float:
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]
