"""Heads at the first stage, simulated: against schedules worked out by hand, and what must hold of
any run."""

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
from made_up_profile import SHAPE, TRUE

from pipeserve.configs import RunConfig
from pipeserve.configs.device_profiles import save_profile
from pipeserve.core.cost.partition import split_layers
from pipeserve.core.engine import Engine, Limits
from pipeserve.core.policies import get_policy
from pipeserve.core.records import Completed, Headed, Span
from pipeserve.launch.run.simulated import simulated_run
from pipeserve.profiling.search.capacity import busy_in
from pipeserve.profiling.simulation.simulator import Arrival, SimulatedPipeline, Simulation
from pipeserve.profiling.simulation.stage_times import StageTimes


class Times(StageTimes):
    """A stage takes `base` and `per_token` for each token, the head `head`."""

    def __init__(self, num_stages, base=1.0, per_token=0.0, head=0.0, control=0.0, feedback=None):
        self.num_stages, self.base, self.per_token, self.head = num_stages, base, per_token, head
        self.control_s, self.feedback_s = control, feedback

    def compute_s(self, microbatch):
        seconds = [self.base + self.per_token * microbatch.num_tokens] * self.num_stages
        if not microbatch.head_at_first:
            seconds[-1] += self.head_s(microbatch)
        return seconds

    def head_s(self, microbatch):
        return self.head * any(chunk.num_logits for chunk in microbatch.chunks)

    def hop_s(self, microbatch):
        return [0.0] * (self.num_stages - 1)


def run(times, arrivals, shares=True, policy="sarathi_serve", faults=(), **limits):
    """The simulation, and its records."""
    plan = split_layers(times.num_stages, times.num_stages)
    if shares:
        first, *others = plan.stages
        plan = replace(plan, stages=(replace(first, has_head=True), *others))
    defaults = {
        "num_blocks": 1000,
        "block_size": 16,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        "max_model_len": 1024,
        "enable_prefix_caching": False,
    }
    engine = Engine(plan, get_policy(policy), Limits(**{**defaults, **limits}))
    records = []
    pipeline = SimulatedPipeline(engine, times, records.append)
    for fault in faults:
        pipeline.fail(*fault)
    simulation = Simulation(pipeline, arrivals)
    simulation.run_until()
    return simulation, records


def head_of(flight):
    return flight.head and (flight.head.input_s, flight.head.start_s, flight.head.end_s)


def test_a_lone_head_goes_back():
    """The rows take as long as tokens would; the next token is at the first stage at once."""
    times = Times(3, head=0.5, control=0.125, feedback=0.25)
    simulation, _ = run(times, [Arrival(10.0, 20, 2)])
    first, second = simulation.pipeline.flights
    assert first.ends_s == (11.125, 12.125, 13.125)
    assert head_of(first) == (13.375, 13.375, 13.875) and first.known_s == 14.0
    assert second.starts_s[0] == 14.125
    assert simulation.served[0].token_times_s[0] == 14.0


def test_it_goes_before_what_could_begin_no_earlier_and_behind_what_could():
    """Of two requests on two stages the first one's rows are back at 2, when the second one's
    prompt has left the first stage; the second one's head is at the last stage, from 3 on. The
    third request comes while the first one's head is applied."""
    arrivals = [Arrival(0.0, 64, 1), Arrival(0.0, 64, 1), Arrival(2.5, 64, 1)]
    simulation, _ = run(Times(2, head=4.0), arrivals)
    first, second, third = simulation.pipeline.flights
    assert head_of(first) == (2, 2, 6) and second.head is None
    assert second.ends_s == (2, 7)
    assert third.starts_s[0] == 6


def test_a_microbatch_that_comes_before_the_rows_puts_the_head_off():
    """Its times move, and so does what waits for it."""
    arrivals = [Arrival(0.0, 64, 1), Arrival(1.5, 64, 1)]
    simulation, _ = run(Times(2, head=1.0), arrivals)
    first, second = simulation.pipeline.flights
    assert second.starts_s[0] == 1.5
    assert head_of(first) == (2.0, 2.5, 3.5) and first.known_s == 3.5
    assert simulation.served[0].token_times_s[0] == 3.5


def test_a_result_that_is_early_waits_for_the_one_before():
    """The second one's head, at the last stage, is done long before the first one's."""
    times = Times(2, head=1.0, feedback=5.0)
    simulation, records = run(times, [Arrival(0.0, 64, 1)] * 2)
    first, second = simulation.pipeline.flights
    assert second.known_s < first.known_s == 8.0
    done = [(each.index, each.done_s) for each in records if isinstance(each, Completed)]
    assert done == [(0, 8.0), (1, 8.0)]


def check_stages(pipeline):
    """No stage does two things at once, and none anything before it is there."""
    flights = pipeline.flights
    for stage in range(len(pipeline.engine.pipeline.stages)):
        did = [(flight.starts_s[stage], flight.ends_s[stage]) for flight in flights]
        heads = [flight.head for flight in flights if flight.head is not None and stage == 0]
        did += [(head.start_s, head.end_s) for head in heads]
        assert all(a[1] <= b[0] for a, b in pairwise(sorted(did)))
        busy_s = busy_in(pipeline, 0.0, 1e6)[stage] * 1e6
        assert busy_s == pytest.approx(sum(end - start for start, end in did))
    for flight in flights:
        assert all(s >= e for s, e in zip(flight.starts_s[1:], flight.ends_s, strict=False))
        if flight.head is not None:
            assert flight.head.start_s >= flight.head.input_s >= flight.ends_s[-1]
            assert flight.known_s >= flight.head.end_s


@pytest.mark.parametrize("policy", ["uniform", "sarathi_serve", "vllm"])
@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("feedback", [0.01, 3.0])
def test_what_must_hold_of_any_run(policy, num_stages, feedback):
    rng = Random(f"{policy} {num_stages}")
    arrivals = sorted(
        Arrival(rng.uniform(0, 60), rng.randint(1, 300), rng.randint(1, 20)) for _ in range(60)
    )
    times = Times(num_stages, 0.1, 0.01, head=0.3, control=0.01, feedback=feedback)
    limits = {"num_blocks": 80, "max_num_batched_tokens": 1024 if policy == "vllm" else 64}
    faults = [(num_stages - 1, 20.0, 3.0), (0, 40.0, 3.0)]
    simulation, records = run(times, arrivals, policy=policy, faults=faults, **limits)
    assert all(served.finished for served in simulation.served)
    assert all(a < b for s in simulation.served for a, b in pairwise(s.token_times_s))
    pipeline = simulation.pipeline
    assert pipeline.engine.num_free_blocks == 80
    check_stages(pipeline)
    done = [each.index for each in records if isinstance(each, Completed)]
    assert done == [flight.index for flight in pipeline.flights] == sorted(done)
    share = sum(flight.head is not None for flight in pipeline.flights) / len(done)
    assert 0.1 < share < 0.9
    # Records say the same, and nothing of what was lost with a stage.
    told = {each.index: each for each in records if isinstance(each, Headed)}
    for flight in pipeline.flights:
        if flight.head is not None:
            found = told[flight.index]
            assert (found.start_s, found.end_s) == (flight.head.start_s, flight.head.end_s)
            assert flight.head.input_s <= found.input_s <= found.start_s
    at_first = [each for each in records if isinstance(each, Headed | Span) and each.stage == 0]
    did = sorted((each.start_s, each.end_s) for each in at_first)
    assert all(a[1] <= b[0] for a, b in pairwise(did))
    assert not any(start < at_s + 3 and at_s < end for start, end in did for _, at_s, _ in faults)


@pytest.mark.parametrize("policy", ["uniform", "sarathi_serve"])
def test_heads_that_take_no_time_change_nothing(policy):
    """But for the wait until the first stage is done with what it has; here both are at once."""
    rng = Random(3)
    arrivals = [Arrival(0.0, rng.randint(1, 300), rng.randint(1, 20)) for _ in range(60)]
    times = Times(2)
    shared, alone = (run(times, arrivals, shares, policy)[0] for shares in (True, False))
    assert any(flight.head is not None for flight in shared.pipeline.flights)
    assert [s.token_times_s for s in shared.served] == [s.token_times_s for s in alone.served]
    assert [f.starts_s for f in shared.pipeline.flights] == [
        f.starts_s for f in alone.pipeline.flights
    ]


# ---- what it is for -----------------------------------------------------------------------------

LARGE_HEAD = replace(
    TRUE,
    attention=replace(TRUE.attention, decode_sequence_s=2e-6),
    tables=replace(TRUE.tables, head=((1, 30e-3), (32, 40e-3))),
)


@pytest.fixture(scope="module")
def tokens_per_s(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "large.yaml"
    save_profile(LARGE_HEAD, path)

    def tokens_per_s(head_stages, layers, lengths):
        config = RunConfig(
            model=SHAPE.name,
            device_profile=str(path),
            pipeline_parallel_size=2,
            pipeline_layers=layers,
            head_stages=head_stages,
            max_num_seqs=32,
            max_num_batched_tokens=128,
            max_model_len=512,
        )
        setup = simulated_run(config)
        arrivals = [Arrival(0.0, *pair) for pair in lengths]
        simulation = Simulation(setup.make_pipeline(), arrivals)
        simulation.run_until()
        check_stages(simulation.pipeline)
        last_s = max(served.token_times_s[-1] for served in simulation.served)
        return sum(num_outputs for _, num_outputs in lengths) / last_s

    return tokens_per_s


def test_shared_heads_beat_the_best_cut_of_decodes_and_of_prompts_with_them(tokens_per_s):
    """The head is as much as all layers in a microbatch of decodes: no cut evens that out, and
    the one that is best for them is bad for prompts. Head at the last stage alone, every cut."""
    rng = Random(0)
    decodes = [(8, 40)] * 64
    mixed = [(rng.randint(20, 300), rng.randint(10, 40)) for _ in range(60)]
    for lengths, more in ((decodes, 1.03), (mixed, 1.04)):
        best = max(tokens_per_s("last", (first, 30 - first), lengths) for first in range(15, 30, 2))
        assert tokens_per_s("both", None, lengths) > more * best


def test_alone_in_a_simulation_unless_it_is_asked_for(tokens_per_s):
    lengths = [(8, 4)] * 4
    assert tokens_per_s("auto", None, lengths) == tokens_per_s("last", None, lengths)
    assert tokens_per_s("auto", None, lengths) != tokens_per_s("both", None, lengths)
