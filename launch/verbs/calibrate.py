"""`pipeserve calibrate`: measures the device at hand, and makes a cost profile of it.

A designed workload runs on real stages, as any other would; what they took for each microbatch is
fitted (`profiling/calibration/fit_tables.py`). docs/cost-model.md has the method.
"""

import statistics
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from itertools import count
from random import Random
from typing import TYPE_CHECKING

from pipeserve.configs import RunConfig
from pipeserve.core.cost.device import DeviceProfile, Link, Residuals
from pipeserve.core.nouns import RequestId
from pipeserve.core.records import Headed, Span
from pipeserve.launch.verbs.bench import run_items
from pipeserve.profiling.calibration.all_reduces import fit_all_reduce, without_sums
from pipeserve.profiling.calibration.fit_tables import Fit, fit_tables
from pipeserve.profiling.calibration.samples import Samples
from pipeserve.profiling.recording.recording import Ring
from pipeserve.profiling.recording.summary import RequestRecord
from pipeserve.profiling.simulation.workloads import (
    DISTRIBUTIONS,
    WorkItem,
    draw_lengths,
    random_items,
)

if TYPE_CHECKING:
    from pipeserve.driver.driver import Driver

_PASSES = 2
_PROMPTS = (1, 3, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
_BATCHES = ((1, 16), (4, 16), (16, 16), (1, 200), (4, 200), (16, 200), (1, 800), (4, 800))
"""(requests, mean prompt tokens) that decode together. Each prompt has a quarter to seven quarters
of the mean: kernels may pad contexts to the longest, as they do when they serve."""
_BATCH_TOKENS = 16
_MIXED_REQUESTS = 32
_MIXED_SCALE = 8
_PROBES = 8
_FAST = 1e11
"""Bytes a second where a large message took no longer than a small one."""


def measured_run(config: RunConfig, num_layers: int) -> RunConfig:
    """The run that is measured: the one wanted, but under a policy that asks for no cost, with the
    head on the last stage alone and, unless the user listed layers, with stages that differ by
    layers. What a stage costs beside its
    layers shows only then. The first stage has about twice as many as each other."""
    config = replace(config, policy="sarathi_serve", head_stages="last")
    num_stages = config.pipeline_parallel_size
    if num_stages == 1 or num_stages > num_layers or config.pipeline_layers is not None:
        return config
    others = max(1, num_layers // (num_stages + 1))
    first = num_layers - others * (num_stages - 1)
    return replace(config, pipeline_layers=(first, *([others] * (num_stages - 1))))


def calibrate(
    driver: "Driver", ring: Ring, samples: Samples, device: str, memory_bytes: int
) -> tuple[DeviceProfile, Fit]:
    """Runs the design and fits a profile to it. `ring` has the driver's records, `samples` is its
    cost model, `device` and `memory_bytes` are what the machine is called and has.

    Raises ConfigError when too little could be observed, and StageError.
    """
    rng = Random(f"{driver.config.seed}/calibrate")
    ids = map(RequestId, count())
    phases = _design(driver, rng)
    for number in range(_PASSES + 1):
        if number == 1:
            samples.taken.clear()  # the first pass warmed up: kernels compile once for each shape
        for phase in phases:
            run_items(driver, phase, f"pass {number}", ids)
    driver.settle()
    size, spans = driver.config.tensor_parallel_size, ring.spans()
    fit = fit_tables(
        without_sums(samples.taken, spans),
        driver.plan,
        driver.shape,
        dtype=driver.dtype,
        threads=1,
        tensor_parallel_size=size,
    )
    all_reduce = ()
    if size > 1:
        all_reduce = (fit_all_reduce(spans, driver.plan, driver.shape, size),)
    control_s, link = _measure_messages(driver, ring, rng, ids)
    profile = DeviceProfile(
        name=device,
        provenance={
            "made": f"pipeserve calibrate, {date.today()}",
            "observations": str(len(samples.taken)),
            "error": f"median {fit.median_error:.1%} on held-out observations",
            "stages": "layers " + ",".join(str(s.num_layers) for s in driver.plan.stages),
        },
        memory_bytes=memory_bytes,
        devices_per_node=driver.topology.num_ranks,
        attention=fit.attention,
        tables=fit.tables,
        all_reduce=all_reduce,
        intra_node=link,
        inter_node=link,
        host_s=fit.host_s,
        control_s=control_s,
        residuals=Residuals(jitter=fit.jitter),
    )
    return profile, fit


def _design(driver: "Driver", rng: Random) -> list[list[WorkItem]]:
    """Requests, phase by phase, that take the stages through what serving does: prompts of all
    lengths, decodes few and many over short contexts and long ones, and a mix of both.

    As many times each as there are stages, so that all of them work at once: cores share caches,
    memory and sometimes more, and a stage alone on the machine is faster than when it serves.
    """
    vocab_size, longest = driver.shape.vocab_size, driver.limits.max_model_len
    num_stages = len(driver.stages)
    phases = [[(length, 1)] * num_stages for length in _PROMPTS]
    phases += [
        [(rng.randint(mean // 4, 7 * mean // 4), _BATCH_TOKENS) for _ in range(num * num_stages)]
        for num, mean in _BATCHES
    ]
    mixed = draw_lengths(DISTRIBUTIONS["sharegpt"], _MIXED_REQUESTS, rng)
    phases.append([(1 + p // _MIXED_SCALE, 1 + o // _MIXED_SCALE) for p, o in mixed])
    fitting = [[pair for pair in phase if sum(pair) <= longest] for phase in phases]
    return [random_items(phase, 1, vocab_size, rng) for phase in fitting if phase]


def _measure_messages(
    driver: "Driver", ring: Ring, rng: Random, ids: Iterator[RequestId]
) -> tuple[float, Link]:
    """Seconds of one message of the driver, and of activations between stages.

    A lone request's time beside its stages' compute is two messages of the driver and a hop for
    each seam. A hop of few bytes counts as a message, for both are one message of the same socket
    library; what a large one takes longer is its bytes.
    """
    most = driver.limits.max_num_batched_tokens
    large = min(most, driver.limits.max_model_len - 1)
    seams = len(driver.stages) - 1
    small_s = _beside_compute_s(driver, ring, 1, rng, ids)
    message_s = max(small_s / (2 + seams), 1e-6)
    if not seams:
        return message_s, Link(alpha_s=message_s, bytes_per_s=_FAST)
    more_s = max(_beside_compute_s(driver, ring, large, rng, ids) - small_s, 0.0) / seams
    more_bytes = (large - 1) * driver.shape.link_bytes_per_token
    rate = more_bytes / more_s if more_s > more_bytes / _FAST else _FAST
    return message_s, Link(alpha_s=message_s, bytes_per_s=rate)


def _beside_compute_s(
    driver: "Driver", ring: Ring, num_tokens: int, rng: Random, ids: Iterator[RequestId]
) -> float:
    """Median seconds of a lone prompt's first token that no stage computed."""
    beside = []
    for probe in range(_PROBES):
        (item,) = random_items([(num_tokens, 1)], 1, driver.shape.vocab_size, rng)
        ring.clear()
        (record,) = run_items(driver, [item], f"probe {num_tokens}/{probe}", ids)
        driver.settle()
        computed_s = sum(did.end_s - did.start_s for did in ring if isinstance(did, Span | Headed))
        beside.append(_ttft_s(record) - computed_s)
    return statistics.median(beside)


def _ttft_s(record: RequestRecord) -> float:
    return record.token_times_s[0] - record.arrival_s
