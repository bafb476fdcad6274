"""Goodput of a schedule, and whom it serves: what each request of a trial met.

Capacity goes by medians and percentiles of all requests, so a schedule may pass over long prompts
and look good. Goodput asks each request: its first token within a limit in proportion to its
prompt, and 99 % of its times between tokens within the limit between tokens. A rate is good where
90 % of the requests are, and 80 % of each quarter of them by length of prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pipeserve.profiling.search.capacity import Trial, Window, measure

TTFT_PER_TOKEN_S = 0.0025
"""A first token may take the limit between tokens, as any token, and so much for each of the
prompt: ten times what a token costs the slowest stage in the cells' ceilings (0.22 to 0.29 ms)."""
SHARE, SHARE_OF_QUARTER = 0.9, 0.8
RULES = ("capacity", "goodput")
"""By which a rate is judged: Sarathi-Serve's, and the one above."""


class Met(NamedTuple):
    """What a request met that came in the window."""

    num_prompt_tokens: int
    age_s: float
    """From its arrival to the end of the window."""
    ttft_s: float
    """`age_s`, where it has no token yet."""
    tbt_p99_s: float
    """Of its times between tokens, the one that it waits for included; 0 without any."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One rate, as a trial and request by request."""

    trial: Trial
    normalised_s: list[float]
    """P50, P90 and P99 of the normalised latency of the requests that ended in the window: seconds
    from arrival to end, for each output token (Orca, OSDI'22)."""
    met: list[Met]

    @classmethod
    def of(cls, window: Window) -> "Tried":
        return cls(measure(window), _normalised_s(window), met_in(window))

    @classmethod
    def read(cls, kept: Mapping[str, Any]) -> "Tried":
        """From what `asdict` made of one, and JSON of that."""
        met = [Met(*each) for each in kept["met"]]
        return cls(Trial(**kept["trial"]), kept["normalised_s"], met)

    def within(self, rule: str, slo_tbt_s: float) -> bool:
        if rule == "capacity":
            return self.trial.within(slo_tbt_s)
        return is_good(self.met, slo_tbt_s)

    @property
    def ttft_s(self) -> list[float]:
        """P50, P90 and P99."""
        return np.percentile([each.ttft_s for each in self.met], (50, 90, 99)).tolist()


def met_in(window: Window) -> list[Met]:
    """Of each request that came in the window, in order."""
    return [
        _met(served.num_prompt_tokens, served.token_times_s, served.finished,
             window.stop_s, served.arrival_s)
        for served in window.simulation.served
        if served.arrival_s >= window.start_s
    ]  # fmt: skip


def _met(
    num_prompt_tokens: int, times_s: Sequence[float], finished: bool, stop_s: float, came_s: float
) -> Met:
    age_s = stop_s - came_s
    if not times_s:
        return Met(num_prompt_tokens, age_s, age_s, 0.0)
    gaps = np.diff(times_s if finished else [*times_s, stop_s])
    tbt_p99_s = float(np.percentile(gaps, 99)) if len(gaps) else 0.0
    return Met(num_prompt_tokens, age_s, times_s[0] - came_s, tbt_p99_s)


def _normalised_s(window: Window) -> list[float]:
    seconds = [
        (served.token_times_s[-1] - served.arrival_s) / served.max_tokens
        for served in window.simulation.served
        if served.finished and served.token_times_s[-1] >= window.start_s
    ]
    return np.percentile(seconds, (50, 90, 99)).tolist() if seconds else []


def ttft_limit_s(num_prompt_tokens: int, slo_tbt_s: float) -> float:
    return slo_tbt_s + TTFT_PER_TOKEN_S * num_prompt_tokens


def good_shares(met: Sequence[Met], slo_tbt_s: float) -> tuple[float, list[float]]:
    """Share of requests that met both limits, and of each quarter of them, shortest prompts first.
    Those that came too late in the window to be judged are left out, whatever they met so far."""
    verdicts = []
    for each in by_length(met):
        limit_s = ttft_limit_s(each.num_prompt_tokens, slo_tbt_s)
        if each.age_s >= limit_s:
            verdicts.append(each.ttft_s <= limit_s and each.tbt_p99_s <= slo_tbt_s)
    quarters = np.array_split(verdicts, 4)
    return float(np.mean(verdicts)), [float(np.mean(quarter)) for quarter in quarters]


def is_good(met: Sequence[Met], slo_tbt_s: float) -> bool:
    """Whether enough requests met both limits, of all and of each quarter."""
    share, of_quarters = good_shares(met, slo_tbt_s)
    return share >= SHARE and min(of_quarters) >= SHARE_OF_QUARTER


def ttft_by_length(met: Sequence[Met], num_groups: int = 10) -> list[tuple[int, float, float]]:
    """Of groups of equally many requests, shortest prompts first: median length, and P50 and P90 of
    the time to first token."""
    in_order, found = by_length(met), []
    for places in np.array_split(range(len(in_order)), num_groups):
        group = [in_order[place] for place in places]
        p50, p90 = np.percentile([each.ttft_s for each in group], (50, 90)).tolist()
        found.append((group[len(group) // 2].num_prompt_tokens, p50, p90))
    return found


def by_length(met: Sequence[Met]) -> list[Met]:
    return sorted(met, key=lambda each: each.num_prompt_tokens)
