"""Who goes first (`core/order.py`). That every policy keeps to it under random loads, `InOrder` in
`plan_checker.py` checks at each draft of `test_loads.py`."""

from collections.abc import Sequence
from operator import le
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_times import LinearCost, LinearTimes

from pipeserve.core.cost.partition import split_layers
from pipeserve.core.engine import Engine, Limits
from pipeserve.core.nouns import Microbatch, RequestId, StepResult, one_each
from pipeserve.core.order import ORDERS, PASSED, Order, RequestQueue
from pipeserve.core.policies import POLICIES, get_policy
from pipeserve.errors import ConfigError
from pipeserve.profiling.simulation.simulator import (
    Arrival,
    SimulatedPipeline,
    Simulation,
    request_of,
)

EVERY_POLICY = pytest.mark.parametrize("policy", sorted(POLICIES))


def make_engine(policy: str, num_stages: int = 1, **changes) -> Engine:
    limits = {
        "num_blocks": 1000,
        "block_size": 4,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 64,
        "max_model_len": 64,
        "enable_prefix_caching": False,
        "order": "priority",
    }
    cost = LinearCost(LinearTimes(num_stages, base=0.01, per_token=1e-3))
    plan = split_layers(num_stages, num_stages)
    return Engine(plan, get_policy(policy), Limits(**limits | changes), cost)


def schedule(engine: Engine, requests: Sequence[tuple[int, int, int]]) -> list[Microbatch]:
    """All that is planned until requests (prompt, output, priority) have ended, a third of which
    are there at once, and the others come one with each completion."""
    planned, flying, coming = [], [], list(enumerate(requests))
    now = 0.0

    def add(count: int) -> None:
        for number, (num_prompt, num_output, priority) in coming[:count]:
            engine.add(request_of(number, Arrival(0.0, num_prompt, num_output, priority)), now)
        del coming[:count]

    add(len(requests) // 3)
    while engine.has_work or coming:
        while isinstance(microbatch := engine.plan(now), Microbatch):
            planned.append(microbatch)
            flying.append(microbatch)
        done = flying.pop(0)
        counts = one_each(done.chunks)
        now += 0.02
        engine.complete(StepResult(done.index, (0,) * sum(counts), counts), now)
        add(1)
    return planned


def admissions(planned: Sequence[Microbatch]) -> list[RequestId]:
    return [each.request_id for microbatch in planned for each in microbatch.admitted]


def random_requests(seed: int, priorities: Sequence[int]) -> list[tuple[int, int, int]]:
    rng = Random(seed)
    return [
        (rng.randint(1, 40), rng.randint(1, 20), priority)
        for priority in (rng.choice(priorities) for _ in range(40))
    ]


@EVERY_POLICY
def test_the_lowest_number_is_admitted_first(policy):
    engine = make_engine(policy, max_num_seqs=1)
    requests = [(8, 2, priority) for priority in (0, 0, 0, 5, 3, -1, 3)]
    schedule(engine, requests[:3])
    for number, (num_prompt, num_output, priority) in enumerate(requests):
        engine.add(request_of(number, Arrival(0.0, num_prompt, num_output, priority)), 9.0)
    assert admissions(schedule(engine, [])) == [5, 0, 1, 2, 4, 6, 3]


PREEMPTING = ["chunked_only", "hybrid_only", "sarathi_serve", "token_throttle", "uniform", "vllm"]


@pytest.mark.parametrize("policy", PREEMPTING)
def test_the_highest_number_is_preempted_and_waits_behind_lower_ones(policy):
    engine = make_engine(policy, num_blocks=6)
    requests = [(8, 12, 1), (8, 12, 0), (4, 2, 0)]  # two of them fill the pool, and more
    planned = schedule(engine, [(8, 12, 1), *requests[1:]])
    assert engine.stats.preemptions >= 1
    admitted = admissions(planned)
    assert admitted.count(0) > 1 and admitted.count(1) == 1, "the later one runs on"
    again = len(admitted) - admitted[::-1].index(0) - 1
    assert admitted.index(2) < again


@pytest.mark.parametrize("policy", PREEMPTING)
def test_shorter_prompts_that_come_later_do_not_push_a_long_one_out(policy):
    """By length, a prompt of 40 that decoded was preempted up to nine times, for others that were
    admitted behind it, and its user saw no token for many seconds."""
    engine = make_engine(policy, num_blocks=16, order="sjf")
    planned = schedule(engine, [(40, 20, 0), *[(4, 12, 0)] * 4])
    admitted = admissions(planned)
    assert engine.stats.preemptions >= 1 and admitted.count(0) == 1


@EVERY_POLICY
@pytest.mark.parametrize("num_stages", [1, 3])
def test_priorities_mean_nothing_first_come_first_served(policy, num_stages):
    requests = random_requests(1, [-3, 0, 7])
    few = {"num_blocks": 40, "order": "fcfs"}
    numbered = schedule(make_engine(policy, num_stages, **few), requests)
    plain = [(num_prompt, num_output, 0) for num_prompt, num_output, _ in requests]
    assert schedule(make_engine(policy, num_stages, **few), plain) == numbered


@EVERY_POLICY
@pytest.mark.parametrize("num_stages", [1, 3])
def test_equal_priorities_are_first_come_first_served(policy, num_stages):
    requests = random_requests(1, [4])
    by_priority = schedule(make_engine(policy, num_stages, num_blocks=40), requests)
    fcfs = make_engine(policy, num_stages, num_blocks=40, order="fcfs")
    assert schedule(fcfs, requests) == by_priority


def test_an_unknown_order_names_all():
    with pytest.raises(ConfigError, match="no order 'lifo': choose from fcfs, priority, sjf"):
        make_engine("uniform", order="lifo")


# ---- sjf: shortest first, and no prompt is passed for ever ---------------------------------------

SHORT = st.integers(1, 12)


@settings(max_examples=25)
@given(first=st.lists(SHORT, min_size=1, max_size=4), most=SHORT, rng=st.randoms())
def test_what_passes_a_prompt_is_at_most_so_many_times_as_long(first, most, rng):
    """However many come behind it."""
    lengths = [*first, *rng.choices(range(1, most + 1), k=600)]
    passed_by = [passes(lengths, number) for number in range(len(first))]
    assert all(map(le, passed_by, [PASSED * length for length in first])), passed_by


def test_much_shorter_prompts_pass_by_nearly_as_much():
    assert passes([12] + [1] * 600, 0) == PASSED * 11 - 1


def passes(lengths, number):
    """Together, what passes that one of prompts of these lengths."""
    order = Order("sjf")
    places = [
        order.precedence(request_of(each, Arrival(0.0, length, 1)))
        for each, length in enumerate(lengths)
    ]
    later = range(number + 1, len(places))
    return sum(lengths[other] for other in later if places[other] < places[number])


@pytest.mark.parametrize("policy", ["uniform", "sarathi_serve"])
@pytest.mark.parametrize("tokens_per_s", [400, 40_000])
@pytest.mark.parametrize("load", [0.7, 1.05, 1.2])
def test_a_long_prompt_among_short_ones_waits_for_its_own_length(policy, tokens_per_s, load):
    """8,000 tokens among prompts of 100 to 300, for which the load alone is more than can be done:
    at any speed of the stages it is passed by no more than its length allows."""
    rng, now, arrivals = Random(load), 0.0, []
    while len(arrivals) < 1600:
        now += rng.expovariate(load * tokens_per_s / 200)
        length = 8000 if len(arrivals) == 100 else rng.randint(100, 300)
        arrivals.append(Arrival(now, length, 1))
    times = LinearTimes(1, base=0.0, per_token=1 / tokens_per_s)
    engine = make_engine(policy, num_blocks=10_000, max_num_batched_tokens=512,
                         max_model_len=9000, order="sjf")  # fmt: skip
    simulation = Simulation(SimulatedPipeline(engine, times), arrivals)
    simulation.run_until()
    long, later = simulation.served[100], simulation.served[101:]
    ended_s = long.token_times_s[0]
    passed_by = sum(each.num_prompt_tokens for each in later if each.token_times_s[0] < ended_s)
    assert passed_by <= PASSED * 8000 + 512  # what is in flight when its turn has come
    assert sum(each.num_prompt_tokens for each in later) > PASSED * 8000 + 512  # it could be more
    short = [each.token_times_s[0] - each.arrival_s for each in later[:20]]
    assert max(short) < ended_s - long.arrival_s or load < 1


# ---- the queue ----------------------------------------------------------------------------------

CALLS = st.tuples(st.sampled_from(["put", "put", "put", "to_front", "discard"]), st.integers(0, 9))


@given(calls=st.lists(CALLS, max_size=60), precedence=st.lists(st.integers(0, 2), min_size=10))
def test_the_queue_is_what_sorting_a_list_gives(calls, precedence):
    queue: RequestQueue[str] = RequestQueue()
    expected: list[int] = []
    for name, number in calls:
        request_id = RequestId(number)
        if name == "put":
            queue.put(request_id, str(number), precedence[number])
            expected += [] if number in expected else [number]
        elif name == "discard":
            queue.discard(request_id)
            expected = [each for each in expected if each != number]
        elif number in expected:
            queue.to_front(request_id)
            expected = [number, *[each for each in expected if each != number]]
        expected.sort(key=precedence.__getitem__)
        assert list(queue) == expected
        assert list(queue.values()) == list(map(str, expected))
        assert len(queue) == len(expected)
        assert (request_id in queue) == (number in expected)
        assert queue.get(request_id) == (str(number) if number in expected else None)


def test_the_default_order_comes_first():
    assert next(iter(ORDERS)) == Limits.__dataclass_fields__["order"].default
