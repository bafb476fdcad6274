"""Calibration: what stages took, fitted back to the tables that it was made from."""

from dataclasses import replace
from random import Random

import pytest
from made_up_profile import LINK, PLAN, SHAPE, TRUE

from pipeserve.core.cost.device import AllReduce, DeviceProfile
from pipeserve.core.cost.pipeline_cost import PipelineCost
from pipeserve.core.engine import Engine, Limits
from pipeserve.core.nouns import Chunk, Microbatch, RequestId
from pipeserve.core.policies import get_policy
from pipeserve.core.records import Span
from pipeserve.core.work import Work
from pipeserve.errors import ConfigError
from pipeserve.profiling.calibration.all_reduces import fit_all_reduce, without_sums
from pipeserve.profiling.calibration.fit_tables import fit_tables
from pipeserve.profiling.calibration.samples import Sample, Samples
from pipeserve.profiling.simulation.simulator import Arrival, SimulatedPipeline, Simulation
from pipeserve.profiling.simulation.stage_times import StageTimes


def draw_work(rng):
    """A microbatch of a serving mix: some prefill chunks, some decodes."""
    prefills = tuple(
        (rng.choice((0, 0, 64, 256)), rng.choice((3, 8, 20, 64, 130, 300)))
        for _ in range(rng.choice((0, 1, 1, 2)))
    )
    num_decodes = rng.choice((0, 1, 4, 9, 16, 30)) if prefills else rng.choice((1, 4, 16, 32))
    context = sum(rng.randint(16, 900) for _ in range(num_decodes))
    num_logits = num_decodes + sum(rng.random() < 0.5 for _ in prefills)
    num_tokens = num_decodes + sum(tokens for _, tokens in prefills)
    return Work(num_tokens, num_logits, prefills, num_decodes, context)


def draw_samples(count, noise=0.0, outliers=0.0, seed=0):
    rng = Random(seed)
    cost = PipelineCost(TRUE, SHAPE, PLAN)
    samples = []
    for _ in range(count):
        work = draw_work(rng)
        for stage, seconds in enumerate(cost.seconds(work)):
            seconds *= 1 + rng.gauss(0, noise)
            seconds *= 5 if rng.random() < outliers else 1
            samples.append(Sample(stage, work, seconds))
    return samples


def errors(fit, seed=99):
    """Relative errors of the fitted profile's predictions on microbatches that it has not seen."""
    profile = DeviceProfile(
        name="fitted",
        provenance=TRUE.provenance,
        memory_bytes=TRUE.memory_bytes,
        devices_per_node=2,
        attention=fit.attention,
        tables=fit.tables,
        intra_node=LINK,
        inter_node=LINK,
        host_s=fit.host_s,
    )
    true, found = PipelineCost(TRUE, SHAPE, PLAN), PipelineCost(profile, SHAPE, PLAN)
    rng = Random(seed)
    pairs = []
    for _ in range(200):
        work = draw_work(rng)
        pairs += zip(found.seconds(work), true.seconds(work), strict=True)
    return sorted(abs(a / b - 1) for a, b in pairs)


def fit(samples):
    return fit_tables(samples, PLAN, SHAPE, dtype="bfloat16", threads=1)


def test_without_noise_the_profile_comes_back():
    found = fit(draw_samples(600))
    off = errors(found)
    assert off[len(off) // 2] < 0.01 and off[-1] < 0.01
    assert found.attention.decode_bytes_per_s == pytest.approx(2e9, rel=0.1)
    assert found.attention.causal_flops_per_s == pytest.approx(20e9, rel=0.2)
    assert found.median_error < 0.01
    assert found.jitter < 0.01


def test_noise_shows_as_jitter_and_not_in_the_prediction():
    found = fit(draw_samples(1000, noise=0.05))
    assert found.jitter == pytest.approx(0.05, rel=0.25)
    off = errors(found)
    assert off[len(off) // 2] < 0.02


def test_a_stage_that_was_robbed_of_its_core_moves_little():
    off = errors(fit(draw_samples(1000, noise=0.02, outliers=0.05)))
    assert off[len(off) // 2] < 0.03


def test_nothing_comes_out_negative():
    found = fit(draw_samples(300, noise=0.3))
    numbers = [
        seconds for points in (found.tables.layer, found.tables.head) for _, seconds in points
    ]
    numbers += [found.host_s, found.attention.decode_sequence_s, found.attention.prefill_overhead_s]
    assert min(numbers) >= 0


def test_sums_of_ranks_that_share_a_stage_come_back_apart_from_the_rest():
    """A rank of three, and of each microbatch what its stages took, sums and all."""
    points = tuple((size * 1152, 1e-4 * size**0.8) for size in (1, 16, 300))
    true = replace(
        TRUE,
        devices_per_node=6,
        tables=replace(TRUE.tables, tensor_parallel_size=3),
        all_reduce=(AllReduce(group=3, nodes=1, points=points),),
    )
    rng, cost = Random(0), PipelineCost(true, SHAPE, PLAN, 3)
    samples, spans = [], []
    for index in range(600):
        work = draw_work(rng)
        for stage, terms in enumerate(cost.breakdown(work)):
            samples.append(Sample(stage, work, sum(terms), index))
            times = dict.fromkeys(Span._fields, 0)
            times |= {"stage": stage, "index": index, "num_tokens": work.num_tokens}
            spans.append(Span(**times | {"all_reduce_s": terms.all_reduce}))
    found = fit_tables(
        without_sums(samples, spans),
        PLAN,
        SHAPE,
        dtype="bfloat16",
        threads=1,
        tensor_parallel_size=3,
    )
    summed = fit_all_reduce(spans, PLAN, SHAPE, 3)
    profile = replace(
        true,
        attention=found.attention,
        tables=found.tables,
        host_s=found.host_s,
        all_reduce=(summed,),
    )
    again = PipelineCost(profile, SHAPE, PLAN, 3)
    for _ in range(100):
        work = draw_work(rng)
        for one, other in zip(again.breakdown(work), cost.breakdown(work), strict=True):
            assert one.all_reduce == pytest.approx(other.all_reduce, rel=0.15)
            assert sum(one) == pytest.approx(sum(other), rel=0.05)
    with pytest.raises(ConfigError, match="is for tensor_parallel_size 3, not 1"):
        PipelineCost(profile, SHAPE, PLAN)


def test_too_few_observations_are_refused():
    with pytest.raises(ConfigError, match="observations are too few"):
        fit(draw_samples(5))


def test_samples_remember_what_an_engine_planned_and_stages_took():
    class Times(StageTimes):
        control_s = 0.0

        def compute_s(self, microbatch):
            return [1.0, 2.0]

        def hop_s(self, microbatch):
            return [0.0]

    samples = Samples(2)
    limits = Limits(
        num_blocks=100, block_size=16, max_num_seqs=4, max_num_batched_tokens=32,
        max_model_len=64, enable_prefix_caching=False,
    )  # fmt: skip
    engine = Engine(PLAN, get_policy("sarathi_serve"), limits, samples)
    Simulation(SimulatedPipeline(engine, Times()), [Arrival(0.0, 40, 3)]).run_until()
    assert [(s.stage, s.seconds) for s in samples.taken] == [(0, 1.0), (1, 2.0)] * 4
    assert [s.work.num_tokens for s in samples.taken[::2]] == [32, 8, 1, 1]
    assert samples.taken[2].work.prefills == ((32, 8),)


def test_samples_ignore_what_was_never_planned():
    samples = Samples(1)
    samples.observe(7, 0, 1.0)
    chunk = Chunk(RequestId(0), 0, 1, (), None, 1)
    samples.predict(Microbatch(8, (chunk,)))
    samples.observe(8, 0, 1.0)
    assert [sample.stage for sample in samples.taken] == [0]
