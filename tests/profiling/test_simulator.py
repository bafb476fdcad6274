"""The simulator against schedules worked out by hand, and against what must hold of any run."""

import gc
import math
from itertools import pairwise
from random import Random

import pytest

from pipeserve.core.cost.partition import split_layers
from pipeserve.core.engine import Engine, Limits
from pipeserve.core.policies import get_policy
from pipeserve.profiling.recording.recording import no_collection, recording_of
from pipeserve.profiling.search.capacity import (
    Trial,
    busy_in,
    ceiling_rate,
    find_capacity,
    poisson_arrivals,
    run_trial,
)
from pipeserve.profiling.simulation.simulator import (
    Arrival,
    SimulatedPipeline,
    Simulation,
    arrivals_in_order,
)
from pipeserve.profiling.simulation.stage_times import StageTimes
from pipeserve.profiling.simulation.workloads import poisson_times


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


@pytest.mark.parametrize("policy", ["uniform", "sarathi_serve"])
def test_it_makes_no_cycles(policy):
    """For none are looked for while it runs: its memory would grow with them."""
    arrivals = [Arrival(0.25 * i, 100, 10) for i in range(40)]
    gc.collect()
    with no_collection():  # nor here, or there would be none left to count
        simulation = run(Times(2, per_token=0.01), arrivals, policy)
        assert gc.collect() == 0
    assert len(simulation.pipeline.flights) > 20


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
    arrivals = arrivals_in_order([2.0, 0.0, 0.0, 1.0], [(9, 1), (7, 1), (3, 1), (5, 1)])
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
    if policy == "sarathi_serve":
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


def test_bursts_come_together_at_the_same_rate():
    times = poisson_times(4000, 2.0, Random(0), burst=8)
    groups = [times[first : first + 8] for first in range(0, 4000, 8)]
    assert all(len(set(group)) == 1 for group in groups)
    assert len({group[0] for group in groups}) == 500
    assert 4000 / times[-1] == pytest.approx(2.0, rel=0.15)
    assert poisson_times(50, 2.0, Random(1), burst=1) == poisson_times(50, 2.0, Random(1))


def test_poisson_arrivals_have_the_rate_and_the_same_lengths_at_every_rate():
    def first(rate, count=4000):
        arrivals = poisson_arrivals(LENGTHS, rate, seed=1)
        return [next(arrivals) for _ in range(count)]

    slow, fast = first(2.0), first(4.0)
    assert slow[-1].arrival_s == pytest.approx(4000 / 2, rel=0.05)
    assert slow[-1].arrival_s == pytest.approx(2 * fast[-1].arrival_s)
    assert [a[1:] for a in slow] == [a[1:] for a in fast]
    assert {a[1:3] for a in slow} == set(LENGTHS)


def test_each_request_keeps_its_priority():
    arrivals = poisson_arrivals(LENGTHS, 1.0, seed=1, priorities=[0, 5, -2])
    found = {next(arrivals)[1:] for _ in range(100)}
    assert found == {(64, 10, 0), (128, 20, 5), (32, 5, -2)}
    assert [a.priority for a in arrivals_in_order([2.0, 1.0], LENGTHS[:2], [3, 4])] == [4, 3]


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
        ttft_p50_s=3.0, ttft_p99_s=4.0,
        output_tokens_per_s=1, busy=(1.0,),
    )  # fmt: skip
    assert trial.within(0.5)
    assert not trial.within(0.4)


# ---- records ------------------------------------------------------------------------------------


class Delays(Times):
    """With a planner that takes its time, feedback of its own and a head."""

    feedback_s, planning_s = 2.0, 0.25

    def head_s(self, microbatch):
        return 0.4


def recorded(times, arrivals, policy="sarathi_serve", faults=(), **limits):
    records = []
    pipeline = SimulatedPipeline(
        make_pipeline(times, policy, **limits).engine, times, records.append
    )
    for fault in faults:
        pipeline.fail(*fault)
    simulation = Simulation(pipeline, arrivals)
    simulation.run_until()
    return simulation, recording_of(records, times.num_stages, {})


def test_the_records_of_a_lone_request():
    times = Delays(2, hop=0.5, control=0.125)
    simulation, told = recorded(times, [Arrival(10.0, 20, 2)])
    assert told.arrived == [(0, 10.0, 20, 2, 0)]
    prompt, decode = told.planned
    assert (prompt.waited_for, prompt.after, prompt.woken_s) == ("no_requests", -1, 10.0)
    assert (prompt.start_s, prompt.sent_s) == (10.0, 10.25)
    first, last = told.spans[0][0], told.spans[1][0]
    assert first.input_s == -math.inf and first.plan_s == first.start_s == 10.375
    assert (first.end_s, first.head_s, first.sent_s) == (11.375, 11.375, 11.375)
    assert (last.plan_s, last.input_s, last.start_s) == (10.375, 11.875, 11.875)
    assert (last.head_s, last.end_s) == (pytest.approx(12.475), 12.875)
    assert math.isnan(last.cpu_s)
    # The driver waited since it had planned; it knows the token long before stage 0 has it.
    assert told.completed[0] == (0, 10.25, 13.0, 13.0, (1,))
    assert (decode.waited_for, decode.after, decode.woken_s) == ("token", 0, 13.0)
    second = told.spans[0][1]
    assert (second.plan_s, second.input_s, second.start_s) == (13.375, 14.875, 14.875)
    done_s = told.completed[1].done_s
    assert told.ended == [(0, done_s, "length", 2)]
    assert list(simulation.served[0].token_times_s) == [13.0, done_s]


def test_one_plan_at_a_time_and_results_wait_for_the_planner():
    # Stage times of 0.5 against plans of 0.25: two plans before the first result is there at 1.75.
    times = Delays(1, base=0.5)
    times.feedback_s, times.planning_s = 0.0, 1.0
    _, told = recorded(times, [Arrival(0.0, 64, 1)] * 2 + [Arrival(0.5, 64, 1)])
    plans = [(p.waited_for, p.after, p.woken_s, p.start_s, p.sent_s) for p in told.planned]
    assert plans == [
        ("no_requests", -1, 0.0, 0.0, 1.0),
        ("window", 0, 1.5, 1.5, 2.5),
        ("window", 1, 3.0, 3.0, 4.0),
    ]
    ahead = Delays(2, base=0.5)
    ahead.feedback_s, ahead.planning_s = 0.0, 1.0
    _, told = recorded(ahead, [Arrival(0.0, 64, 1)] * 2)
    assert [(p.waited_for, p.woken_s, p.sent_s) for p in told.planned] == [
        ("no_requests", 0.0, 1.0),
        ("", 1.0, 2.0),
    ]
    # The first was there at 2, when the driver had sent the second: since then it had waited.
    assert told.completed[0] == (0, 2.0, 2.0, 2.0, (1,))


def test_what_comes_while_a_stage_computes_is_seen_when_it_looks():
    _, told = recorded(Delays(2, slow={1: 3}), [Arrival(0.0, 64, 1)] * 2)
    first, second = told.spans[1]
    assert second.plan_s == 0.5  # while it waited for the first
    assert second.input_s == second.start_s == first.end_s == 4.25  # came at 2.25


def test_a_fault_voids_what_is_outstanding_and_the_requests_go_on():
    times = Times(3, hop=0.1, control=0.05)
    arrivals = [Arrival(0.0, 40, 6)] * 6
    simulation, told = recorded(times, arrivals, faults=[(1, 4.0, 10.0)])
    assert [(fault.stage, fault.at_s) for fault in told.faults] == [(1, 4.0)]
    assert all(served.finished for served in simulation.served)
    done = {completed.index for completed in told.completed}
    lost = [planned for planned in told.planned if planned.index not in done]
    assert 1 <= len(lost) <= 3 and all(planned.sent_s <= 4.0 for planned in lost)
    for spans in told.spans:
        assert all(span.end_s <= 4.0 or span.start_s >= 14.0 for span in spans)
    assert min(planned.start_s for planned in told.planned if planned.start_s > 4.0) == 14.0
    assert [f.index for f in simulation.pipeline.flights] == sorted(done)
    assert simulation.pipeline.engine.num_free_blocks == 10_000


def test_a_fault_after_the_end_does_not_happen():
    simulation, told = recorded(Times(2), [Arrival(0.0, 8, 2)], faults=[(0, 100.0, 5.0)])
    assert not told.faults and simulation.served[0].finished


@pytest.mark.parametrize("policy", ["uniform", "sarathi_serve", "vllm"])
def test_records_are_what_flew_and_change_nothing(policy):
    rng = Random(7)
    arrivals = sorted(
        Arrival(rng.uniform(0, 20), rng.randint(1, 64), rng.randint(1, 30)) for _ in range(60)
    )
    times = Times(4, base=0.1, per_token=0.01, hop=0.02, control=0.01)
    limits = {"num_blocks": 60, "max_model_len": 96, "max_num_batched_tokens": 96}
    silent = run(times, arrivals, policy, **limits)
    simulation, told = recorded(times, arrivals, policy, **limits)
    assert simulation.served == silent.served
    flights = simulation.pipeline.flights
    assert flights == silent.pipeline.flights
    for stage, spans in enumerate(told.spans):
        assert [(s.index, s.start_s, s.end_s) for s in spans] == [
            (f.index, f.starts_s[stage], f.ends_s[stage]) for f in flights
        ]
        for before, span in pairwise(spans):
            assert max(before.end_s, span.plan_s, span.input_s) == span.start_s
    received_s = {completed.index: completed.received_s for completed in told.completed}
    assert received_s == {f.index: f.known_s for f in flights}
    for before, planned in pairwise(told.planned):
        if planned.after >= 0:
            assert planned.woken_s == received_s[planned.after] <= planned.start_s
        elif not planned.waited_for:
            assert planned.woken_s == before.sent_s
        else:
            assert planned.woken_s in {arrived.at_s for arrived in told.arrived}
    assert len(told.ended) == len(simulation.served)
    assert all(
        e.num_output_tokens == simulation.served[e.request_id].max_tokens for e in told.ended
    )
