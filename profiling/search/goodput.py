"""Goodput: the highest request rate at which enough requests meet their latency targets.

As DistServe defines it (OSDI'24, sections 1 and 6): a request is good when its time to first token
and its mean time per output token are both within the SLO, and 90 % of all must be good.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, inf, log2
from typing import NamedTuple, Protocol

import numpy as np

from pipeserve.errors import ConfigError
from pipeserve.profiling.simulation.simulator import Served


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Latency targets of a request, and the share of requests that must meet them."""

    ttft_s: float
    """Arrival to first token."""
    tpot_s: float
    """First to last token, over the tokens after the first."""
    share: float = 0.9

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            if not 0 < getattr(self, name) < inf:
                raise ConfigError(
                    f"the SLO's {name} is {getattr(self, name)}: must be over 0 and finite"
                )
        if not 0 < self.share <= 1:
            raise ConfigError(f"the attainment is {self.share}: must be over 0 and at most 1")


class Attainment(NamedTuple):
    """Shares of requests, 0 to 1, that were within the SLO. Unfinished requests were not."""

    ttft: float
    tpot: float
    both: float


class Running(Protocol):
    """A simulation under way: `Simulation` or `DisaggregatedSimulation`."""

    served: list[Served]

    def run_until(self, stop_s: float = ...) -> None: ...


def ttft_s(request: Served) -> float:
    """Of a request that has its first token."""
    return request.token_times_s[0] - request.arrival_s


def tpot_s(request: Served) -> float:
    """Of a request that has ended; 0 for one of a single token."""
    times = request.token_times_s
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0


def attainment(requests: Sequence[Served], slo: Slo) -> Attainment:
    """Of at least one request."""
    ttft = [bool(r.token_times_s) and ttft_s(r) <= slo.ttft_s for r in requests]
    tpot = [r.finished and tpot_s(r) <= slo.tpot_s for r in requests]
    both = sum(map(all, zip(ttft, tpot, strict=True)))
    return Attainment(sum(ttft) / len(ttft), sum(tpot) / len(tpot), both / len(ttft))


def meets_separately(requests: Sequence[Served], slo: Slo) -> bool:
    """DistServe's published code does not ask for both of the same request: a percentile of each
    is within its target (`simulate_dist.py`), which up to 20 % of bad requests can pass."""
    ttft = np.quantile([ttft_s(r) for r in requests], slo.share)
    tpot = np.quantile([tpot_s(r) for r in requests], slo.share)
    return bool(ttft < slo.ttft_s and tpot < slo.tpot_s)


def meets(simulation: Running, slo: Slo, num_ramp: int, num_counted: int, rate: float) -> bool:
    """Whether enough of `num_counted` requests are good, after `num_ramp` that are not counted.

    Give it arrivals without end: what comes later loads the system until the counted requests are
    decided, so there is no drain. It stops as soon as the answer is known. A request is bad, not
    awaited, from when it can no longer be good, so this ends under any overload. Raises ValueError
    where too few requests come.
    """
    num_wanted = num_ramp + num_counted
    most_bad = num_counted - slo.share * num_counted
    expected_s = num_wanted / rate
    stop_s = expected_s
    while True:
        simulation.run_until(stop_s)
        counted = simulation.served[num_ramp:num_wanted]
        verdicts = [_is_good(request, slo, stop_s) for request in counted]
        if verdicts.count(False) > most_bad + 1e-9:
            return False
        if len(counted) == num_counted and None not in verdicts:
            return True
        if len(counted) < num_counted and stop_s > 10 * expected_s:
            raise ValueError(f"{len(simulation.served)} of {num_wanted} requests came")
        stop_s += expected_s / 4


def _is_good(request: Served, slo: Slo, now: float) -> bool | None:
    """None while it may still be good."""
    times = request.token_times_s
    if (times[0] if times else now) - request.arrival_s > slo.ttft_s:
        return False
    if request.finished:
        return tpot_s(request) <= slo.tpot_s
    if times and now - times[0] > slo.tpot_s * (request.max_tokens - 1):
        return False
    return None


def find_goodput(
    is_met: Callable[[float], bool],
    highest: float,
    resolution: float,
    beat: float = 0.0,
    widen: bool = False,
) -> float:
    """The highest rate below `highest` that is met, by bisection; 0 when no rate tried is met.

    With `widen`, a `highest` that is itself met is doubled until it is not, 16 times at most.

    Rates are multiples of `highest` / 2^k, the first step that is at most `resolution`, as in
    DistServe's search; it ends after k trials, whatever `is_met` says. With `beat`, the first rate
    above that one is asked for first, and 0 is the answer where it is not met: a search for the
    best of many needs no more of the others. Raises ConfigError for a bracket that cannot be
    halved.
    """
    if not 0 < resolution < highest < float("inf"):
        raise ConfigError(
            f"searching up to {highest} requests a second in steps of {resolution}: the step must "
            "be over 0 and under the highest rate"
        )
    num_steps = 2 ** ceil(log2(highest / resolution))
    step = highest / num_steps
    low, high = int(beat / step + 1e-9), num_steps
    for _ in range(16 * widen):
        if not is_met(high * step):
            break
        low, high = high, 2 * high
    if beat and low < num_steps:
        low += 1
        if low >= high or not is_met(low * step):
            return 0.0
    while high - low > 1:
        middle = (low + high) // 2
        if is_met(middle * step):
            low = middle
        else:
            high = middle
    return low * step
