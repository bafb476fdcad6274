"""A run in numbers: throughput, waiting times, busy shares. Pure functions of what was recorded."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeserve.core.records import Headed, Span


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """When one request came and when each of its tokens became known, in seconds of one clock."""

    num_prompt_tokens: int
    arrival_s: float
    token_times_s: tuple[float, ...]
    """One for each output token, not decreasing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """By linear interpolation between closest ranks, as numpy's default (Hyndman and Fan's R-7)."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A whole run. Times in seconds, rates per second."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    """From the first submission to the last token."""
    total_tokens_per_s: float
    """Prompt and output tokens."""
    output_tokens_per_s: float
    ttft_s: Percentiles
    """Time to first token: from a request's arrival."""
    tbt_s: Percentiles | None
    """Time between tokens: every gap of every request, pooled; None where no request has two."""


def summarize(records: Sequence[RequestRecord]) -> Summary:
    """The numbers of a run of at least one request, each with at least one output token."""
    start_s, stop_s = window(records)
    seconds = stop_s - start_s
    prompt_tokens = sum(record.num_prompt_tokens for record in records)
    output_tokens = sum(len(record.token_times_s) for record in records)
    gaps = gaps_s(records)
    return Summary(
        requests=len(records),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        seconds=seconds,
        total_tokens_per_s=(prompt_tokens + output_tokens) / seconds,
        output_tokens_per_s=output_tokens / seconds,
        ttft_s=percentiles([record.token_times_s[0] - record.arrival_s for record in records]),
        tbt_s=percentiles(gaps) if gaps else None,
    )


def window(records: Sequence[RequestRecord]) -> tuple[float, float]:
    """First submission and last token of a run, in seconds."""
    return (
        min(record.arrival_s for record in records),
        max(record.token_times_s[-1] for record in records),
    )


def gaps_s(records: Iterable[RequestRecord]) -> list[float]:
    """Time between tokens: every gap of every request, pooled."""
    return [
        later - earlier for record in records for earlier, later in pairwise(record.token_times_s)
    ]


def percentiles(values: Sequence[float]) -> Percentiles:
    """Of at least one value. Does not modify `values`."""
    ordered = sorted(values)
    return Percentiles(
        p50=_quantile(ordered, 0.5), p90=_quantile(ordered, 0.9), p99=_quantile(ordered, 0.99)
    )


def busy_shares(
    computed: Sequence[Span | Headed], num_stages: int, start_s: float, stop_s: float
) -> list[float]:
    """For each stage, the share of the time `[start_s, stop_s)` in which it computed: 0 to 1.

    Overlapping ones count once, and what lies outside the window not at all.
    """
    return [
        _union_s([did for did in computed if did.stage == stage], start_s, stop_s)
        / (stop_s - start_s)
        for stage in range(num_stages)
    ]


def cpu_shares(
    computed: Iterable[Span | Headed], num_stages: int, start_s: float, stop_s: float
) -> list[float]:
    """As `busy_shares`, of the thread CPU time; well below it where others took the stage's core.

    What the window cuts counts by the share of it that lies inside.
    """
    totals = [0.0] * num_stages
    for did in computed:
        inside = min(did.end_s, stop_s) - max(did.start_s, start_s)
        if inside > 0:
            totals[did.stage] += did.cpu_s * inside / (did.end_s - did.start_s)
    return [total / (stop_s - start_s) for total in totals]


def _union_s(computed: list[Span | Headed], start_s: float, stop_s: float) -> float:
    total, covered_to = 0.0, start_s
    for did in sorted(computed, key=lambda did: did.start_s):
        first, last = max(did.start_s, covered_to), min(did.end_s, stop_s)
        if last > first:
            total += last - first
            covered_to = last
    return total


def _quantile(ordered: Sequence[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    below, above = math.floor(position), math.ceil(position)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
