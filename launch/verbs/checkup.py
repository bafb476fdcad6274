"""What can be found out of a pipeline that was formed without weights (`launch/run/unloaded.py`).

Stages time made-up layers, microbatches of zeros cross the links, and a simulation on what was
measured looks ahead.
"""

import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from math import inf
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from pipeserve.core.cost.partition import decodes
from pipeserve.core.engine import Engine
from pipeserve.core.nouns import PipelinePlan, RequestId
from pipeserve.core.policies import get_policy
from pipeserve.core.records import Ping, Span
from pipeserve.core.work import PartSeconds, Work
from pipeserve.driver import layer_choice
from pipeserve.driver.layout import usual_of
from pipeserve.launch.run.record import meta_of_driver, stage_shares
from pipeserve.launch.verbs.bench import run_items
from pipeserve.machine import boot_id
from pipeserve.profiling.recording.clocks import align
from pipeserve.profiling.recording.recording import Recording, Ring, recording_of
from pipeserve.profiling.recording.summary import summarize
from pipeserve.profiling.simulation.measured_times import MeasuredTimes, Seam
from pipeserve.profiling.simulation.simulator import (
    SimulatedPipeline,
    Simulation,
    arrivals_in_order,
)
from pipeserve.profiling.simulation.workloads import DISTRIBUTIONS, draw_lengths, random_items
from pipeserve.wire.control import Examined

if TYPE_CHECKING:
    from pipeserve.driver.driver import Driver

_PROBES = 10
_LOOK_S = 0.5
_PINGS = 5
_MOST_PINGING_S = 15.0
_LEAST_DIFFERENCE_S = 2e-6
"""Between a large message and a small one, that tells a rate."""
_LOOK_AHEAD = 100
"""Requests of the simulation."""


class Clock(NamedTuple):
    """Of a stage's machine against the driver's."""

    ahead_s: float
    within_s: float
    """0: it is the same clock."""


class Forecast(NamedTuple):
    """What a load would give, on what was measured."""

    load: str
    output_tokens_per_s: float
    busy: tuple[float, ...]
    """Of each stage, the share of the time."""


class Shared(NamedTuple):
    """Of a microbatch on a stage that several ranks share."""

    sums_s: float
    """They add up what each has computed."""
    wait_s: float
    """The one that is first with its own waits for the one that is last."""


@dataclass(slots=True, kw_only=True)
class Checkup:
    """What was found."""

    works: tuple[Work, ...]
    """That were timed: decodes alone, and a usual microbatch."""
    examined: list[Examined]
    """Of each rank."""
    work_s: list[list[float]]
    """For each of the works, what every stage would take."""
    shared_s: list[list[Shared]]
    """Likewise, in that time; nothing where each stage has a rank."""
    seams: list[Seam]
    feedback_s: float
    """Of sampled tokens, from the last stage to the first."""
    control_s: float
    """Of a plan, to the first stage."""
    clocks: list[Clock]
    forecast: Forecast
    lacks: list[str] = field(default_factory=list)
    """Why weights and KV do not fit; else empty."""


def check_up(driver: "Driver", ring: Ring, lacks: list[str]) -> Checkup:
    """Of a fleet that was formed `without_weights`. `ring` has the driver's records. Raises
    StageError."""
    usual = usual_of(driver.config, driver.limits.max_model_len)
    few = decodes(max(usual.num_logits // 5, 1), driver.limits.max_model_len)
    works = (few, usual) if few.num_tokens < usual.num_tokens else (usual,)
    examined = driver.examine(works, layer_choice.EXAMINE_S)
    recording = _probe(driver, ring)
    aligned = align(recording)
    seams, feedback_s, control_s = _seams(aligned.recording)
    times = MeasuredTimes(
        driver.plan,
        works,
        [_slowest(examined, stage.ranks) for stage in driver.plan.stages],
        seams,
        driver.shape.link_bytes_per_token,
        feedback_s,
        control_s,
    )
    return Checkup(
        works=works,
        examined=examined,
        work_s=[times.seconds(work) for work in works],
        shared_s=[_shared(driver.plan, examined, number) for number in range(len(works))],
        seams=seams,
        feedback_s=feedback_s,
        control_s=control_s,
        clocks=_clocks(recording, aligned.recording, aligned.residuals_s),
        forecast=_look_ahead(driver, times),
        lacks=lacks,
    )


def _slowest(examined: Sequence[Examined], ranks: Sequence[int]) -> Sequence[PartSeconds]:
    """Of the ranks of a stage, what the one took for which the others wait."""
    return max([examined[rank].parts for rank in ranks], key=lambda parts: sum(parts[-1].layers))


def _shared(plan: PipelinePlan, examined: Sequence[Examined], number: int) -> list[Shared]:
    """Of every stage, for the work of that number."""
    found = []
    for stage in plan.stages:
        if len(stage.ranks) > 1:
            parts = [examined[rank].parts[number] for rank in stage.ranks]
            layers_s = [sum(each.layers[stage.first_layer : stage.stop_layer]) for each in parts]
            sums_s = stage.num_layers * parts[0].all_reduce
            found.append(Shared(sums_s, max(layers_s) - min(layers_s)))
    return found


# ---- what lies between stages -------------------------------------------------------------------


def _probe(driver: "Driver", ring: Ring) -> Recording:
    """Lone requests, each of one prompt and one decode: microbatches as small and as large as
    they come, one at a time."""
    rng, ids = Random(0), map(RequestId, count())
    limits = driver.limits
    largest = max(min(limits.max_num_batched_tokens, limits.max_model_len - 2), 1)
    for probe in range(_PROBES):
        items = random_items([(1, 2), (largest, 2)], 1, driver.shape.vocab_size, rng)
        for item in items:
            run_items(driver, [item], f"probe {probe}", ids)
    until_s = time.monotonic() + _MOST_PINGING_S
    while _unasked(driver, ring) and time.monotonic() < until_s:
        driver.outputs(_LOOK_S)
    driver.settle()
    return recording_of(ring, len(driver.plan.stages), meta_of_driver(driver))


def _unasked(driver: "Driver", ring: Ring) -> list[int]:
    """Stages on other machines, whose clocks were not asked often enough yet."""
    asked = Counter(record.stage for record in ring if isinstance(record, Ping))
    keepers, here = driver.fleet.keepers, boot_id()
    return [
        stage.stage
        for stage in driver.plan.stages
        if keepers[stage.ranks[0]].boot_id != here and asked[stage.stage] < _PINGS
    ]


def _seams(recording: Recording) -> tuple[list[Seam], float, float]:
    """Each of them; of the tokens' way back, and of plans."""
    by_index = [{span.index: span for span in spans} for spans in recording.spans]
    seams = []
    for before, behind in pairwise(by_index):
        hops = [
            (span.num_bytes, behind[index].input_s - span.sent_s)
            for index, span in before.items()
            if index in behind
        ]
        seams.append(_seam(hops))
    first, last = by_index[0], by_index[-1]
    headed = {head.index for head in recording.headed}  # their tokens have no way back
    back = [
        first[index + 1].input_s - span.sent_s
        for index, span in last.items()
        if index not in headed and index + 1 in first and first[index + 1].input_s > span.sent_s
    ]
    plans = {planned.index: planned.sent_s for planned in recording.planned}
    control = [span.plan_s - plans[index] for index, span in first.items() if index in plans]
    return seams, _median(back if len(by_index) > 1 else []), _median(control)


def _seam(hops: Sequence[tuple[int, float]]) -> Seam:
    sizes = [num_bytes for num_bytes, _ in hops]
    small, large = min(sizes), max(sizes)
    latency_s = _median(seconds for num_bytes, seconds in hops if num_bytes == small)
    more_s = _median(seconds for num_bytes, seconds in hops if num_bytes == large) - latency_s
    rate = (large - small) / more_s if more_s > _LEAST_DIFFERENCE_S else inf
    return Seam(latency_s=latency_s, bytes_per_s=rate)


def _median(values: Iterable[float]) -> float:
    return max(statistics.median([*values] or [0.0]), 0.0)


def _clocks(recording: Recording, aligned: Recording, residuals_s: Sequence[float]) -> list[Clock]:
    def first(spans: Sequence[Span]) -> float:
        return spans[0].start_s if spans else 0.0

    return [
        Clock(first(own) - first(moved), residual)
        for own, moved, residual in zip(recording.spans, aligned.spans, residuals_s, strict=True)
    ]


# ---- what would come of it ----------------------------------------------------------------------


def _look_ahead(driver: "Driver", times: MeasuredTimes) -> Forecast:
    """Requests of ShareGPT's lengths, all at once, as short as the context wants them."""
    limits, plan = driver.limits, driver.plan
    lengths = draw_lengths(DISTRIBUTIONS["sharegpt"], _LOOK_AHEAD, Random(0))
    room = min(limits.max_model_len, limits.num_blocks * limits.block_size)
    scale = max(1.0, max(map(sum, lengths)) / room)
    scaled = [(max(int(p / scale), 1), max(int(o / scale), 1)) for p, o in lengths]
    fitting = [pair for pair in scaled if sum(pair) <= room]
    ring, load = Ring(), f"{len(fitting)} requests of ShareGPT at once"
    if scale > 1:
        load += f", lengths divided by {scale:.1f}"
    engine = Engine(plan, get_policy(driver.config.policy), limits)
    pipeline = SimulatedPipeline(engine, times, ring.record)
    simulation = Simulation(pipeline, arrivals_in_order([0.0] * len(fitting), fitting))
    simulation.run_until()
    summary = summarize([served.record() for served in simulation.served])
    shares = stage_shares(recording_of(ring, len(plan.stages), meta_of_driver(driver)))
    busy = tuple(share["busy"] for share in shares)
    return Forecast(load, summary.output_tokens_per_s, busy)
