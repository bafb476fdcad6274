"""Capacity: the highest request rate that a pipeline serves within its latency limits.

As Sarathi-Serve defines it (OSDI'24, section 5): P99 of the time between tokens within the SLO, and
a median queueing delay of at most 2 s. Its search ran 2,048 requests a trial with their ends; here
a trial is measured in a window, after a ramp and before any drain, because fill and tail of a short
run move the result (the tail of long outputs most).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np

from pipeserve.core.nouns import Chunk, Microbatch, RequestId
from pipeserve.errors import ConfigError
from pipeserve.profiling.simulation.simulator import (
    Arrival,
    Served,
    SimulatedPipeline,
    Simulation,
)
from pipeserve.profiling.simulation.stage_times import StageTimes

MAX_MEDIAN_DELAY_S = 2.0
RAMP_LIFETIMES = 2
WINDOW_LIFETIMES = 5
RESOLUTION = 0.025
"""The search ends when the bracket is this share of the rate wide, as in the published artefact."""
MIN_WINDOW_S = 2 * MAX_MEDIAN_DELAY_S / RESOLUTION
"""An overload by `RESOLUTION` lets the queue grow until the median delay is over its limit."""
_MOST_DOUBLED = 64
_LEAST_GAPS = 0.01
"""Times between tokens that a request has, in the mean. A trial runs until it has seen a hundred of
them: with fewer it would go on and on."""

Lengths = Sequence[tuple[int, int]]
"""(prompt tokens, output tokens)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One rate, measured in a window of virtual time."""

    rate: float
    window_s: float
    lifetime_s: float
    """Mean time of a request from its first chunk to its last token."""
    requests: int
    """Arrived in the window."""
    tbt_p99_s: float
    queueing_p50_s: float
    """From arrival to the first chunk; of one that still waits, until the window's end."""
    ttft_p50_s: float
    """From arrival to the first token; of one that has none, until the window's end."""
    ttft_p99_s: float
    output_tokens_per_s: float
    busy: tuple[float, ...]
    """Share of the window in which each stage computed."""

    def within(self, slo_tbt_s: float) -> bool:
        return self.tbt_p99_s <= slo_tbt_s and self.queueing_p50_s <= MAX_MEDIAN_DELAY_S


class Window(NamedTuple):
    """A simulation under load, run until it had served long enough to be measured."""

    simulation: Simulation
    rate: float
    """Requests a second that came."""
    lifetime_s: float
    """As `Trial.lifetime_s`."""
    start_s: float
    """The ramp is over: what is measured begins here."""
    stop_s: float
    """As far as it ran."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What `find_capacity` found."""

    rate: float
    """Requests a second; 0 when no rate is within the limits."""
    ceiling: float
    """What `ceiling_rate` estimates."""
    trials: tuple[Trial, ...]
    """In the order in which they ran."""

    def best(self, slo_tbt_s: float) -> Trial | None:
        """The trial of the highest rate that is within the limits."""
        good = [trial for trial in self.trials if trial.within(slo_tbt_s)]
        return max(good, key=lambda trial: trial.rate, default=None)


def check_has_gaps(workload: str, lengths: Lengths) -> None:
    """Raises ConfigError where there is too little time between tokens to go by."""
    if sum(output - 1 for _, output in lengths) < _LEAST_GAPS * len(lengths):
        num_one = sum(output == 1 for _, output in lengths)
        raise ConfigError(
            f"{num_one:,} of {len(lengths):,} requests of {workload} have one output token: too "
            "few times between tokens to go by; give another workload"
        )


def poisson_arrivals(
    lengths: Lengths, rate: float, seed: int, priorities: Sequence[int] = ()
) -> Iterator[Arrival]:
    """Requests without end: lengths drawn from `lengths`, each with its priority of `priorities`
    (parallel; empty: all 0), arrivals a Poisson process of `rate` a second. The n-th request of a
    seed is the same at every rate."""
    priorities = priorities or [0] * len(lengths)
    rng = Random(f"{seed}/poisson")
    now = 0.0
    while True:
        now += rng.expovariate(1.0) / rate
        number = rng.randrange(len(lengths))
        yield Arrival(now, *lengths[number], priorities[number])


def run_trial(
    make_pipeline: Callable[[], SimulatedPipeline],
    lengths: Lengths,
    rate: float,
    min_requests: int,
    seed: int,
    lifetimes: int = WINDOW_LIFETIMES,
    ramp: int = RAMP_LIFETIMES,
    priorities: Sequence[int] = (),
) -> Trial:
    """What `rate` requests a second meet: `run_window`, measured."""
    return measure(
        run_window(make_pipeline, lengths, rate, min_requests, seed, lifetimes, ramp, priorities)
    )


def run_window(
    make_pipeline: Callable[[], SimulatedPipeline],
    lengths: Lengths,
    rate: float,
    min_requests: int,
    seed: int,
    lifetimes: int = WINDOW_LIFETIMES,
    ramp: int = RAMP_LIFETIMES,
    priorities: Sequence[int] = (),
) -> Window:
    """Serves `rate` requests a second for a window of at least so many mean lifetimes and
    `min_requests` arrivals, after a ramp of so many. `priorities`: parallel to `lengths`, or empty.

    A lifetime is the mean over the workload, from what was seen of tokens and not of ended
    requests: those that have ended by some time are the short ones.
    """
    simulation = Simulation(make_pipeline(), poisson_arrivals(lengths, rate, seed, priorities))
    mean_output = sum(output for _, output in lengths) / len(lengths)
    ramp_s = stop_s = min_requests / rate / 10
    while True:
        simulation.run_until(stop_s)
        lifetime_s = _lifetime_s(simulation.served, ramp_s / 2, mean_output)
        if lifetime_s is not None:
            ramp_s = ramp * lifetime_s
            wanted_s = ramp_s + max(lifetimes * lifetime_s, min_requests / rate, MIN_WINDOW_S)
            if stop_s >= wanted_s:
                return Window(simulation, rate, lifetime_s, ramp_s, stop_s)
            # Lifetimes grow while the pipeline fills: go on in steps, and ask again.
            stop_s = min(wanted_s, 2 * stop_s)
        else:
            stop_s *= 2


def find_capacity(
    trial: Callable[[float], Trial],
    slo_tbt_s: float,
    ceiling: float,
    lone: Trial,
    resolution: float = RESOLUTION,
) -> Capacity:
    """Bisects down from `ceiling` to the highest rate whose trial is within the limits; should the
    ceiling itself be within them, down from the first of its doubles that is not.

    `lone` is a trial in which requests hardly meet: when even that is over the SLO, no rate is
    tried and the capacity is 0.
    """
    trials = [lone]
    if not lone.within(slo_tbt_s):
        return Capacity(rate=0.0, ceiling=ceiling, trials=tuple(trials))
    low, high = lone.rate, ceiling
    while (at_high := trial(high)).within(slo_tbt_s) and high < _MOST_DOUBLED * ceiling:
        trials.append(at_high)
        low, high = high, 2 * high
    trials.append(at_high)
    while high - low > resolution * high:
        trials.append(trial((low + high) / 2))
        if trials[-1].within(slo_tbt_s):
            low = trials[-1].rate
        else:
            high = trials[-1].rate
    return Capacity(rate=low, ceiling=ceiling, trials=tuple(trials))


def ceiling_rate(times: StageTimes, lengths: Lengths, num_tokens: int = 4096) -> float:
    """Requests a second that the slowest stage could serve if every microbatch had `num_tokens`
    tokens, prefill and decodes in the workload's own proportion: hardly a schedule comes near."""
    mean_prompt = sum(prompt for prompt, _ in lengths) / len(lengths)
    mean_output = sum(output for _, output in lengths) / len(lengths)
    per_request = mean_prompt + mean_output
    num_decodes = round(num_tokens * mean_output / per_request)
    context = round(mean_prompt + mean_output / 2)
    chunks = [Chunk(RequestId(i), context, context + 1, (), None, 1) for i in range(num_decodes)]
    prefill = num_tokens - num_decodes
    while prefill > 0:
        size = min(prefill, round(mean_prompt))
        chunks.append(Chunk(RequestId(len(chunks)), 0, size, (), None, 1))
        prefill -= size
    seconds = max(times.compute_s(Microbatch(0, tuple(chunks))))
    return num_tokens / per_request / seconds


def _lifetime_s(served: Sequence[Served], since_s: float, mean_output: float) -> float | None:
    """Mean seconds from first chunk to last token, from the requests that started after `since_s`;
    None while too few tokens were seen."""
    to_first, gaps, num_gaps = [], 0.0, 0
    for request in served:
        times = request.token_times_s
        if request.started_s is None or request.started_s < since_s or not times:
            continue
        to_first.append(times[0] - request.started_s)
        gaps += times[-1] - times[0]
        num_gaps += len(times) - 1
    if len(to_first) < 20 or num_gaps < 100:
        return None
    return sum(to_first) / len(to_first) + (mean_output - 1) * gaps / num_gaps


def measure(window: Window) -> Trial:
    simulation, rate, lifetime_s, start_s, stop_s = window
    gaps, num_tokens, delays, ttfts = [], 0, [], []
    for request in simulation.served:
        times = np.frombuffer(request.token_times_s)
        first = np.searchsorted(times, start_s)
        num_tokens += len(times) - first
        gaps.append(np.diff(times[max(first - 1, 0) :]))
        if request.arrival_s >= start_s:
            started_s = stop_s if request.started_s is None else request.started_s
            delays.append(started_s - request.arrival_s)
            ttfts.append((times[0] if len(times) else stop_s) - request.arrival_s)
    return Trial(
        rate=rate,
        window_s=stop_s - start_s,
        lifetime_s=lifetime_s,
        requests=len(delays),
        tbt_p99_s=float(np.percentile(np.concatenate(gaps), 99)),
        queueing_p50_s=float(np.median(delays)),
        ttft_p50_s=float(np.median(ttfts)),
        ttft_p99_s=float(np.percentile(ttfts, 99)),
        output_tokens_per_s=num_tokens / (stop_s - start_s),
        busy=busy_in(simulation.pipeline, start_s, stop_s),
    )


def busy_in(pipeline: SimulatedPipeline, start_s: float, stop_s: float) -> tuple[float, ...]:
    """Share of `[start_s, stop_s)` in which each stage computed: 0 to 1."""
    shape = (len(pipeline.flights), len(pipeline.engine.pipeline.stages))
    starts = np.array([flight.starts_s for flight in pipeline.flights]).reshape(shape)
    ends = np.array([flight.ends_s for flight in pipeline.flights]).reshape(shape)
    inside = np.minimum(ends, stop_s) - np.maximum(starts, start_s)
    busy = np.maximum(inside, 0).sum(axis=0)
    for head in (flight.head for flight in pipeline.flights if flight.head is not None):
        busy[0] += max(0.0, min(head.end_s, stop_s) - max(head.start_s, start_s))
    return tuple(float(s) for s in busy / (stop_s - start_s))
