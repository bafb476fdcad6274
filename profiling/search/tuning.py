"""The search behind `pipeserve tune`: which layout, layer split, window and policy serve best.

Candidates go in and come out ranked; how one is tried is handed in, so nothing here simulates. The
search is successive halving (Karnin, Koren, Somekh: "Almost optimal exploration in multi-armed
bandits", ICML 2013): all are tried shortly, the best go on to what takes longer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from pipeserve.core.cost.device import DeviceProfile, check_profile
from pipeserve.core.cost.partition import plan_pipeline
from pipeserve.core.cost.shape import ModelShape
from pipeserve.errors import ConfigError

POLICIES: Mapping[str, Sequence[int | None]] = {
    "uniform": (2048,),
    "sarathi_serve": (256, 512, 1024, 2048),
    "token_throttle": (1024, 2048),
}
"""Each with its knob, `max_num_batched_tokens`: to `uniform` a limit that it hardly reaches."""
GOES_ON = 3
"""One of so many goes on from the first round to the second."""
NUM_LAST = 3
"""So many go on to the last round, beside the best of every other policy."""
_SPLIT_TOKENS = 512  # of the microbatches that a default split evens out


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is searched of a run, each field as in RunConfig."""

    tensor_parallel_size: int
    pipeline_parallel_size: int
    pipeline_layers: tuple[int, ...] | None
    pipeline_window: int | None
    policy: str
    max_num_batched_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a candidate gave, measured at one rate."""

    rate: float
    """Requests a second; of a capacity, the capacity."""
    output_tokens_per_s: float
    ttft_p50_s: float
    tbt_p99_s: float
    is_within: bool
    """The SLO: P99 of the time between tokens, and requests do not pile up."""
    capacity_rps: float | None = None
    """Where it was searched for; 0: at no rate within the SLO."""


@dataclass(frozen=True, slots=True)
class Tried:
    """A candidate, with what it gave in the last round that it came to (from 0)."""

    candidate: Candidate
    round: int
    found: Found


# ---- candidates ---------------------------------------------------------------------------------


def layouts(num_gpus: int, shape: ModelShape, profile: DeviceProfile) -> list[tuple[int, int]]:
    """(TP, PP) that use all GPUs: TP divides the heads and the profile knows its all-reduce, every
    stage has a layer. Raises ConfigError when there are none."""
    found, reason = [], ""
    for size in (size for size in range(1, num_gpus + 1) if num_gpus % size == 0):
        try:
            shape.check_divides(size)
            check_profile(profile, tensor_parallel_size=size)
            if size > 1:
                profile.all_reduce_of(size)
            plan_pipeline(shape, num_gpus // size, None, _SPLIT_TOKENS)
        except ConfigError as error:
            reason = str(error)
        else:
            found.append((size, num_gpus // size))
    if not found:
        raise ConfigError(f"no layout of {shape.name} takes {num_gpus} GPUs; the last: {reason}")
    return found


def candidates(
    shape: ModelShape,
    sizes: Iterable[tuple[int, int]],
    policies: Mapping[str, Sequence[int | None]] = POLICIES,
) -> Iterator[Candidate]:
    """Every combination for these (TP, PP): layers split by default and with the head relieved, a
    window of P and of P + 1, each policy with its knobs."""
    for tensor, stages in sizes:
        splits = [None, *relieved(shape, stages)]
        windows = (stages, stages + 1)
        for (policy, knobs), layers, window in product(policies.items(), splits, windows):
            for knob in knobs:
                yield Candidate(tensor, stages, layers, window, policy, knob)


def relieved(shape: ModelShape, num_stages: int) -> list[tuple[int, ...]]:
    """The default split with a layer of the last stage, which also has the head, given to the
    stage with the fewest; none where it has no layer to give."""
    plan = plan_pipeline(shape, num_stages, None, _SPLIT_TOKENS)
    counts = [stage.num_layers for stage in plan.stages]
    if num_stages == 1 or counts[-1] == 1:
        return []
    fewest = min(range(num_stages - 1), key=counts.__getitem__)
    counts[fewest] += 1
    counts[-1] -= 1
    return [tuple(counts)]


# ---- the search ---------------------------------------------------------------------------------

Evaluate = Callable[[Sequence[Candidate]], Iterable[tuple[Candidate, Found | None]]]
"""Tries each, in any order; None for one that cannot run."""


def halve(
    candidates: Sequence[Candidate], rounds: Sequence[Evaluate], slo_tbt_s: float
) -> list[Tried]:
    """All that can run, ranked: those of the last round first, best first. Few candidates go to the
    last round at once. The result does not depend on the order in which evaluations come."""
    left, ranked = list(candidates), []
    first = len(rounds) - 1 if len(left) <= NUM_LAST else 0
    for number in range(first, len(rounds)):
        found = dict(rounds[number](left))
        tried = [Tried(each, number, found[each]) for each in left if found[each] is not None]
        tried.sort(key=lambda each: merit(each.found, slo_tbt_s), reverse=True)
        ranked = [*tried, *(each for each in ranked if each.candidate not in found)]
        is_next_last = number == len(rounds) - 2
        left = _going_on(tried, NUM_LAST if is_next_last else max(NUM_LAST, len(tried) // GOES_ON))
    return ranked


def _going_on(ranked: Sequence[Tried], num: int) -> list[Candidate]:
    """The best, and in any case the best of each policy: what is cheap to measure may treat
    policies unequally."""
    first_of = {each.candidate.policy: each for each in reversed(ranked)}
    best = {*ranked[:num], *first_of.values()}
    return [each.candidate for each in ranked if each in best]


def merit(found: Found, slo_tbt_s: float) -> tuple[float, ...]:
    """The larger, the better. Of capacities the highest, and of equal ones the shortest time to the
    first token. At one rate for all, who is within the SLO, by time to the first token; else by
    tokens a second, less where tokens come late."""
    if found.capacity_rps is not None:
        return (found.capacity_rps, -found.ttft_p50_s)
    if found.is_within:
        return (1.0, -found.ttft_p50_s)
    return (0.0, found.output_tokens_per_s * min(1.0, slo_tbt_s / found.tbt_p99_s))
