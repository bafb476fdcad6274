"""How many microbatches are outstanding: as many as there are stages, and as many more as what is
under way between them.

vLLM has as many as there are stages, whatever the links (vllm#11285: "will greatly reduce GPU
utilization"); llama.cpp's RPC had one (llama.cpp#15463: two nodes, each half idle).
"""

import random
from dataclasses import dataclass, replace
from statistics import median

import pytest
from linear_times import LinearTimes
from load_runs import Late, run
from loads import make_load, policy_of

from pipeserve.core.cost.partition import split_layers
from pipeserve.core.engine import Engine
from pipeserve.core.policies import POLICIES, get_policy
from pipeserve.core.view import Limits
from pipeserve.core.window import FORGOTTEN, MOST, Window
from pipeserve.profiling.simulation.simulator import Arrival, SimulatedPipeline, Simulation


def loads_of(policy: str, first: int, count: int):
    """With as many microbatches as there are stages."""
    seeds = [seed for seed in range(first, first + 200) if policy_of(seed) == policy][:count]
    for load in map(make_load, seeds):
        yield replace(load, window=load.num_stages)


@pytest.mark.parametrize("policy", POLICIES)
def test_without_delay_the_same_microbatches(policy):
    for load in loads_of(policy, 0, 4):
        if load.cost != "garbage":
            assert run(load, True, 0.0).microbatches == run(load, False, 0.0).microbatches, load


@pytest.mark.parametrize("policy", POLICIES)
def test_all_that_the_engine_promises_holds_with_late_links(policy):
    for number, load in enumerate(loads_of(policy, 200, 6)):
        engine = run(load, True, (1e-3, 1e-2, 0.1)[number % 3])
        assert load.num_stages <= engine.widest <= MOST * load.num_stages


# ---- what it comes to ---------------------------------------------------------------------------


@dataclass
class Case:
    num_stages: int
    late_s: float = 0.0
    follows: bool = True
    policy: str = "uniform"
    num_requests: int = 600
    num_running: int = 512
    base: float = 5e-4
    per_token: float = 1e-4
    num_outputs: int = 60
    carries_one: bool = False
    """Links carry one message at a time."""


class Run:
    """A load of equal requests that come at once."""

    def __init__(self, case: Case, clocks_s: list[float] | None = None):
        rng = random.Random(0)
        plain = LinearTimes(case.num_stages, base=case.base, per_token=case.per_token)
        self.times = Late(plain, case.num_stages, case.late_s)
        if case.carries_one:
            self.times.latency_s, self.times.hop_s = (), plain_hops(case)
        plan = replace(split_layers(30, case.num_stages), window_follows=case.follows)
        limits = Limits(
            num_blocks=20_000,
            block_size=16,
            max_num_seqs=case.num_running,
            max_num_batched_tokens=512,
            max_model_len=512,
        )
        self.engine = Noting(plan, get_policy(case.policy), limits)
        self.engine.clocks_s = clocks_s or [0.0] * case.num_stages
        pipeline = SimulatedPipeline(self.engine, self.times)
        lengths = [(rng.randint(20, 60), case.num_outputs) for _ in range(case.num_requests)]
        self.simulation = Simulation(pipeline, [Arrival(0.0, *each) for each in lengths])

    def finish(self) -> "Run":
        self.simulation.run_until()
        served = self.simulation.served
        times_s = sorted(at_s for each in served for at_s in each.token_times_s)
        from_, to = len(times_s) // 3, 2 * len(times_s) // 3  # between fill and drain
        self.tokens_per_s = (to - from_) / (times_s[to] - times_s[from_])
        self.tbt_s = median(
            (each.token_times_s[-1] - each.token_times_s[0]) / max(len(each.token_times_s) - 1, 1)
            for each in served
        )
        return self


def plain_hops(case: Case):
    return lambda microbatch: [case.late_s] * (case.num_stages - 1)


class Noting(Engine):
    """Notes its window at each microbatch, and lets the clocks of stages differ."""

    def __init__(self, *args):
        self.windows: list[int] = []
        super().__init__(*args)

    def plan(self, now):
        planned = super().plan(now)
        self.windows.append(self.window)
        return planned

    def observe(self, index, stage, *times_s):
        super().observe(index, stage, *[at_s + self.clocks_s[stage] for at_s in times_s])


@pytest.mark.parametrize("seed", range(3))
def test_slow_links_cost_latency_and_not_throughput(seed):
    """What is missing to 100 % is what each microbatch more costs, however small it is."""
    rng = random.Random(seed)
    case = Case(rng.randint(2, 5), policy=rng.choice(("uniform", "uniform", "token_throttle")))
    case.num_running = 160 * case.num_stages
    case.num_requests = 3 * case.num_running
    late_s = rng.uniform(0.2, 0.5) * 160 * case.per_token
    at_once = Run(case).finish()
    late = Run(replace(case, late_s=late_s)).finish()
    fixed = Run(replace(case, late_s=late_s, follows=False)).finish()
    assert set(at_once.engine.windows) == {case.num_stages}
    assert max(late.engine.windows) > case.num_stages
    assert late.tokens_per_s > 0.93 * at_once.tokens_per_s
    assert fixed.tokens_per_s < 0.9 * at_once.tokens_per_s
    assert late.tbt_s < fixed.tbt_s


@pytest.mark.parametrize("num_stages", [2, 4])
def test_prompts_alone(num_stages):
    """Full microbatches, as many as there are (vllm#41682). A third of the run is not enough for a
    window to settle."""
    case = Case(num_stages, num_outputs=1, num_requests=4000, num_running=2000)
    late_s = 0.06  # a microbatch takes 0.05
    at_once, late, fixed = (
        Run(each).finish()
        for each in (
            case,
            replace(case, late_s=late_s),
            replace(case, late_s=late_s, follows=False),
        )
    )
    assert late.tokens_per_s > 0.85 * at_once.tokens_per_s
    assert fixed.tokens_per_s < 0.6 * at_once.tokens_per_s


def test_one_stage_waits_for_the_driver_alone():
    late = Run(Case(1, late_s=5e-3)).finish()
    assert max(late.engine.windows) > 1
    assert set(Run(Case(1)).finish().engine.windows) == {1}


def test_clocks_of_machines_that_differ_change_nothing():
    case = Case(3, late_s=5e-3, num_requests=300)
    clocks_s = [0.0, 2.0**20, -(2.0**12)]
    assert Run(case, clocks_s).finish().engine.windows == Run(case).finish().engine.windows


def test_while_a_way_is_not_known_none_of_them_counts():
    """Of one way alone the clocks of its ends would be most."""
    window = Window(replace(split_layers(2, 2), window_follows=True))
    for index in range(100):
        window.planned(index, 10, None, False)
        window.took(index, 0, index, index, index + 1.0)  # which never waits
        window.took(index, 1, *[2.0 + index + at_s for at_s in (1.5, 1.5, 2.0)])
    assert window.size == 2


def test_no_more_than_there_is_work_for():
    """Decodes whose token is on its way are planned when the window is full: it must get full."""
    case = Case(2, late_s=0.02, num_requests=2)
    late, fixed = Run(case).finish(), Run(replace(case, follows=False)).finish()
    assert set(late.engine.windows) == {2}
    assert late.tbt_s == fixed.tbt_s


def test_it_has_a_most():
    case = Case(2, late_s=10.0, base=1e-6, num_requests=1000, num_running=1000)
    assert max(Run(case).finish().engine.windows) <= 2 * MOST


def test_a_link_that_carries_one_at_a_time_is_not_filled_up():
    """Where bandwidth is what lacks, a longer queue before the link would only take longer
    (vllm#55145: microbatches that links cannot carry gain nothing)."""
    case = Case(2, late_s=0.05, num_requests=600, num_running=64, carries_one=True)
    windows = Run(case).finish().engine.windows
    assert len(windows) > 300
    assert max(windows) <= 5


def test_it_falls_again_when_links_are_fast_again():
    load = Run(Case(2, late_s=0.02, num_requests=4000, num_outputs=100))
    engine = load.engine
    load.simulation.run_until(8.0)
    assert engine.window > 3
    load.times.latency_s[:] = [0.0]
    load.simulation.pipeline._feedback_s = load.times.control_s = 0.0
    num_before = len(engine.windows)
    while engine.window > 2:
        load.simulation.run_until(load.simulation.pipeline.next_event_s)
    assert len(engine.windows) - num_before < 4 * FORGOTTEN


def test_a_loss_makes_it_measure_anew():
    load = Run(Case(2, late_s=0.02, num_requests=2000))
    load.simulation.pipeline.fail(1, 5.0, 1.0)
    load.simulation.run_until(4.9)
    before = load.engine.window
    load.finish()
    assert before > 2
    assert len({before, *load.engine.windows[-200:-100]}) <= 3


def test_a_stage_may_tell_late_or_never():
    engine = Run(Case(2, late_s=0.02)).engine
    for index in range(5000):
        engine._window.planned(index, 10, index - 2, False)
        engine._window.took(index, 0, index, index, index + 0.5)
    engine._window.took(3, 1, 0.0, 0.0, 1.0)
    assert len(engine._window._microbatches) <= 1024
