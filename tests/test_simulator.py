"""The simulator against schedules worked out by hand, and against what must hold of any run."""

import math
from itertools import pairwise
from random import Random

import pytest

from pipeserve.core.engine import Engine, Limits
from pipeserve.core.partition import split_layers
from pipeserve.core.policies import get_policy
from pipeserve.profiling.capacity import (
    Trial,
    busy_in,
    ceiling_rate,
    find_capacity,
    poisson_arrivals,
    run_trial,
)
from pipeserve.profiling.simulator import Arrival, SimulatedPipeline, Simulation, in_order
from pipeserve.profiling.stage_times import StageTimes


class Times(StageTimes):
    """A stage takes `base` and `per_token` for each token; a hop `hop`."""

    def __init__(self, num_stages, base=1.0, per_token=0.0, hop=0.0, control=0.0, slow=None):
        self.num_stages, self.base, self.per_token, self.hop = num_stages, base, per_token, hop
        self.control_s = control
        self.slow = slow or {}

    def compute_s(self, microbatch):
        seconds = self.base + self.per_token * microbatch.num_tokens
        return [seconds * self.slow.get(stage, 1) for stage in range(self.num_stages)]

    def hop_s(self, microbatch):
        return [self.hop] * (self.num_stages - 1)


def make_pipeline(times, policy="sarathi_serve", **limits):
    defaults = {
        "num_blocks": 10_000,
        "block_size": 16,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 64,
        "max_model_len": 1024,
        "enable_prefix_caching": False,
    }
    plan = split_layers(times.num_stages, times.num_stages)
    return SimulatedPipeline(
        Engine(plan, get_policy(policy), Limits(**{**defaults, **limits})), times
    )


def run(times, arrivals, policy="sarathi_serve", **limits):
    simulation = Simulation(make_pipeline(times, policy, **limits), arrivals)
    simulation.run_until()
    return simulation


def test_a_lone_request_crosses_every_stage_and_hop():
    simulation = run(Times(3, hop=0.5, control=0.25), [Arrival(10.0, 20, 3)])
    (served,) = simulation.served
    # control, three stages, two hops, control; then the same for each decode.
    way = 0.25 + 3 + 1 + 0.25
    assert list(served.token_times_s) == pytest.approx([10 + way, 10 + 2 * way, 10 + 3 * way])
    assert served.started_s == pytest.approx(10.25)


def test_two_chunks_of_two_requests_overlap_on_two_stages():
    simulation = run(Times(2), [Arrival(0.0, 64, 1), Arrival(0.0, 64, 1)])
    first, second = simulation.pipeline.flights
    assert first.starts_s == (0, 1) and second.starts_s == (1, 2)
    assert [list(s.token_times_s) for s in simulation.served] == [[2.0], [3.0]]


def test_a_slow_last_stage_makes_the_others_wait():
    simulation = run(Times(2, slow={1: 3}), [Arrival(0.0, 64, 1)] * 4, max_num_seqs=4)
    starts = [flight.starts_s for flight in simulation.pipeline.flights]
    # The window is two: the third is planned when the first is known, at 4.
    assert starts == [(0, 1), (1, 4), (4, 7), (7, 10)]


def test_a_link_carries_one_microbatch_at_a_time():
    simulation = run(Times(2, hop=5.0), [Arrival(0.0, 64, 1)] * 2)
    assert [flight.starts_s for flight in simulation.pipeline.flights] == [(0, 6), (1, 11)]


def test_a_decode_planned_ahead_waits_for_its_token():
    simulation = run(Times(2, control=0.5), [Arrival(0.0, 8, 4)], policy="uniform", max_num_seqs=1)
    for earlier, later in pairwise(simulation.pipeline.flights):
        assert later.starts_s[0] >= earlier.ends_s[-1] + 0.5


def test_requests_that_come_at_once_share_a_microbatch():
    simulation = run(Times(1), [Arrival(1.0, 8, 1)] * 3)
    (flight,) = simulation.pipeline.flights
    assert (flight.num_tokens, flight.num_decodes) == (24, 0)


def test_requests_go_by_time_and_those_that_come_at_once_keep_their_order():
    arrivals = in_order([2.0, 0.0, 0.0, 1.0], [(9, 1), (7, 1), (3, 1), (5, 1)])
    assert [a.num_prompt_tokens for a in arrivals] == [7, 3, 5, 9]


def test_a_run_that_is_cut_goes_on_as_if_it_was_not():
    arrivals = [Arrival(0.7 * number, 40, 9) for number in range(30)]
    whole = run(Times(3), arrivals)
    cut = Simulation(make_pipeline(Times(3)), arrivals)
    for stop_s in (0.0, 3.3, 3.3, 17.0, math.inf):
        cut.run_until(stop_s)
    assert cut.pipeline.flights == whole.pipeline.flights


@pytest.mark.parametrize("policy", ["uniform", "sarathi_serve"])
@pytest.mark.parametrize("num_stages", [1, 2, 5])
def test_what_must_hold_of_any_run(policy, num_stages):
    rng = Random(num_stages)
    arrivals = sorted(
        Arrival(rng.uniform(0, 60), rng.randint(1, 300), rng.randint(1, 40)) for _ in range(80)
    )
    times = Times(num_stages, base=0.1, per_token=0.01, hop=0.02, control=0.01)
    simulation = run(times, arrivals, policy, num_blocks=60)
    assert all(served.finished for served in simulation.served)
    assert simulation.pipeline.engine.stats.preemptions > 0
    assert simulation.pipeline.engine.num_free_blocks == 60
    flights = simulation.pipeline.flights
    for stage in range(num_stages):
        for earlier, later in pairwise(flights):
            assert later.starts_s[stage] >= earlier.ends_s[stage]  # one at a time, in order
    for flight in flights:
        assert flight.starts_s[0] >= flight.planned_s + 0.01
        for stage in range(1, num_stages):
            assert flight.starts_s[stage] >= flight.ends_s[stage - 1] + 0.02
        spent = [end - start for start, end in zip(flight.starts_s, flight.ends_s, strict=True)]
        assert spent == pytest.approx([0.1 + 0.01 * flight.num_tokens] * num_stages)
    for served, arrival in zip(simulation.served, arrivals, strict=True):
        assert served.started_s >= arrival.arrival_s
        assert served.token_times_s[0] >= served.started_s
        assert all(a < b for a, b in pairwise(served.token_times_s))


# ---- capacity -----------------------------------------------------------------------------------

LENGTHS = [(64, 10), (128, 20), (32, 5)]


def test_poisson_arrivals_have_the_rate_and_the_same_lengths_at_every_rate():
    def first(rate, count=4000):
        arrivals = poisson_arrivals(LENGTHS, rate, seed=1)
        return [next(arrivals) for _ in range(count)]

    slow, fast = first(2.0), first(4.0)
    assert slow[-1].arrival_s == pytest.approx(4000 / 2, rel=0.05)
    assert slow[-1].arrival_s == pytest.approx(2 * fast[-1].arrival_s)
    assert [a[1:] for a in slow] == [a[1:] for a in fast]
    assert {a[1:] for a in slow} == set(LENGTHS)


def test_a_trial_measures_a_window_after_the_ramp():
    times = Times(2, base=0.01, per_token=0.0005)
    trial = run_trial(lambda: make_pipeline(times), LENGTHS, rate=3.0, min_requests=200, seed=0)
    assert trial.window_s >= 5 * trial.lifetime_s
    assert trial.requests >= 150
    mean_output = sum(output for _, output in LENGTHS) / len(LENGTHS)
    assert trial.output_tokens_per_s == pytest.approx(3.0 * mean_output, rel=0.2)
    assert 0 < min(trial.busy) <= max(trial.busy) < 1


def test_an_overload_shows_as_queueing():
    times = Times(1, base=0.1, per_token=0.001)
    trial = run_trial(lambda: make_pipeline(times), LENGTHS, rate=50.0, min_requests=500, seed=0)
    assert trial.queueing_p50_s > 2.0
    assert trial.busy[0] > 0.99


def test_capacity_lies_where_the_trials_say():
    times = Times(2, base=0.02, per_token=0.002)
    ceiling = ceiling_rate(times, LENGTHS)

    def trial(rate):
        return run_trial(lambda: make_pipeline(times), LENGTHS, rate, 200, seed=0)

    capacity = find_capacity(trial, slo_tbt_s=0.5, ceiling=ceiling, lone=trial(0.1))
    assert 0 < capacity.rate < capacity.ceiling == ceiling
    assert capacity.best(0.5).rate == capacity.rate
    too_high = [t.rate for t in capacity.trials if not t.within(0.5)]
    assert capacity.rate < min(too_high) <= capacity.rate / 0.974


def test_a_ceiling_that_was_too_low_does_not_hide_the_capacity():
    times = Times(2, base=0.02, per_token=0.002)

    def trial(rate):
        return run_trial(lambda: make_pipeline(times), LENGTHS, rate, 200, seed=0)

    right = find_capacity(trial, slo_tbt_s=0.5, ceiling=8.0, lone=trial(0.1))
    low = find_capacity(trial, slo_tbt_s=0.5, ceiling=1.0, lone=trial(0.1))
    assert low.rate == pytest.approx(right.rate, rel=0.06) and low.rate > 1.1


def test_an_slo_that_no_schedule_meets_ends_at_once():
    times = Times(2, base=0.01)

    def trial(rate):
        return run_trial(lambda: make_pipeline(times), LENGTHS, rate, 50, seed=0)

    capacity = find_capacity(trial, slo_tbt_s=0.001, ceiling=10.0, lone=trial(0.1))
    assert capacity.rate == 0
    assert len(capacity.trials) == 1
    assert capacity.best(0.001) is None


def test_the_ceiling_is_the_work_of_the_slowest_stage():
    # 4096 tokens of 64 + 32 in each request: 42.67 requests in 0.5 + 4096 * 0.001 seconds, twice.
    times = Times(3, base=0.5, per_token=0.001, slow={1: 2})
    assert ceiling_rate(times, [(64, 32)]) == pytest.approx(4096 / 96 / (2 * 4.596))


def test_busy_counts_what_lies_inside_the_window():
    simulation = run(Times(2), [Arrival(0.0, 64, 1), Arrival(4.0, 64, 1)])
    # Stage 0 computes in [0, 1) and [4, 5), stage 1 in [1, 2) and [5, 6).
    assert busy_in(simulation.pipeline, 0.5, 5.5) == pytest.approx((1.5 / 5, 1.5 / 5))


def test_within_takes_both_limits():
    trial = Trial(
        rate=1.0, window_s=1, lifetime_s=1, requests=1, tbt_p99_s=0.5, queueing_p50_s=2.0,
        output_tokens_per_s=1, busy=(1.0,),
    )  # fmt: skip
    assert trial.within(0.5)
    assert not trial.within(0.4)
